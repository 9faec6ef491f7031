"""What any export may hold, checked before anything opens its files.

A folder may come from anywhere and its manifest agree with it, so hashes say nothing
about who wrote it. What an export may hold is a list: names of files, fields of the
JSON files, formats of graphs. transformers reads other files and formats, some of them
in ways that run code or that read from elsewhere.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import GenerationConfig

from vtprune_fx.errors import first_sentence
from vtprune_fx.export.export_record import check_record
from vtprune_fx.export.manifest import (
    FILE,
    PASSED_OVER,
    Manifest,
    check_whole,
    read,
    refused,
)
from vtprune_fx.export.target import target_of
from vtprune_fx.models.fields import CODE, read_fields, refused_field

COMPONENTS = ("prefill", "decode")
"""The graphs of an export, and what the files with them are called."""

DISTRUST = "Load it only where you trust who wrote it, with what code it has."

RECORD = "export.json"
"""Where transformers says what the graphs are."""

_NEEDED = ("config.json", "generation_config.json", RECORD)

_OF_WORDS = ("tokenizer.json", "vocab.json", "added_tokens.json")
"""JSON files with words as names of fields, which mean nothing."""

_OF_PROCESSORS = frozenset(
    {
        *("processor_config.json", "preprocessor_config.json", *_OF_WORDS),
        *("video_preprocessor_config.json", "tokenizer_config.json", "merges.txt"),
        *("special_tokens_map.json", "chat_template.json", "chat_template.jinja"),
        *("vocab.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model"),
    }
)
"""Files of a processor. None of them is code, or read in a way that runs code."""

_NOT_OURS = frozenset(
    {
        *("cache_config", "compile_config", "constraints", "diversity_penalty"),
        *("continuous_batching_config", "dola_layers", "force_words_ids"),
        *("penalty_alpha", "use_mtp"),
    }
)
"""Fields of a generation configuration for what exports lack, or what transformers
fetches code for."""


def trusted(folder: Path) -> Manifest:
    """The manifest of a complete export, which runs no code and reads nothing outside.

    Raises:
        ExportError: The folder is no complete export, or might do otherwise.
    """
    contents = read(folder)
    suffix = target_of(folder, contents).suffix
    graphs = {name: f"{name}{suffix}" for name in COMPONENTS}
    for name in (*_NEEDED, *graphs.values()):
        if name not in contents.files:
            raise refused(folder, name, "no such file")
    _check_names(folder, tuple(graphs.values()))
    check_whole(folder, contents)
    fields = {
        name: _fields(folder, name)
        for name in sorted(contents.files)
        if name.endswith(".json")
    }
    _check_generation(folder, fields["generation_config.json"])
    check_record(folder, fields[RECORD], contents.target, graphs)
    return contents


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """Check that no file changes inside the block: what is hashed is what is loaded.

    Raises:
        ExportError: One did.
    """
    before = _stamps(folder)
    yield
    if _stamps(folder) != before:
        raise refused(
            folder,
            "files that do not change while they are loaded",
            "that they did",
            "Load it again when nothing writes to it.",
        )


def _stamps(folder: Path) -> dict[str, tuple[int, ...]]:
    """What changes with every write: the system keeps ``ctime``; no program sets it."""
    try:
        paths = [folder, *folder.iterdir()]
        found = {path.name: path.lstat() for path in paths}
    except (OSError, ValueError) as error:
        raise refused(folder, "a folder that can be read", str(error)) from error
    return {
        name: (
            stat.st_dev,
            stat.st_ino,
            stat.st_size,
            stat.st_mtime_ns,
            stat.st_ctime_ns,
        )
        for name, stat in found.items()
    }


def _check_names(folder: Path, graphs: tuple[str, ...]) -> None:
    """Check that a folder holds files alone, by names that an export has."""
    for path in sorted(folder.iterdir()):
        name = path.name
        if name in PASSED_OVER:
            continue
        if path.suffix in (".py", ".pyc"):
            raise refused(folder, "no code", name, DISTRUST)
        if path.is_symlink() or not path.is_file():
            found = "a link" if path.is_symlink() else "a folder, pipe or device"
            raise refused(folder, f"{name} to be a file", found, "Take it out.")
        listed = name in (FILE, *_NEEDED) or name in _OF_PROCESSORS
        if not listed and not name.startswith(graphs):
            expected = f"nothing but what {FILE} lists, and an export has"
            raise refused(folder, expected, name, "Take it out.")


def _fields(folder: Path, name: str) -> dict[str, Any]:
    try:
        found = read_fields(folder / name)
    except (OSError, ValueError) as error:
        raise refused(folder, f"{name} to be JSON", first_sentence(error)) from error
    if not isinstance(found, dict):
        raise refused(folder, f"{name} to hold fields", type(found).__name__)
    wrong = None if name in _OF_WORDS or name == RECORD else refused_field(found)
    if wrong is not None:
        place, why = wrong
        code = place.rpartition(".")[2] in CODE
        expected = "no code" if code else f"{name} with fields that stay in the folder"
        raise refused(folder, expected, f"{place} in {name}, {why}", DISTRUST)
    return found


def _check_generation(folder: Path, fields: dict[str, Any]) -> None:
    """Check that a generation configuration says what transformers' says."""
    known = set(GenerationConfig().to_dict()) - _NOT_OURS
    for name, value in fields.items():
        if name not in known and value is not None:
            raise refused(
                folder, "generation_config.json with known fields", name, DISTRUST
            )
    try:
        GenerationConfig(**fields).validate()
    except Exception as error:  # whatever transformers says of wrong values
        raise refused(
            folder, "generation_config.json with right values", first_sentence(error)
        ) from error
