"""``vtprune.json``: what an exported folder holds, and how to tell that it is whole."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

from vtprune_fx import __version__
from vtprune_fx.errors import ExportError
from vtprune_fx.recipe import Recipe

FILE = "vtprune.json"
"""Name of the manifest in an exported folder."""

_PACKAGES = ("torch", "transformers", "onnx", "onnxscript")


class Manifest(BaseModel):
    """The manifest of an export.

    Attributes:
        schema_version: Version of this file's format.
        target: What the graphs run on.
        recipe: What was cut.
        visual_tokens: Visual tokens of a sample in the example that was traced.
        tokens_per_layer: Visual tokens left after each decoder layer.
        image_token_id: Id of the placeholder that marks a visual token.
        packages: Versions of what wrote the folder.
        files: SHA-256 of every other file in it.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: Literal[1] = 1
    target: Literal["onnx", "tensorrt"]
    recipe: Recipe
    visual_tokens: int
    tokens_per_layer: list[int]
    image_token_id: int
    packages: dict[str, str]
    files: dict[str, str]

    def write(self, folder: Path) -> None:
        """Write the manifest into ``folder``."""
        text = self.model_dump_json(indent=2) + "\n"
        (folder / FILE).write_text(text, encoding="utf-8")


def is_export(folder: Path) -> bool:
    """Whether ``folder`` says that it holds an export."""
    return (folder / FILE).is_file()


def read(folder: Path) -> Manifest:
    """Read the manifest of ``folder``.

    Raises:
        ExportError: There is none, or it cannot be read.
    """
    try:
        fields = json.loads((folder / FILE).read_text(encoding="utf-8"))
        return Manifest.model_validate(fields)
    except (OSError, ValueError) as error:
        raise ExportError(
            f"export {folder}",
            expected=f"a readable {FILE}",
            found=str(error).splitlines()[0],
            fix="Write it again with `vtprune export onnx`.",
        ) from error


def check_whole(folder: Path, contents: Manifest) -> None:
    """Check that every file that the manifest lists is there.

    Raises:
        ExportError: One is missing.
    """
    missing = [name for name in contents.files if not (folder / name).is_file()]
    if missing:
        raise ExportError(
            f"export {folder}",
            expected=missing[0],
            found="no such file",
            fix="Write it again with `vtprune export onnx`.",
        )


def versions() -> dict[str, str]:
    """Versions of the packages that take part in an export."""
    others = {name: importlib.metadata.version(name) for name in _PACKAGES}
    return {"vtprune-fx": __version__} | others


def hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of every file in ``folder``, by name."""
    found: dict[str, str] = {}
    for path in sorted(folder.iterdir()):
        with path.open("rb") as file:
            found[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found
