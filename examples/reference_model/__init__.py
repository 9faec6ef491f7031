"""The reference model: a small trained LLaVA, and the questions it is measured on.

Installed as ``vtprune_fx.reference``. Pictures are drawn (``pictures``), questions
asked about them (``questions``), both from a split and a seed alone. ``train`` makes
the checkpoint, which lies in ``checkpoint/`` beside this file.
"""

from pathlib import Path

CHECKPOINT = Path(__file__).parent / "checkpoint"
"""Folder of the trained checkpoint."""
