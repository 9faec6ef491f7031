"""Batches to train on: many questions a picture, each as if it were the only one.

A row holds its pictures once and several questions after them. A question attends to
the pictures and to itself, and its positions count from the pictures on: to the model
each is the first and only turn of a conversation, as it is when it is asked later, for
a small part of the cost of encoding the pictures for every question anew.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import IterableDataset
from transformers import PreTrainedTokenizerFast

from examples.reference_model.model import PATCH, VISUAL_TOKENS
from vtprune_fx.reference.pictures import (
    COLOURS,
    DIGITS,
    SHAPES,
    SIDE,
    Picture,
    Thing,
)
from vtprune_fx.reference.questions import (
    TWO_PICTURES,
    Question,
    Sample,
    draw_sample,
)
from vtprune_fx.reference.tokenizer import IMAGE_ID, PAD_ID

QUESTIONS = 14
"""Questions asked of a row's pictures; as many as fit are used."""
TEXT = 256
"""Tokens that a row has for them."""

EASY = {150: (1, 2), 300: (1, 3), 600: (2, 5)}
"""Before these steps, pictures hold so many things instead of the usual crowd.

With one thing in a picture, looking anywhere answers the question; from there the model
learns where to look.
"""

MANY = (6, 10)
"""Things in a picture whose patches are learnt: more than when asked about."""

IGNORED = -100
"""Label of a position that no loss looks at."""

PREFIX = 0
"""Turn of the pictures and what stands before and between them."""
PADDING = -1

HIDE_FROM = 7600
"""From this step on patches are hidden that an answer does not need.

No answer may rest on how many there are: a count, read off as a share of attention,
would grow with each patch that is pruned. Training without some of the patches is
common (FLIP, arXiv:2212.00794).
"""

HIDDEN_PICTURES, HIDDEN_GROUND, HIDDEN_RIMS = 0.9, 0.9, 0.5
"""In this share of pictures, up to these shares of the background and of shapes."""

HIDDEN_THINGS, ALONE = 0.9, 0.3
"""Up to this share of the things that a question is not about; and in this share of
questions everything: pruned deep, little but what was asked for is left."""


@dataclass(frozen=True)
class Batch:
    """Rows of one number of pictures.

    Attributes:
        pixels: [rows * pictures, SIDE, SIDE, 3] uint8.
        ids: [rows, S].
        positions: [rows, S].
        turns: [rows, S]; ``PREFIX``, 1 for the first question, ..., or ``PADDING``.
        labels: [rows, S]; the token that comes next, or ``IGNORED``.
        hidden: [rows, 1 + QUESTIONS, S] bool: what each turn does not attend to.
    """

    pixels: Tensor
    ids: Tensor
    positions: Tensor
    turns: Tensor
    labels: Tensor
    hidden: Tensor

    def attention_mask(self) -> Tensor:
        """[rows, 1, S, S] bool: who attends to whom."""
        query, key = self.turns[:, :, None], self.turns[:, None, :]
        order = torch.arange(self.ids.shape[1], device=self.ids.device)
        causal = order[:, None] >= order
        rows = torch.arange(len(self.turns), device=self.ids.device)[:, None]
        shown = ~self.hidden[rows, self.turns.clamp(min=PREFIX)]
        return (causal & shown & ((key == PREFIX) | (key == query)))[:, None]


