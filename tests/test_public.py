"""What the package hands out by name, and what that costs to import."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[1] / "docs" / "api.md"
FACADES = (
    *("vtprune_fx", "vtprune_fx.errors", "vtprune_fx.recipes", "vtprune_fx.scorers"),
    *("vtprune_fx.models", "vtprune_fx.reference", "vtprune_fx.passes"),
    "vtprune_fx.export",
)
# Names without an underscore that a facade's code needs, and that are not public.
HELPERS = {
    "vtprune_fx": {"lacking", "warn_if_untested"},
    "vtprune_fx.errors": {"first_sentence"},
}
# The first names that README and the documentation use.
PROMISED = {
    *(
        "compile",
        "undo",
        "report_of",
        "schedule",
        "prune",
        "explain",
        "vtprune_backend",
    ),
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
    names = set(importlib.import_module(facade).__all__)
    assert names - {"__version__"} == bound(facade) - HELPERS.get(facade, set())


def bound(facade: str) -> set[str]:
    """Public-looking names that a facade defines, or imports from this package."""
    file = importlib.import_module(facade).__file__
    assert file is not None
    tree = ast.parse(Path(file).read_text(encoding="utf-8"))
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and "vtprune_fx" in (node.module or ""):
            names |= {alias.asname or alias.name for alias in node.names}
    for statement in tree.body:
        if isinstance(statement, ast.ClassDef | ast.FunctionDef):
            names.add(statement.name)
        elif isinstance(statement, ast.Assign | ast.AnnAssign):
            targets = [n for n in ast.walk(statement) if isinstance(n, ast.Name)]
            names |= {n.id for n in targets if isinstance(n.ctx, ast.Store)}
    return {name for name in names if not name.startswith("_")}


def test_the_api_page_has_a_section_for_each_facade() -> None:
    assert sorted(documented()) == sorted(FACADES)


@pytest.mark.parametrize("facade", FACADES)
def test_the_api_page_has_every_public_name_and_no_other(facade: str) -> None:
    public = [f"{facade}.{name}" for name in importlib.import_module(facade).__all__]
    assert sorted(documented()[facade]) == sorted(public)


def documented() -> dict[str, list[str]]:
    """Names on the API page by section: directives, and first cells of tables."""
    _, *sections = re.split(r"^## (\S+)$", PAGE.read_text(encoding="utf-8"), flags=re.M)
    entry = re.compile(r"^(?:::: |\| `)(vtprune_fx[\w.]*)", re.M)
    pairs = zip(sections[::2], sections[1::2], strict=True)
    return {facade: entry.findall(text) for facade, text in pairs}


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
