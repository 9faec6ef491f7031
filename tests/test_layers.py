"""The house: which room may import which, no circles, and sizes.

Read from the source, so an import inside a function or for type checking counts too.
"""

from __future__ import annotations

import ast
import graphlib
import statistics
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "vtprune_fx"

# A folder of the package, or a file directly in it, and the rooms that it may import,
# from the bottom up. What is not listed here may not be there.
LEAVES = {"errors", "optional", "files"}
TABLE: dict[str, set[str]] = {
    "errors": set(),
    "optional": {"errors"},
    "files": {"errors"},
    "bounds": set(),
    "graph": {"errors"},
    "ops": {"errors"},
    "scorers": {"errors", "ops"},
    "models": LEAVES,
    "analysis": {"errors", "graph"},
    "recipes": {"errors", "files", "scorers"},
    "plots": {"errors", "optional", "recipes"},
    "capture": {"errors", "graph", "models"},
    "reference": LEAVES | {"models"},
    "selection": {"errors", "ops", "recipes", "scorers"},
    "planning": {"errors", "graph", "models", "analysis", "recipes"},
    "oracle": {"errors", "models", "recipes", "scorers"},
    "passes": {
        *("errors", "graph", "ops", "scorers", "analysis", "recipes"),
        *("selection", "planning"),
    },
}
CORE = set(TABLE)
"""What the front doors may import: all but each other, the reference and the oracle."""
TABLE["pruning"] = CORE - {"oracle", "reference"}
TABLE["api"] = TABLE["backend"] = TABLE["pruning"] | {"pruning"}
TABLE["export"] = TABLE["api"] | {"oracle"}
TABLE["generation"] = TABLE["api"] | {"backend"}
TABLE["timing"] = TABLE["generation"] | {"generation", "export"}
TABLE["evaluation"] = TABLE["timing"] | {"timing", "oracle", "reference"}
TABLE["fitting"] = TABLE["evaluation"]
TABLE["__init__"] = set(TABLE)
TABLE["cli"] = set(TABLE)

MAPPED = ("passes", "export")
"""Folders of the package that stand beside it."""


def sources(root: Path) -> dict[str, Path]:
    """Files of the package by the name of their module."""
    package = root / PACKAGE
    found = {}
    for path in sorted(package.rglob("*.py")):
        if not any(package / name in path.parents for name in MAPPED):
            found[_module(path.relative_to(root))] = path
    for name in MAPPED:
        for path in sorted((root / name).rglob("*.py")):
            found[_module(PACKAGE / path.relative_to(root))] = path
    return found


def _module(path: Path) -> str:
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


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


def edges(root: Path) -> dict[str, set[str]]:
    """For each module of the package, those of its modules that it imports."""
    modules = sources(root)
    found: dict[str, set[str]] = {}
    for module, path in modules.items():
        names = imported(path.read_text(encoding="utf-8"))
        assert not any(name.startswith(".") for name in names), f"{path}: relative"
        ours = (name for name in names if f"{name}.".startswith(f"{PACKAGE}."))
        found[module] = {_nearest(name, modules) for name in ours} - {module}
    return found


def _nearest(name: str, modules: dict[str, Path]) -> str:
    """The module that a name is, or is defined in."""
    while name not in modules:
        name = name.rpartition(".")[0]
        assert name, "an import of the package itself names a module"
    return name


def room(module: str) -> str:
    """The folder of a module, or its file if it is directly in the package."""
    return f"{module}.__init__".split(".")[1]


def violations(root: Path) -> list[str]:
    """Imports that the table does not allow."""
    return sorted(
        f"{module} imports {target}"
        for module, targets in edges(root).items()
        for target in targets
        if room(target) != room(module) and room(target) not in TABLE[room(module)]
    )


def circle(graph: dict[str, set[str]]) -> list[str]:
    """Nodes that lead to each other, in order; none where there is no circle."""
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        found: list[str] = error.args[1]
        return found
    return []


def test_the_table_leads_down() -> None:
    assert circle(TABLE) == []
    assert set().union(*TABLE.values()) <= set(TABLE)


def test_every_module_has_a_room() -> None:
    assert {room(module) for module in sources(ROOT)} == set(TABLE)


def test_imports_lead_down() -> None:
    assert violations(ROOT) == []


def test_no_files_import_each_other() -> None:
    assert circle(edges(ROOT)) == []


# ----------------------------------------------------------------------- the checkers


