"""The folder that ``vtprune fit`` writes: recipes, their pictures, a summary."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

from vtprune_fx.errors import InputError
from vtprune_fx.files import replace_file
from vtprune_fx.fitting.collect import PARTS, STATISTICS
from vtprune_fx.fitting.options import Fitted
from vtprune_fx.plots import draw_recipe

SUMMARY = "fit.json"
"""In a folder: its recipes, and their savings."""


def check_folder(folder: Path) -> None:
    """Refuse a folder that holds anything which ``write_fitted`` did not write.

    Raises:
        InputError: It does, or it is a file.
    """
    if not folder.exists():
        return
    found: str | None = "a file"
    if folder.is_dir():
        entries = {path.name for path in folder.iterdir()}
        ours = {STATISTICS, PARTS, SUMMARY, *_listed(folder)}
        found = next(iter(sorted(entries - ours)), None)
    if found is not None:
        raise InputError(
            f"output folder {folder}",
            expected="a new or empty folder, or one that `vtprune fit` wrote",
            found=found,
            fix="Choose another folder. Nothing was changed.",
        )


def _listed(folder: Path) -> list[str]:
    """Files of the recipes in the folder's summary."""
    return [f"{name}.{end}" for name in _read(folder) for end in ("json", "png")]


def _read(folder: Path) -> dict[str, dict[str, object]]:
    """Entries of the folder's summary, by the name of the recipe."""
    file = folder / SUMMARY
    if not file.exists():
        return {}
    try:
        entries = json.loads(file.read_text(encoding="utf-8"))["recipes"]
        return {str(fields["recipe"]): dict(fields) for fields in entries}
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise InputError(
            f"file {file}",
            expected="what `vtprune fit` wrote",
            found=f"{type(error).__name__}: {error}",
            fix="Choose another folder. Nothing was changed.",
        ) from error


def write_fitted(folder: Path, fitted: Sequence[Fitted]) -> None:
    """Add recipes and pictures to the folder, beside those of other names."""
    entries = _read(folder)
    for one in fitted:
        entries[one.recipe.name] = dataclasses.asdict(one) | {"recipe": one.recipe.name}
    summary = json.dumps({"recipes": list(entries.values())}, indent=1) + "\n"
    replace_file(folder / SUMMARY, summary.encode())
    for one in fitted:
        text = one.recipe.to_json()
        replace_file(folder / f"{one.recipe.name}.json", text.encode())
        replace_file(folder / f"{one.recipe.name}.png", draw_recipe(one.recipe))
