"""What any export may hold, checked before anything opens its files.

A folder may come from anywhere and its manifest agree with it, so hashes say nothing
about who wrote it. Refused are names of Python code, which transformers could be asked
to run, and graphs in another format or file than a folder of its kind has: transformers
reads some formats in ways that run code.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from vtprune_fx.export.manifest import Manifest, check_whole, read, refused
from vtprune_fx.export.target import target_of

COMPONENTS = ("prefill", "decode")
"""The graphs of an export, and what the files with them are called."""

DISTRUST = "Load it only where you trust who wrote it, with their own code."


def trusted(folder: Path) -> Manifest:
    """The manifest of a whole export, which runs no code of its own and stays in place.

    Raises:
        ExportError: The folder is no whole export, or might do otherwise.
    """
    contents = read(folder)
    suffix = target_of(folder, contents).suffix
    check_whole(folder, contents)
    _check_code(folder)
    graphs = {name: f"{name}{suffix}" for name in COMPONENTS}
    for name in ("config.json", "generation_config.json", *graphs.values()):
        if name not in contents.files:
            raise refused(folder, name, "no such file")
    _check_components(folder, {"export_format": contents.target, "files": graphs})
    return contents


def _check_code(folder: Path) -> None:
    for path in sorted(folder.iterdir()):
        if path.suffix == ".py":
            raise refused(folder, "no code", path.name, DISTRUST)
        if path.suffix == ".json" and "auto_map" in _fields(folder, path.name):
            found = f"auto_map in {path.name}, which names Python code"
            raise refused(folder, "no code", found, DISTRUST)


def _fields(folder: Path, name: str) -> dict[str, Any]:
    try:
        found = json.loads((folder / name).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise refused(folder, f"{name} to be JSON", str(error)) from error
    return found if isinstance(found, dict) else {}


def _check_components(folder: Path, expected: dict[str, object]) -> None:
    """Check that transformers' own manifest names the two graphs and no other file."""
    fields = _fields(folder, "export.json")
    try:
        entries = fields["components"].items()
        files = {name: entry["file"] for name, entry in entries}
        found = {"export_format": fields["export_format"], "files": files}
    except (AttributeError, KeyError, TypeError) as error:
        raise refused(folder, "export.json with two graphs", repr(error)) from error
    if found != expected:
        raise refused(folder, f"export.json to say {expected}", str(found))
