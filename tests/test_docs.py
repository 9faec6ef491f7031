"""The documentation: it builds, its links lead somewhere, its code and commands work.

A block of Python runs unless ``<!-- not run: WHY -->`` stands on the line before it;
blocks of a page share their names, as a reader who types them in would.
"""

from __future__ import annotations

import ast
import importlib
import io
import re
import shlex
import subprocess
import sys
import tokenize
from pathlib import Path
from typing import Any

import pytest
import typer

from vtprune_fx import cli, load_recipe
from vtprune_fx.scorers import registry

ROOT = Path(__file__).parents[1]
PAGES = [*sorted((ROOT / "docs").glob("*.md")), ROOT / "README.md"]
TEXTS = [*PAGES, ROOT / "CONTRIBUTING.md"]
BLOCK = re.compile(r"^(<!-- not run: .+ -->\n)?```(\w+)\n(.*?)^```$", re.M | re.S)
FENCED = re.compile(r"^```.*?^```$", re.M | re.S)
RETIRED = re.compile(
    r"\bbehind\b|\bahead\b|\btold\b|\bwhoever\b|\bwho (?:stay|leave)s\b|\bnobody\b"
    r"|\bof (?:its|their) own\b|\btokens (?:that )?(?:leave|stay)\b|\bas it came\b",
    re.I,
)
RETIRED_IN_CODE = re.compile(
    # "own:" and "``own``" are a field of statistics files.
    RETIRED.pattern + r"|\bown\b(?!:|``)|\bwhole\b|\btells?\b|\bwho (?:stay|leave)\b",
    re.I,
)
CLEANED = (  # folders whose docstrings and comments are free of these words
    "export",
    "passes",
    "vtprune_fx/analysis",
    "vtprune_fx/capture",
    "vtprune_fx/cli",
    "vtprune_fx/evaluation",
    "vtprune_fx/fitting",
    "vtprune_fx/generation",
    "vtprune_fx/graph",
    "vtprune_fx/models",
    "vtprune_fx/ops",
    "vtprune_fx/oracle",
    "vtprune_fx/planning",
    "vtprune_fx/recipes",
    "vtprune_fx/reference",
    "vtprune_fx/scorers",
    "vtprune_fx/selection",
    "benchmarks",
    "examples",
    "scripts",
)
FILES = [file for folder in CLEANED for file in sorted((ROOT / folder).rglob("*.py"))]
LINK = re.compile(r"\]\(([^)\s]+)\)")


def blocks(page: Path, language: str) -> list[str]:
    """Blocks of a language that are to be run."""
    found = BLOCK.findall(page.read_text(encoding="utf-8"))
    return [text for skipped, kind, text in found if kind == language and not skipped]


def commands(page: Path) -> list[str]:
    """Command lines that start with ``vtprune``."""
    lines = "".join(blocks(page, "sh")).replace("\\\n", " ").splitlines()
    return [line for line in lines if line.startswith("vtprune ")]


def anchors(page: Path) -> set[str]:
    """Where links into a page may lead."""
    text = re.sub(
        r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S
    )
    titles = re.findall(r"^#+ (.+)$", text, re.M)
    plain = (re.sub(r"[^\w\- ]", "", title).strip().lower() for title in titles)
    return {re.sub(r"[\- ]+", "-", title) for title in plain}


