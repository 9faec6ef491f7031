"""Importing says once that torch or transformers is outside of what was tested."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
import warnings
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from vtprune_fx import bounds
from vtprune_fx.bounds import UntestedVersionWarning, warn_if_untested

ROOT = Path(__file__).resolve().parents[1]
STATED = (
    "torch<2.14,>=2.13",
    "transformers<5.25,>=5.23",
    "typer",
    "torchao; extra=='q'",
)
TESTED = "vtprune_fx is tested with torch <2.14,>=2.13 and transformers <5.25,>=5.23;"


def _distribution(folder: Path, name: str, version: str, *needs: str) -> None:
    """What pip leaves of an installed package, as far as metadata reads it."""
    info = folder / f"{name}-{version}.dist-info"
    info.mkdir(parents=True)
    lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
    lines += [f"Requires-Dist: {need}" for need in needs]
    (info / "METADATA").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _said(folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is said where ``folder`` holds all that is installed."""
    monkeypatch.setattr(sys, "path", [str(folder)])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warn_if_untested()
    assert all(warning.category is UntestedVersionWarning for warning in caught)
    return [str(warning.message) for warning in caught]


@pytest.mark.parametrize("torch", ["2.13.0", "2.13.0+cpu", "2.13.4.post1", "2.13.1rc1"])
@pytest.mark.parametrize("transformers", ["5.23.0", "5.24.3", "5.24.0.dev0"])
def test_nothing_is_said_within_the_bounds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, torch: str, transformers: str
) -> None:
    _distribution(tmp_path, "vtprune_fx", "0.1.0", *STATED)
    _distribution(tmp_path, "torch", torch)
    _distribution(tmp_path, "transformers", transformers)
    assert _said(tmp_path, monkeypatch) == []


@pytest.mark.parametrize(
    ("torch", "transformers", "found"),
    [
        ("2.15.0+cu130", "5.24.0", "torch 2.15.0+cu130"),
        ("2.12.1", "5.23.0", "torch 2.12.1"),
        # Made ahead of 2.14.0 and of 2.13.0: of a series that was not tested.
        ("2.14.0.dev20261101+cpu", "5.23.0", "torch 2.14.0.dev20261101+cpu"),
        ("2.13.0a0+git1234567", "5.23.0", "torch 2.13.0a0+git1234567"),
        ("2.13.0", "5.25.0.dev0", "transformers 5.25.0.dev0"),
        ("unknown", "5.22.1", "torch unknown and transformers 5.22.1"),
    ],
)
def test_what_is_outside_is_named_with_what_was_tested(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    torch: str,
    transformers: str,
    found: str,
) -> None:
    _distribution(tmp_path, "vtprune_fx", "0.1.0", *STATED)
    _distribution(tmp_path, "torch", torch)
    _distribution(tmp_path, "transformers", transformers)
    [said] = _said(tmp_path, monkeypatch)
    assert said.startswith(f"{TESTED} found {found}. ")


@pytest.mark.parametrize("installed", [True, False])
def test_nothing_is_said_where_metadata_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, installed: bool
) -> None:
    if installed:  # this package alone; else a source tree on the path beside torch
        _distribution(tmp_path, "vtprune_fx", "0.1.0", *STATED)
    else:
        _distribution(tmp_path, "torch", "2.15.0")
    assert _said(tmp_path, monkeypatch) == []


def test_importing_says_it_once_at_the_importers_line(tmp_path: Path) -> None:
    _distribution(tmp_path, "vtprune_fx", "0.1.0", *STATED)
    _distribution(tmp_path, "torch", "2.15.0")
    script = tmp_path / "script.py"
    lines = [
        f"import sys; sys.path[:0] = [{str(tmp_path)!r}, {str(ROOT)!r}]",
        "import vtprune_fx.errors",
        "import vtprune_fx.recipes.counting",
        "print(sorted({'torch', 'transformers'} & set(sys.modules)))",
    ]
    script.write_text("\n".join(lines), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, check=True
    )
    assert done.stderr.count("UntestedVersionWarning") == 1
    assert (
        f"{script}:2: UntestedVersionWarning: {TESTED} found torch 2.15" in done.stderr
    )
    assert done.stdout == "[]\n", "importing waits for torch"


def test_what_is_let_in_is_what_was_tested() -> None:
    """The table of the page: its first and last releases are the bounds.

    ``>=5.23`` is 5.23.0 there, ``<5.25`` is 5.24.*; each lane's file has its row.
    """
    page = (ROOT / "docs" / "getting-started.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([\w ]+) \| 3\.11 \| ([\d.]+) \| ([\d.]+) \|", page, re.M)
    tested = {
        lane: dict(zip(bounds.CHECKED, found, strict=True)) for lane, *found in rows
    }
    assert tested.keys() == {"newest", "lowest", "by hand"}
    for lane in ("newest", "lowest"):
        assert pins(lane).items() >= tested[lane].items()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    needs = map(Requirement, project["project"]["dependencies"])
    checked = {
        need.name: need.specifier for need in needs if need.name in bounds.CHECKED
    }
    assert checked.keys() == set(bounds.CHECKED)
    for name, specifier in checked.items():
        numbers = sorted(Version(row[name]).release[:2] for row in tested.values())
        (major, least), (_, most) = numbers[0], numbers[-1]
        assert specifier == SpecifierSet(f">={major}.{least},<{major}.{most + 1}"), name


def pins(lane: str) -> dict[str, str]:
    text = (ROOT / "constraints" / f"{lane}.txt").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    return dict(line.split("==") for line in lines)