@pytest.fixture
def house(tmp_path: Path) -> Path:
    """A small package as it should be."""
    write(tmp_path, "vtprune_fx/__init__.py", "from vtprune_fx.api import prune")
    write(tmp_path, "vtprune_fx/errors.py", "import enum")
    write(tmp_path, "vtprune_fx/api.py", "from vtprune_fx import errors, passes")
    write(tmp_path, "vtprune_fx/graph/__init__.py", "")
    write(tmp_path, "vtprune_fx/graph/insert.py", "from vtprune_fx.graph import sizes")
    write(tmp_path, "vtprune_fx/graph/sizes.py", "import vtprune_fx.errors as e, torch")
    write(tmp_path, "passes/__init__.py", "from vtprune_fx.passes.base import Pass")
    write(tmp_path, "passes/base.py", "from vtprune_fx.graph.insert import Inserter")
    return tmp_path


def write(root: Path, file: str, text: str) -> None:
    (root / file).parent.mkdir(parents=True, exist_ok=True)
    (root / file).write_text(text, encoding="utf-8")


def test_a_right_house_is_let_through(house: Path) -> None:
    assert violations(house) == []
    assert circle(edges(house)) == []


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("vtprune_fx.graph.sizes", "import vtprune_fx.passes.base"),
        ("vtprune_fx.graph.sizes", "from vtprune_fx import passes"),
        ("vtprune_fx.graph.sizes", "from vtprune_fx.passes import Pass as P"),
        ("vtprune_fx.errors", "def f() -> None:\n    from vtprune_fx.graph import x"),
        ("vtprune_fx.passes.base", "if x:\n    from vtprune_fx.api import prune"),
        ("vtprune_fx.passes.base", "from vtprune_fx import __version__"),
    ],
)
def test_an_upward_import_is_seen(house: Path, name: str, text: str) -> None:
    file = f"{name.replace('.', '/')}.py".replace("vtprune_fx/passes", "passes")
    write(house, file, text)
    [found] = violations(house)
    assert found.startswith(f"{name} imports ")


def test_a_circle_within_a_room_is_seen(house: Path) -> None:
    write(
        house,
        "vtprune_fx/graph/sizes.py",
        "def f() -> None:\n    from vtprune_fx.graph.insert import Inserter",
    )
    assert violations(house) == []
    names = {"vtprune_fx.graph.insert", "vtprune_fx.graph.sizes"}
    assert set(circle(edges(house))) == names


def test_a_relative_import_is_seen(house: Path) -> None:
    write(house, "vtprune_fx/graph/sizes.py", "from . import insert")
    with pytest.raises(AssertionError, match="relative"):
        edges(house)


# ------------------------------------------------------------------------------ sizes


def lines_of(function: ast.FunctionDef) -> int:
    """Lines of a function, its docstring not counted.

    Nor the signature of a GPU kernel, which takes addresses and sizes one a line.
    """
    first = function.body[0]
    kernel = any("triton.jit" in ast.unparse(d) for d in function.decorator_list)
    start = first.lineno if kernel else function.lineno
    lines = (function.end_lineno or 0) - start + 1
    if ast.get_docstring(function) is not None:
        lines -= (first.end_lineno or 0) - first.lineno + 1
    return lines


def functions(source: str) -> list[ast.FunctionDef]:
    nodes = ast.walk(ast.parse(source))
    return [node for node in nodes if isinstance(node, ast.FunctionDef)]


def test_few_files_stand_outside_of_the_rooms() -> None:
    assert len(list((ROOT / PACKAGE).glob("*.py"))) <= 12


def test_modules_are_short() -> None:
    lines = {
        module: len(path.read_text(encoding="utf-8").splitlines())
        for module, path in sources(ROOT).items()
    }
    assert [module for module, count in lines.items() if count > 450] == []
    full = [count for module, count in lines.items() if count > 1]
    assert statistics.median(full) <= 150


def test_functions_are_short() -> None:
    long = [
        f"{module}.{function.name}: {lines_of(function)} lines"
        for module, path in sources(ROOT).items()
        for function in functions(path.read_text(encoding="utf-8"))
        if lines_of(function) > 50
    ]
    assert long == []


def test_a_docstring_does_not_count() -> None:
    [function] = functions(
        'def f() -> None:\n    """One.\n\n    Two.\n    """\n    g()'
    )
    assert lines_of(function) == 2
