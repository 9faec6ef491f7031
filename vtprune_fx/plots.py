"""Figures, which only some commands draw."""

from __future__ import annotations

from typing import Any

from vtprune_fx.optional import optional


def require_plots() -> Any:
    """The module that figures come from.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    return optional("matplotlib.figure", "matplotlib", "a plot")
