"""Prompts to fit a recipe on: of a folder, a data set, or the reference model."""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch
from PIL import Image
from torch import Tensor
from transformers import ProcessorMixin

from vtprune_fx.errors import InputError
from vtprune_fx.models.pictures import as_rgb, open_image
from vtprune_fx.models.prompts import batch_inputs, image_token
from vtprune_fx.optional import optional
from vtprune_fx.reference.questions import draw_samples

REFERENCE = "reference"
"""Names the reference model's questions, of the split that it was trained on."""

METADATA = "metadata.jsonl"
"""File of a folder of images that has a line ``{"file_name": ..., "prompt": ...}`` for
each sample, as Hugging Face's imagefolder has."""

_LINE = '{"file_name": "a.jpg", "prompt": "What is it?"}'

BATCH = 8
"""Samples that run at once."""

Prompt = tuple[str, list[Image.Image]]
"""A question, and the images that it is about."""


@dataclass(frozen=True)
class Calibration:
    """Calibration prompts.

    Attributes:
        name: The source that the user gave.
        openers: One for each sample: images are opened when they are needed.
    """

    name: str
    openers: Sequence[Callable[[], Prompt]]

    def __len__(self) -> int:
        """How many samples."""
        return len(self.openers)

    def fingerprint(self) -> str:
        """A hash of these prompts and images."""
        return self._looked_at[0]

    def batches(self) -> list[list[int]]:
        """The samples of each batch, the same in all processes.

        A batch is as long as its longest prompt, and images are most of a prompt: the
        prompts of a batch have equally many images, and texts of similar length.
        """
        sizes = self._looked_at[1]
        batches: list[list[int]] = []
        order = sorted(range(len(self)), key=sizes.__getitem__)
        for _, group in itertools.groupby(order, lambda index: sizes[index][0]):
            alike = list(group)
            starts = range(0, len(alike), BATCH)
            batches += [alike[start : start + BATCH] for start in starts]
        return batches

    @functools.cached_property
    def _looked_at(self) -> tuple[str, list[tuple[int, int]]]:
        """The fingerprint, and the numbers of images and letters of each sample."""
        content, sizes = hashlib.sha256(), list[tuple[int, int]]()
        for opener in self.openers:
            text, images = opener()
            sizes.append((len(images), len(text)))
            content.update(f"{len(text)} {text}".encode())
            for image in images:
                content.update(f"{image.size}".encode())
                content.update(image.tobytes())
        return content.hexdigest()[:16], sizes

    def inputs(
        self, processor: ProcessorMixin, samples: Sequence[int], device: torch.device
    ) -> dict[str, Tensor]:
        """Some samples as a model on a device takes them, padded on the left."""
        placeholder = image_token(processor)
        prompts = []
        for index in samples:
            text, images = self.openers[index]()
            prompts.append((text.replace(placeholder, "").strip(), images))
        inputs = batch_inputs(processor, prompts)
        return {name: value.to(device) for name, value in inputs.items()}


def open_calibration(source: str, limit: int) -> Calibration:
    """Find calibration prompts.

    Args:
        source: ``reference``; a folder with images and ``METADATA``; a folder that
            ``datasets`` saved, or the id of a data set on the hub (``owner/name``),
            with columns ``image`` and ``prompt``.
        limit: Samples at most: the first ones.

    Raises:
        InputError: There is no such thing, it has no samples, or one lacks its image
            or prompt.
        MissingDependencyError: A data set needs the package ``datasets``.
    """
    folder = Path(source)
    if source == REFERENCE:
        openers = list(_drawn(limit))
    elif folder.is_dir():
        listed = (folder / METADATA).is_file()
        openers = list(_listed(folder, limit) if listed else _saved(folder, limit))
    elif folder.exists() or source.count("/") != 1 or source[0] in "./~":
        raise _not_data(source, "a file" if folder.exists() else "no such folder")
    else:
        openers = list(_of_hub(source, limit))
    if not openers:
        raise _not_data(source, "no samples")
    return Calibration(source, openers)


def _not_data(source: str, found: str) -> InputError:
    return InputError(
        f"calibration data {source!r}",
        expected=f"a folder with images and {METADATA}, a data set, or {REFERENCE!r}",
        found=found,
        fix=f"A line of {METADATA} is {_LINE}.",
    )


def _drawn(limit: int) -> Iterator[Callable[[], Prompt]]:
    for sample in draw_samples("train", 0, limit):
        images = [Image.fromarray(picture.pixels) for picture in sample.pictures]
        yield functools.partial(_given, sample.questions[0].text, images)


def _listed(folder: Path, limit: int) -> Iterator[Callable[[], Prompt]]:
    lines = (folder / METADATA).read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(filter(str.strip, lines), start=1):
        if number > limit:
            return
        where = f"{folder / METADATA}, line {number}"
        try:
            fields = json.loads(line)
        except json.JSONDecodeError as error:
            raise _not_a_sample(where, error.msg) from error
        if not isinstance(fields, dict):
            raise _not_a_sample(where, type(fields).__name__)
        file, text = _field(where, fields, "file_name"), _field(where, fields, "prompt")
        if not (folder / file).is_file():
            raise _not_a_sample(where, f"no file {file}")
        yield functools.partial(_opened, text, folder / file)


def _field(where: str, fields: Mapping[str, object], name: str) -> str:
    value = fields.get(name)
    if isinstance(value, str) and value:
        return value
    raise _not_a_sample(where, f"no {name}")


def _not_a_sample(where: str, found: str) -> InputError:
    return InputError(
        where,
        expected=f"{_LINE}, one image a sample",
        found=found,
        fix="Correct the line, or take it out.",
    )


def _saved(folder: Path, limit: int) -> Iterator[Callable[[], Prompt]]:
    if not any((folder / f).is_file() for f in ("state.json", "dataset_dict.json")):
        raise _not_data(str(folder), f"a folder without {METADATA}")
    rows = _datasets().load_from_disk(str(folder))
    if isinstance(rows, dict):
        rows = rows.get("train") or next(iter(rows.values()))
    yield from _rows(str(folder), (rows[i] for i in range(min(limit, len(rows)))))


def _of_hub(source: str, limit: int) -> Iterator[Callable[[], Prompt]]:
    datasets = _datasets()
    try:
        rows = datasets.load_dataset(source, split="train", streaming=True)
        yield from _rows(source, rows.take(limit))
    except InputError:
        raise
    except Exception as error:  # many kinds: network, login, formats
        raise _not_data(source, f"{type(error).__name__}: {error}") from error


def _datasets() -> ModuleType:
    found: ModuleType = optional("datasets", "datasets", "a data set", extra="datasets")
    return found


def _rows(
    source: str, rows: Iterator[Mapping[str, object]]
) -> Iterator[Callable[[], Prompt]]:
    for number, row in enumerate(rows, start=1):
        where = f"calibration data {source!r}, row {number}"
        text, image = _field(where, row, "prompt"), row.get("image")
        if not isinstance(image, Image.Image):
            raise _not_a_sample(where, "no image")
        yield functools.partial(_given, text, [as_rgb(image, where)])


def _given(text: str, images: list[Image.Image]) -> Prompt:
    return text, images


def _opened(text: str, file: Path) -> Prompt:
    return text, [open_image(file)]
