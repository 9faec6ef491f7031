"""Visual-token pruning as a compiler pass for vision-language models.

``prune`` and ``vtprune_backend`` take a traced graph of an unmodified transformers
model and a recipe, and give back a graph that is smaller by construction.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from vtprune_fx.bounds import warn_if_untested
from vtprune_fx.optional import lacking

if TYPE_CHECKING:
    from vtprune_fx.api import PrunedProgram, explain, prune
    from vtprune_fx.backend import vtprune_backend
    from vtprune_fx.errors import VtpruneError
    from vtprune_fx.generation import compile, report_of, undo
    from vtprune_fx.recipe import Recipe, load_recipe
    from vtprune_fx.report import PruneReport
    from vtprune_fx.scorers import register_scorer

__all__ = [
    "PruneReport",
    "PrunedProgram",
    "Recipe",
    "VtpruneError",
    "__version__",
    "compile",
    "explain",
    "load_recipe",
    "prune",
    "register_scorer",
    "report_of",
    "undo",
    "vtprune_backend",
]

__version__ = "0.1.0"

_HOMES = {
    "PruneReport": "report",
    "PrunedProgram": "api",
    "Recipe": "recipe",
    "VtpruneError": "errors",
    "compile": "generation",
    "explain": "api",
    "load_recipe": "recipe",
    "prune": "api",
    "register_scorer": "scorers",
    "report_of": "generation",
    "undo": "generation",
    "vtprune_backend": "backend",
}


def __getattr__(name: str) -> Any:
    """Import on first use: the command line must not wait for torch to print help."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        home = importlib.import_module(f"vtprune_fx.{_HOMES[name]}")
    except ImportError as error:
        if missing := lacking(error, "importing transformers", "the installed torch"):
            raise missing from error
        raise
    return getattr(home, name)


warn_if_untested()
