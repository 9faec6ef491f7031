"""``export.json``: what transformers recorded about the two graphs of an export.

Outputs are read off their names (``graph_outputs``), so most of it is never used. It is
checked all the same: with transformers alone, a record can be made to import modules.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from vtprune_fx.export.manifest import refused
from vtprune_fx.files import parse_json
from vtprune_fx.models.fields import walk

_KINDS: dict[str, type | tuple[type, ...]] = {
    "architecture": str,
    "packages": dict,
    "export_config": dict,
    "export_dtype": str,
    "export_device": str,
    "kwargs": dict,
    "in_spec": str,
    "out_spec": str,
    "in_constants": dict,
    "out_constants": list,
}
"""Fields of a graph's metadata."""

_BUILT_IN = ("builtins.tuple", "builtins.list", "builtins.dict", None)
_OF_TRANSFORMERS = re.compile(r"transformers(\.\w+)*[.:]\w+")
_OF_A_MODULE = re.compile(r"\w+(\.\w+)*:\w+")
_VERSION = 1


def check_record(
    folder: Path, fields: dict[str, Any], target: str, graphs: dict[str, str]
) -> None:
    """Check that a record names the two graphs, no other file, and no module.

    Args:
        folder: The export.
        fields: What its ``export.json`` says.
        target: The export's format.
        graphs: For each graph its file.

    Raises:
        ExportError: It does not.
    """
    expected = {"export_format": target, "files": graphs}
    try:
        entries = fields["components"]
        files = {name: entry["file"] for name, entry in entries.items()}
        found = {"export_format": fields["export_format"], "files": files}
    except (AttributeError, KeyError, TypeError) as error:
        raise refused(folder, "export.json with two graphs", repr(error)) from error
    if found != expected:
        raise refused(folder, f"export.json to say {expected}", str(found)[:300])
    version = fields.get("schema_version")
    if version != _VERSION or isinstance(version, bool):
        expected_version = f"export.json of schema_version {_VERSION}"
        raise refused(folder, expected_version, str(version)[:80])
    _check_keys(folder, "export.json", fields, {"schema_version", "components", *found})
    for name, entry in entries.items():
        _check_keys(folder, f"components.{name}", entry, {"file", "metadata"})
        wrong = _wrong(entry.get("metadata"))
        if wrong is not None:
            raise refused(
                folder, f"export.json with metadata of {name}, as transformers", wrong
            )


def _check_keys(
    folder: Path, where: str, fields: dict[str, Any], known: set[str]
) -> None:
    strange = sorted(set(fields) - known - {"files"})
    if strange:
        raise refused(folder, f"known fields in {where} of export.json", strange[0])


def _wrong(metadata: object) -> str | None:
    """What is wrong with a graph's metadata, if anything."""
    if not isinstance(metadata, dict):
        return "none"
    for name, value in metadata.items():
        if name not in _KINDS:
            return f"a field {name}"
        if value is not None and not isinstance(value, _KINDS[name]):
            return f"{name} of type {type(value).__name__}"
    for name in ("in_spec", "out_spec"):
        if metadata.get(name) is not None:
            wrong = _wrong_spec(metadata[name])
            if wrong is not None:
                return f"{name} with {wrong}"
    return None


def _wrong_spec(text: str) -> str | None:
    """What in a tree of Python objects could make a reader import a module.

    Trees hold JSON in strings, which is read in the same way.
    """
    waiting = [text]
    while waiting:
        try:
            spec = parse_json(waiting.pop())
        except ValueError as error:
            return f"no JSON: {error}"
        for place, name, value in walk(spec):
            if _names_code(name, value):
                return f"{place} {str(value)[:80]!r}, which names code"
            if isinstance(value, str) and value.lstrip().startswith(("{", "[")):
                waiting.append(value)
    return None


def _names_code(name: str, value: object) -> bool:
    if name in ("__enum__", "fqn"):
        return True
    if name == "type":
        return value not in _BUILT_IN and not _is_of_transformers(value)
    named = isinstance(value, str) and _OF_A_MODULE.fullmatch(value)
    return bool(named) and not _is_of_transformers(value)


def _is_of_transformers(value: object) -> bool:
    return isinstance(value, str) and bool(_OF_TRANSFORMERS.fullmatch(value))
