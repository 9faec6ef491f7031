"""The reference model: a small trained LLaVA, and the questions it is measured on.

Pictures are drawn (``pictures``), questions asked about them (``questions``), both from
a split and a seed alone. ``examples/reference_model/train.py`` made the checkpoint,
which lies in ``checkpoint/`` beside this file. ``random_llava`` builds a checkpoint of
the same architecture with random weights.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vtprune_fx.reference.questions import Question, Sample, draw_samples
    from vtprune_fx.reference.random_llava import CheckpointSpec, build_checkpoint
    from vtprune_fx.reference.task import Task, reference_task

__all__ = [
    "CHECKPOINT",
    "CheckpointSpec",
    "Question",
    "Sample",
    "Task",
    "build_checkpoint",
    "draw_samples",
    "reference_task",
]

CHECKPOINT = Path(__file__).parent / "checkpoint"
"""Folder of the trained checkpoint."""

_HOMES = {
    "CheckpointSpec": "random_llava",
    "Question": "questions",
    "Sample": "questions",
    "Task": "task",
    "build_checkpoint": "random_llava",
    "draw_samples": "questions",
    "reference_task": "task",
}


def __getattr__(name: str) -> object:
    """Import on first use: the command line must not wait for torch to print help."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
