"""What the package hands out by name, and what that costs to import."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

FACADES = (
    *("vtprune_fx", "vtprune_fx.errors", "vtprune_fx.recipes", "vtprune_fx.scorers"),
    *("vtprune_fx.models", "vtprune_fx.reference", "vtprune_fx.passes"),
    "vtprune_fx.export",
)
# The first names that README and the documentation use.
PROMISED = {
    *("compile", "undo", "report_of", "prune", "explain", "vtprune_backend"),
    *("PrunedProgram", "PruneReport", "Explanation", "Recipe", "load_recipe"),
    *("recipe_names", "default_recipe", "register_scorer", "Evidence"),
    *("VtpruneError", "__version__"),
}


@pytest.mark.parametrize("facade", FACADES)
def test_every_public_name_is_there(facade: str) -> None:
    module = importlib.import_module(facade)
    missing = [name for name in module.__all__ if not hasattr(module, name)]
    assert missing == []
    assert len(set(module.__all__)) == len(module.__all__) > 0


@pytest.mark.parametrize("facade", FACADES)
def test_type_checkers_see_every_public_name(facade: str) -> None:
    """A name handed out by ``__getattr__`` alone would be anything to them."""
    module = importlib.import_module(facade)
    assert module.__file__ is not None
    tree = ast.parse(Path(module.__file__).read_text(encoding="utf-8"))
    bound: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            bound |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ClassDef):
            bound.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            bound.add(node.id)
    assert set(module.__all__) <= bound


def test_the_top_level_hands_out_what_was_promised() -> None:
    assert set(importlib.import_module("vtprune_fx").__all__) == PROMISED


def test_an_unknown_name_is_refused() -> None:
    for facade in ("vtprune_fx", "vtprune_fx.scorers", "vtprune_fx.reference"):
        module = importlib.import_module(facade)
        with pytest.raises(AttributeError, match=f"module '{facade}' has no .*'nope'"):
            module.nope  # noqa: B018 - reading it is the test


def test_recipes_are_read_without_torch() -> None:
    script = (
        "import sys, vtprune_fx.cli, vtprune_fx.scorers, vtprune_fx.reference\n"
        "vtprune_fx.load_recipe('fitprune-llava-1.5-7b-60')\n"
        "count = len(vtprune_fx.recipe_names())\n"
        "print(count, {'torch', 'transformers', 'numpy'} & set(sys.modules))"
    )
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    count, _, modules = done.stdout.partition(" ")
    assert int(count) > 30
    assert modules.strip() == "set()"