def test_the_site_builds(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-d", str(tmp_path)]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "errors" / "index.html").is_file()


@pytest.mark.parametrize("page", TEXTS, ids=lambda page: page.name)
def test_no_page_uses_a_retired_word(page: Path) -> None:
    """The glossary has the terms instead: after, before, dropped, kept, per-sample."""
    text = FENCED.sub("", page.read_text(encoding="utf-8"))
    assert RETIRED.findall(text) == []


def remarks(text: str) -> list[str]:
    """Comments and docstrings of a Python file, those of constants included."""
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    comments = [token.string for token in tokens if token.type == tokenize.COMMENT]
    docstrings = [
        node.value.value
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    ]
    return comments + docstrings


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_no_remark_uses_a_retired_word(file: Path) -> None:
    found = [
        remark
        for remark in remarks(file.read_text(encoding="utf-8"))
        if RETIRED_IN_CODE.search(remark)
    ]
    assert found == []


def test_a_retired_word_is_seen_in_remarks_alone() -> None:
    text = 'def f():\n    """Its own."""\n    # behind\n    return "whole"\n'
    assert remarks(text) == ["# behind", "Its own."]
    assert all(map(RETIRED_IN_CODE.search, remarks(text)))


@pytest.mark.parametrize("page", TEXTS, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for link in LINK.findall(page.read_text(encoding="utf-8")):
        if link.startswith(("http://", "https://")):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize(
    "page", [page for page in PAGES if blocks(page, "python")], ids=lambda p: p.name
)
def test_code_runs(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_REGISTERED", {})
    names: dict[str, object] = {"__name__": page.stem}
    for text in blocks(page, "python"):
        # As in a notebook: typing is not checked, and nothing is hidden.
        exec(compile(text, page.name, "exec"), names)


@pytest.mark.parametrize(
    ("page", "line"), [(page.name, line) for page in TEXTS for line in commands(page)]
)
def test_commands_parse(page: str, line: str) -> None:
    """Every command and option exists, and nothing that is needed is missing."""
    _, *arguments = shlex.split(line, comments=True)
    command: Any = typer.main.get_command(cli.app)
    while hasattr(command, "commands") and arguments:
        name, *arguments = arguments
        assert name in command.commands, f"{page}: {line}"
        command = command.commands[name]
    command.make_context("vtprune", arguments)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_code_imports_public_names_alone(page: Path) -> None:
    found = BLOCK.findall(page.read_text(encoding="utf-8"))
    text = "\n".join(text for _, kind, text in found if kind == "python")
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            named = {alias.name for alias in node.names}
            assert not any(name.startswith("vtprune_fx.") for name in named)
        elif isinstance(node, ast.ImportFrom) and "vtprune_fx" in (node.module or ""):
            public = set(importlib.import_module(str(node.module)).__all__)
            folders = {"errors", "export", "passes", "recipes", "scorers"}
            names = {alias.name for alias in node.names}
            assert names <= public | folders, ast.unparse(node)


def test_the_tour_names_what_there_is() -> None:
    """Each row of its tables names a file, and what that defines."""
    text = (ROOT / "docs" / "tour.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([\w/]+\.py)` \| `(\w+)` \|", text, re.M)
    assert len(rows) > 20
    for path, name in rows:
        tree = ast.parse((ROOT / "vtprune_fx" / path).read_text(encoding="utf-8"))
        kinds = (ast.FunctionDef, ast.ClassDef)
        assert name in {n.name for n in tree.body if isinstance(n, kinds)}, path
    for path in re.findall(r"`([\w/]+\.py)`", text):
        assert (ROOT / "vtprune_fx" / path).exists(), path


def test_the_picture_of_tokens_is_what_the_recipe_says() -> None:
    picture = (ROOT / "docs" / "images" / "tokens-per-layer.svg").read_text("utf-8")
    drawn = re.findall(r"layer (\d+): (\d+) visual", picture)
    recipe = load_recipe("fitprune-llava-1.5-7b-60")
    left = recipe.tokens_per_layer(recipe.visual_tokens, recipe.layers)
    assert [(int(layer), int(kept)) for layer, kept in drawn] == list(enumerate(left))


def test_the_readme_fits_on_two_screens() -> None:
    assert len((ROOT / "README.md").read_text("utf-8").splitlines()) <= 110


def test_there_is_something_to_check() -> None:
    assert sum(len(commands(page)) for page in TEXTS) > 10
    assert sum(len(blocks(page, "python")) for page in PAGES) > 5


def test_a_wrong_option_is_seen() -> None:
    with pytest.raises(Exception, match="--nope"):
        test_commands_parse("here", "vtprune cost --recipe x --nope 1")
