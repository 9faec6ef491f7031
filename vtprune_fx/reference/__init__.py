"""The reference model: a small trained LLaVA, and the questions it is measured on.

Pictures are drawn (``pictures``), questions asked about them (``questions``), both from
a split and a seed alone. ``examples/reference_model/train.py`` made the checkpoint,
which lies in ``checkpoint/`` beside this file. ``random_llava`` builds one of the same
kind with random weights.
"""

from pathlib import Path

CHECKPOINT = Path(__file__).parent / "checkpoint"
"""Folder of the trained checkpoint."""
