"""``vtprune.json``: what an exported folder holds, and the check that it is complete.

A manifest comes with its folder, so it is not trusted: its file names must be plain
names, the files it lists must be files with the hashes it lists, and no other file that
a loader would read may be there. A manifest cannot prove itself: code that opens the
files checks what they contain.
"""

from __future__ import annotations

import errno
import hashlib
import importlib.metadata
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, StringConstraints, ValidationError

from vtprune_fx.errors import ExportError, first_sentence
from vtprune_fx.files import parse_json, read_whole
from vtprune_fx.recipes.schema import Recipe

FILE = "vtprune.json"
"""Name of the manifest in an exported folder."""

Precision = Literal["float32", "float16", "bfloat16"]
"""Type of an export's weights, as PyTorch names it."""

FileName = Annotated[str, StringConstraints(pattern=r"^\w[\w.-]*$")]
"""A name and no path: it starts with no dot and holds no separator."""

Digest = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]

_PACKAGES = ("vtprune-fx", "torch", "transformers", "onnx", "onnxscript")

PASSED_OVER = ("README.md", "LICENSE", ".gitattributes")
"""What a model's repository has beside its files, and no loader reads."""


class Manifest(BaseModel):
    """The manifest of an export.

    Attributes:
        schema_version: Version of this file's format.
        target: Name of the ``ExportTarget`` that runs the graphs.
        source: The model that was exported: a folder, a hub id, or nothing where it
            was made in memory.
        recipe: What was cut.
        visual_tokens: Visual tokens of a sample in the example that was traced.
        per_image: Visual tokens of one image, where that number is known.
        tokens_per_layer: Visual tokens kept after each decoder layer.
        image_token_id: Id of the placeholder that marks a visual token.
        precision: Type of weights and caches.
        quantize: What the decoder's matrices were rounded to, if anything.
        tolerance: How far logits and caches may be from the oracle's, as a share of
            the largest of them.
        opset: Version of the ONNX operators, where there are any.
        batch: Number of samples, where it is fixed.
        prompt: Length of a prompt, where it is fixed.
        keep_sets: Whether the prefill returns its keep sets.
        packages: Versions of what wrote the folder.
        files: SHA-256 of every other file in it.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: Literal[2] = 2
    target: str
    source: str
    recipe: Recipe
    visual_tokens: int
    per_image: int | None = None
    tokens_per_layer: list[int]
    image_token_id: int
    precision: Precision
    quantize: Literal["int8", "int4"] | None = None
    tolerance: float
    opset: int | None = None
    batch: int | None = None
    prompt: int | None = None
    keep_sets: bool = False
    packages: dict[str, str]
    files: dict[FileName, Digest]

    def write(self, folder: Path) -> None:
        """Write the manifest into ``folder``."""
        text = self.model_dump_json(indent=2) + "\n"
        (folder / FILE).write_text(text, encoding="utf-8")


def is_export(folder: Path) -> bool:
    """Whether ``folder`` says that it holds an export."""
    try:
        return (folder / FILE).exists()
    except (OSError, ValueError):  # no folder has such a name
        return False


def read(folder: Path) -> Manifest:
    """Read the manifest of ``folder``.

    Raises:
        ExportError: There is none, or it cannot be read.
    """
    try:
        _check_no_link(folder / FILE)
        fields = parse_json(read_whole(folder / FILE))
        return Manifest.model_validate(fields)
    except (OSError, ValueError) as error:
        raise refused(folder, f"a readable {FILE}", _reason(error)) from error


def _check_no_link(path: Path) -> None:
    if path.is_symlink():
        raise OSError(errno.EINVAL, "a link")


def _reason(error: Exception) -> str:
    """What is wrong with a manifest, in one line."""
    if not isinstance(error, ValidationError):
        return first_sentence(error)
    first = error.errors(include_url=False, include_context=False)[0]
    return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"


def check_whole(folder: Path, contents: Manifest) -> None:
    """Check that a folder holds the files that the manifest lists, and no others.

    Raises:
        ExportError: A file is missing, is a link, hashes to something else, or is not
            listed.
    """
    for name, digest in contents.files.items():
        path = folder / name
        if path.is_symlink():
            raise refused(folder, f"{name} to be a file", "a link", _COPY)
        if not path.is_file():
            raise refused(folder, name, "no such file")
        if _digest(path) != digest:
            raise refused(folder, f"{name} as it was written", "another content")
    there = {path.name for path in folder.iterdir()}
    strange = sorted(there - {FILE, *contents.files, *PASSED_OVER})
    if strange:
        raise refused(
            folder, f"nothing but what {FILE} lists", strange[0], "Take it out."
        )


_COPY = "Copy what it points to into its place, if you trust that."


def refused(
    folder: Path,
    expected: str,
    found: str,
    fix: str = "Write it again with `vtprune export`.",
) -> ExportError:
    """The error for an export that is not as it should be."""
    return ExportError(f"export {folder}", expected=expected, found=found, fix=fix)


def versions() -> dict[str, str]:
    """Versions of the packages that take part in an export."""
    return {name: importlib.metadata.version(name) for name in _PACKAGES}


def hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of every file in ``folder``, by name."""
    return {path.name: _digest(path) for path in sorted(folder.iterdir())}


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