class QuestionBatches(IterableDataset[Batch]):
    """One batch a step, each drawn from the seed and the number of its step.

    Args:
        tokenizer: The model's.
        seed: Seed of all batches.
        steps: First, and one after the last.
        rows: Rows of a batch with one picture each; half as many with two.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerFast, seed: int, steps: range, rows: int
    ) -> None:
        self.tokenizer, self.seed, self.steps, self.rows = tokenizer, seed, steps, rows

    def __iter__(self) -> Iterator[Batch]:
        for step in _own_share(self.steps):
            rng = np.random.default_rng((10, self.seed, step))
            pictures = 2 if rng.random() < TWO_PICTURES else 1
            things = next((EASY[end] for end in EASY if step < end), None)
            samples = [
                draw_sample(rng, "train", pictures, QUESTIONS, things)
                for _ in range(self.rows // pictures)
            ]
            rows = [_row(self.tokenizer, sample) for sample in samples]
            hidden = np.zeros((len(rows), 1 + QUESTIONS, len(rows[0][0])), dtype=bool)
            if step >= HIDE_FROM:
                images = np.array(rows[0][0]) == IMAGE_ID
                for row, sample in zip(hidden, samples, strict=True):
                    row[:, images] = hidden_patches(rng, sample)
            yield _collate(rows, hidden, samples)


Row = tuple[list[int], list[int], list[int], list[int]]
"""Ids, positions, turns and labels."""


def _row(tokenizer: PreTrainedTokenizerFast, sample: Sample) -> Row:
    image = [IMAGE_ID] * VISUAL_TOKENS
    ids = [*_ids(tokenizer, "<s>USER: ")]
    for _ in sample.pictures:
        ids += [*image, *_ids(tokenizer, "\n")]
    length, start = len(ids) + TEXT, len(ids)
    positions, turns = [*range(start)], [PREFIX] * start
    labels = [IGNORED] * start
    for turn, question in enumerate(sample.questions, start=1):
        asked = _ids(tokenizer, f"{question.text} ASSISTANT:")
        said = _ids(tokenizer, f" {question.answer}</s>")
        new = len(asked) + len(said)
        if len(ids) + new > length:
            break
        ids += asked + said
        positions += range(start, start + new)
        turns += [turn] * new
        labels += [IGNORED] * (len(asked) - 1) + said + [IGNORED]
    spare = length - len(ids)
    return (
        ids + [PAD_ID] * spare,
        positions + [0] * spare,
        turns + [PADDING] * spare,
        labels + [IGNORED] * spare,
    )


def hidden_patches(rng: np.random.Generator, sample: Sample) -> NDArray[np.bool_]:
    """[1 + QUESTIONS, patches of all pictures]: what each turn shall not attend to.

    For all turns alike, background and rims of shapes: no digits, no middle of a
    shape. For each question, things that it is not about, or all but those that it is.
    """
    pictures = sample.pictures
    ground = np.concatenate([_hidden_ground(rng, picture) for picture in pictures])
    hidden = np.tile(ground, (1 + QUESTIONS, 1))
    for turn, question in enumerate(sample.questions, start=1):
        things = [_hidden_things(rng, picture, question) for picture in pictures]
        hidden[turn] |= np.concatenate(things)
    return hidden


def _hidden_ground(rng: np.random.Generator, picture: Picture) -> NDArray[np.bool_]:
    shares = np.zeros(VISUAL_TOKENS)
    if rng.random() < HIDDEN_PICTURES:
        noun, _, _, middle, *_ = _patch_labels(picture)
        shares[noun == 0] = rng.uniform(0, HIDDEN_GROUND)
        rims = (noun > 0) & (noun <= len(SHAPES)) & (middle == 0)
        shares[rims] = rng.uniform(0, HIDDEN_RIMS)
    return rng.random(VISUAL_TOKENS) < shares


def _hidden_things(
    rng: np.random.Generator, picture: Picture, question: Question
) -> NDArray[np.bool_]:
    share, alone = rng.uniform(0, HIDDEN_THINGS), rng.random() < ALONE
    hidden, needed = np.zeros((2, VISUAL_TOKENS), dtype=bool)
    for thing in picture.things:
        if thing in question.about:
            needed |= _patches_of(thing)
        elif rng.random() < share:
            hidden |= _patches_of(thing)
    return (hidden | alone) & ~needed


def _ids(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def _collate(
    rows: list[Row], hidden: NDArray[np.bool_], samples: list[Sample]
) -> Batch:
    drawn = [picture.pixels for sample in samples for picture in sample.pictures]
    pixels = torch.from_numpy(np.stack(drawn))
    ids, positions, turns, labels = map(torch.tensor, zip(*rows, strict=True))
    return Batch(pixels, ids, positions, turns, labels, torch.from_numpy(hidden))


NOUNS = ("background", *SHAPES, *DIGITS)


@dataclass(frozen=True)
class PatchBatch:
    """Pictures with what every patch of them shows.

    Attributes:
        pixels: [n, SIDE, SIDE, 3] uint8.
        nouns: [n, VISUAL_TOKENS] index into ``NOUNS``.
        colours: [n, VISUAL_TOKENS] index into ``COLOURS``, ``IGNORED`` on background.
        sizes: [n, VISUAL_TOKENS] 1 where large, 0 small, ``IGNORED`` on background.
        centres: [n, VISUAL_TOKENS] 1 where the centre of a thing lies, else 0.
        rows: [n, VISUAL_TOKENS] the patch's row.
        columns: [n, VISUAL_TOKENS] its column.
    """

    pixels: Tensor
    nouns: Tensor
    colours: Tensor
    sizes: Tensor
    centres: Tensor
    rows: Tensor
    columns: Tensor


class PatchBatches(IterableDataset[PatchBatch]):
    """One batch of labelled patches a step.

    Args:
        seed: Seed of all batches.
        steps: First, and one after the last.
        rows: Pictures in a batch.
    """

    def __init__(self, seed: int, steps: range, rows: int) -> None:
        self.seed, self.steps, self.rows = seed, steps, rows

    def __iter__(self) -> Iterator[PatchBatch]:
        for step in _own_share(self.steps):
            rng = np.random.default_rng((11, self.seed, step))
            samples = [draw_sample(rng, "train", 1, 1, MANY) for _ in range(self.rows)]
            pictures = [sample.pictures[0] for sample in samples]
            labels = np.stack([_patch_labels(picture) for picture in pictures], axis=1)
            pixels = np.stack([picture.pixels for picture in pictures])
            yield PatchBatch(torch.from_numpy(pixels), *torch.from_numpy(labels))


def _patch_labels(picture: Picture) -> NDArray[np.int64]:
    """[6, VISUAL_TOKENS]: noun, colour, size, centre, row and column of each patch."""
    side = SIDE // PATCH
    labels = np.full((6, side * side), IGNORED)
    labels[[0, 3]] = 0
    labels[4:] = np.mgrid[:side, :side].reshape(2, -1)
    for thing in picture.things:
        shown = _patches_of(thing)
        what = (
            NOUNS.index(thing.noun),
            list(COLOURS).index(thing.colour),
            int(thing.size == "large"),
        )
        for label, value in zip(labels, what, strict=False):
            label[shown] = value
        labels[3, int(thing.y // PATCH) * side + int(thing.x // PATCH)] = 1
    return labels


def _patches_of(thing: Thing) -> NDArray[np.bool_]:
    """[VISUAL_TOKENS]: the patches that show a part of a thing."""
    middle = (np.arange(SIDE // PATCH) + 0.5) * PATCH
    far = np.hypot(middle[None, :] - thing.x, middle[:, None] - thing.y)
    shown: NDArray[np.bool_] = far < thing.radius + 0.3 * PATCH
    return shown.ravel()


def _own_share(steps: range) -> range:
    """The steps that this worker process draws: every n-th of them."""
    worker = torch.utils.data.get_worker_info()
    return steps if worker is None else steps[worker.id :: worker.num_workers]
