"""Scorers: what rates the visual tokens at a cut, by the name that recipes use.

One scorer, one file. A custom scorer is a function on plain tensors::

    import vtprune_fx

    def brightest(seen):
        return seen.hidden.norm(dim=2)

    vtprune_fx.register_scorer("brightest", brightest)

and a recipe with ``"score": "brightest"`` then works in ``torch.compile``, in exported
programs and in the oracle. Importing this module does not import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from vtprune_fx.scorers.registry import Scorer, names, register_scorer

if TYPE_CHECKING:
    from vtprune_fx.scorers.evidence import Evidence, mean_from, strongest_from
    from vtprune_fx.scorers.roles import CONTEXT, INSTRUCTION, PADDING, VISUAL

__all__ = [
    "CONTEXT",
    "INSTRUCTION",
    "PADDING",
    "VISUAL",
    "Evidence",
    "Scorer",
    "mean_from",
    "names",
    "register_scorer",
    "strongest_from",
]


_HOMES = {
    "CONTEXT": "roles",
    "Evidence": "evidence",
    "INSTRUCTION": "roles",
    "PADDING": "roles",
    "VISUAL": "roles",
    "mean_from": "evidence",
    "strongest_from": "evidence",
}


def __getattr__(name: str) -> Any:
    """Import on first use what needs torch: recipes are read without it."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
