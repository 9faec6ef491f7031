"""Imports run one way: core <- passes <- export <- api, backend, cli.

The reference model stands beside the passes: it reads the core.

Read from the source, so an import inside a function or for type checking counts too.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "vtprune_fx"
# Rooms below the passes.
CORE = (
    *("graph", "ops", "scorers", "models", "analysis", "recipes", "capture"),
    *("selection", "planning", "oracle"),
)
FRONT = tuple(f"{PACKAGE}.{name}" for name in ("api", "backend", "cli"))
REFERENCE = f"{PACKAGE}.reference"
FORBIDDEN = {
    "core": (f"{PACKAGE}.passes", f"{PACKAGE}.export", REFERENCE, *FRONT),
    "passes": (f"{PACKAGE}.export", REFERENCE, *FRONT),
    "export": (REFERENCE, *FRONT),
    "reference": (f"{PACKAGE}.passes", f"{PACKAGE}.export", *FRONT),
}
FOLDERS = {"passes": "passes", "export": "export"}
FOLDERS["reference"] = "vtprune_fx/reference"


def sources() -> list[tuple[str, Path]]:
    """Every module that the rule is about, with its layer."""
    core = [path for room in CORE for path in (ROOT / PACKAGE / room).glob("*.py")]
    layers = {"core": core} | {
        layer: list((ROOT / folder).rglob("*.py")) for layer, folder in FOLDERS.items()
    }
    return [(layer, path) for layer, paths in layers.items() for path in sorted(paths)]


def imported(source: str) -> set[str]:
    """Full names that a module imports, relative imports as a leading dot."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            names |= {f"{module}.{alias.name}" for alias in node.names}
    return names


def violations(layer: str, source: str) -> list[str]:
    """Imports of ``source`` that its layer may not have."""
    return sorted(
        name
        for name in imported(source)
        if name.startswith(".")
        or any(f"{name}.".startswith(f"{banned}.") for banned in FORBIDDEN[layer])
    )


@pytest.mark.parametrize(
    ("layer", "path"),
    sources(),
    ids=lambda value: (
        str(value.relative_to(ROOT)) if isinstance(value, Path) else value
    ),
)
def test_imports_run_one_way(layer: str, path: Path) -> None:
    assert violations(layer, path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("layer", ["core", "passes"])
@pytest.mark.parametrize(
    "source",
    [
        "import vtprune_fx.export",
        "import vtprune_fx.export.to_onnx as x",
        "from vtprune_fx import export",
        "from vtprune_fx.export import to_onnx",
        "from vtprune_fx.export.to_onnx import convert",
        "def f() -> None:\n    from vtprune_fx import api",
        "from . import recipe",
    ],
)
def test_a_wrong_import_is_seen(layer: str, source: str) -> None:
    assert len(violations(layer, source)) == 1


@pytest.mark.parametrize(
    ("layer", "source"),
    [
        ("core", "from vtprune_fx.recipes.schema import Recipe"),
        ("core", "import exporter, vtprune_fx.exports, torch.export"),
        ("passes", "from vtprune_fx.passes.base import Pass"),
        ("export", "from vtprune_fx.passes import Pass"),
    ],
)
def test_a_right_import_is_let_through(layer: str, source: str) -> None:
    assert violations(layer, source) == []


def test_there_is_something_to_check() -> None:
    assert set(FORBIDDEN) == {layer for layer, _ in sources()}
