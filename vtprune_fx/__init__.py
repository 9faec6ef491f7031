"""Visual-token pruning as a compiler pass for vision-language models.

``prune`` and ``vtprune_backend`` take a traced graph of an unmodified transformers
model and a recipe, and give back a graph that is smaller by construction.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
from typing import TYPE_CHECKING, Any

from vtprune_fx.bounds import warn_if_untested
from vtprune_fx.optional import lacking

if TYPE_CHECKING:
    from vtprune_fx.api import PrunedProgram, explain, prune
    from vtprune_fx.backend import vtprune_backend
    from vtprune_fx.errors import VtpruneError
    from vtprune_fx.generation.compile import compile, report_of, schedule, undo
    from vtprune_fx.planning.report import Explanation, PruneReport
    from vtprune_fx.recipes import Recipe, default_recipe, load_recipe, recipe_names
    from vtprune_fx.scorers import Evidence, register_scorer

    __version__: str

__all__ = [
    "Evidence",
    "Explanation",
    "PruneReport",
    "PrunedProgram",
    "Recipe",
    "VtpruneError",
    "__version__",
    "compile",
    "default_recipe",
    "explain",
    "load_recipe",
    "prune",
    "recipe_names",
    "register_scorer",
    "report_of",
    "schedule",
    "undo",
    "vtprune_backend",
]

_HOMES = {
    "Evidence": "scorers",
    "Explanation": "planning.report",
    "PruneReport": "planning.report",
    "PrunedProgram": "api",
    "Recipe": "recipes",
    "VtpruneError": "errors",
    "compile": "generation.compile",
    "default_recipe": "recipes",
    "explain": "api",
    "load_recipe": "recipes",
    "prune": "api",
    "recipe_names": "recipes",
    "register_scorer": "scorers",
    "report_of": "generation.compile",
    "schedule": "generation.compile",
    "undo": "generation.compile",
    "vtprune_backend": "backend",
}


def __getattr__(name: str) -> Any:
    """Import on first use: the command line must not wait for torch to print help."""
    if name == "__version__":
        return importlib.metadata.version("vtprune-fx")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        home = importlib.import_module(f"vtprune_fx.{_HOMES[name]}")
    except ImportError as error:
        if missing := lacking(error, "importing transformers", "the installed torch"):
            raise missing from error
        raise
    return getattr(home, name)


def _check_complete() -> None:
    """Refuse a checkout whose links to ``passes/`` and ``export/`` were lost.

    Raises:
        ImportError: One of them cannot be imported as a part of this package.
    """
    for name in ("passes", "export"):
        if importlib.util.find_spec(f"vtprune_fx.{name}") is None:
            raise ImportError(
                f"package {__path__[0]}: expected `{name}` in it, a link to "
                f"`../{name}`; found none, or a file that a checkout without links "
                "wrote. Check out again after `git config core.symlinks true`, or "
                "install the checkout with `pip install -e .`."
            )


_check_complete()
warn_if_untested()
