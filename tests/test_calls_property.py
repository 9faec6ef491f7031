"""Drawn sequences of calls: each answer is the oracle's, or an error of ours.

One compiled model runs all of a sequence, and a call after an error is as right as one
before it. Legal calls must be answered; others must be refused.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import vtprune_fx
from tests.tiny import CACHE, Inputs, batch, recipe_for, tiny_llava
from vtprune_fx import oracle
from vtprune_fx.errors import InputError
from vtprune_fx.models.arguments import cache_of

LAYERS = 3
RECIPE = recipe_for(LAYERS, {0: 3, 1: 6})
PLAIN = tiny_llava(layers=LAYERS)
"""Never compiled."""
IMAGE = 16
"""Visual tokens of an image."""
NEW = 4
GREEDY = {
    "max_new_tokens": NEW,
    "do_sample": False,
    "eos_token_id": None,
    "pad_token_id": 0,
}


@dataclass
class Session:
    """A model in use, and what drew the calls."""

    model: Any
    draw: random.Random

    def one(self) -> tuple[Inputs, int]:
        """A prompt with images, and its last visual position."""
        before, after = self.draw.randint(1, 4), self.draw.randint(4, 12)
        between = [self.draw.randint(0, 3)] * self.draw.randint(0, 1)
        inputs = batch(PLAIN, (before, *between, after), seed=self.draw.randrange(99))
        last = inputs["input_ids"].shape[1] - after - 1
        return inputs, last

    def several(self) -> Inputs:
        """Prompts with images, and of text alone, padded before them."""
        number = self.draw.randint
        rows: list[tuple[int, ...]] = [
            (number(0, 4), number(2, 8)) for _ in range(number(2, 3))
        ]
        if self.draw.random() < 0.3:
            rows.append((number(1, 4),))
        return batch(PLAIN, *rows, seed=self.draw.randrange(99))

    def answer(self, inputs: Inputs, **options: Any) -> list[list[int]]:
        ids: Tensor = self.model.generate(**inputs, **GREEDY | options)
        return ids[:, inputs["input_ids"].shape[1] :].tolist()


def by_oracle(inputs: Inputs) -> list[list[int]]:
    positions = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    samples = oracle.split_batch(PLAIN, **inputs, position_ids=positions)
    return [oracle.generate(PLAIN, RECIPE, sample, NEW) for sample in samples]


# ------------------------------------------------------------------------- legal calls


def greedy(session: Session) -> None:
    inputs, _ = session.one()
    assert session.answer(inputs) == by_oracle(inputs)


def padded(session: Session) -> None:
    inputs = session.several()
    assert session.answer(inputs) == by_oracle(inputs)


def static(session: Session) -> None:
    inputs, _ = session.one()
    found = session.answer(inputs, cache_implementation="static")
    assert found == by_oracle(inputs)


def text_alone(session: Session) -> None:
    inputs = batch(PLAIN, (session.draw.randint(2, 9),), seed=3)
    assert session.answer(inputs) == by_oracle(inputs)


def assisted(session: Session) -> None:
    inputs, _ = session.one()
    helper = tiny_llava(layers=LAYERS + 1)
    assert session.answer(inputs, assistant_model=helper) == by_oracle(inputs)


def looked_up(session: Session) -> None:
    inputs, last = session.one()
    words = inputs["input_ids"][:, last + 1 :]
    words[:, -2:] = words[:, :2]
    found = session.answer(inputs, prompt_lookup_num_tokens=session.draw.randint(1, 4))
    assert found == by_oracle(inputs)


def positions_of_logits(session: Session) -> None:
    inputs, last = session.one()
    length = inputs["input_ids"].shape[1]
    asked = [session.draw.randint(last + 1, length - 1) for _ in range(3)]
    with torch.no_grad():
        every = session.model(**inputs).logits
        found = session.model(**inputs, logits_to_keep=torch.tensor(asked)).logits
    expected = every[:, [place - length for place in asked]]
    torch.testing.assert_close(found, expected)


def without_a_cache(session: Session) -> None:
    inputs, _ = session.one()
    with torch.no_grad():
        found = session.model(**inputs, use_cache=False)
        assert cache_of(found) is None
        torch.testing.assert_close(found.logits, session.model(**inputs).logits)


def cropped(session: Session) -> None:
    """Back to before the image, and other words after that."""
    inputs, last = session.one()
    images = inputs["input_ids"][0].eq(99).nonzero()
    first = int(images[0])
    left = session.draw.randint(1, first)
    words = torch.randint(1, 90, (1, 4))
    ids = torch.cat([inputs["input_ids"][:, :left], words], dim=1)
    expected = by_oracle({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    assert last >= first
    assert continued(session.model, inputs, left, ids) == expected


def cropped_after(session: Session) -> None:
    """Back to after the last image, as when an answer is taken back."""
    inputs, _ = session.one()
    length = inputs["input_ids"].shape[1]
    ids = torch.cat([inputs["input_ids"], torch.randint(1, 90, (1, 3))], dim=1)
    with torch.no_grad():
        cache = cache_of(session.model(**inputs))
    expected = session.answer(
        {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, **{CACHE: cache}
    )
    assert continued(session.model, inputs, length, ids) == expected


def continued(model: Any, inputs: Inputs, left: int, ids: Tensor) -> list[list[int]]:
    """The answer on a cache that was filled by an answer, then cropped."""
    out = model.generate(**inputs, **GREEDY, return_dict_in_generate=True)
    cache = cache_of(out)
    cache.crop(left - int(cache.get_seq_length()))
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), CACHE: cache}
    found: Tensor = model.generate(**given, **GREEDY)
    return found[:, ids.shape[1] :].tolist()


def copied(session: Session) -> None:
    """The sequence goes on with a copy."""
    session.model = copy.deepcopy(session.model)
    greedy(session)


def taken_back(session: Session) -> None:
    """Undone, run without pruning, and compiled again."""
    inputs, _ = session.one()
    vtprune_fx.undo(session.model)
    dense: Tensor = PLAIN.generate(**inputs, **GREEDY)
    start = inputs["input_ids"].shape[1]
    assert session.answer(inputs) == dense[:, start:].tolist()
    vtprune_fx.compile(session.model, RECIPE, inner="eager")
    greedy(session)


# --------------------------------------------------------------------- what is refused


def refused(call: Callable[[], object]) -> None:
    with pytest.raises(InputError):
        call()


def padded_after(session: Session) -> None:
    inputs = batch(PLAIN, (2, 8), (1, 2))
    mask = inputs["attention_mask"].flip(1)
    refused(lambda: session.answer(inputs | {"attention_mask": mask}))


def more_images(session: Session) -> None:
    inputs, _ = session.one()
    pixels = inputs["pixel_values"].repeat(2, 1, 1, 1)
    refused(lambda: session.answer(inputs | {"pixel_values": pixels}))


def no_place(session: Session) -> None:
    pixels = session.one()[0]["pixel_values"]
    words = batch(PLAIN, (6,))
    refused(lambda: session.answer(words | {"pixel_values": pixels}))


def labelled(session: Session) -> None:
    inputs, _ = session.one()
    refused(lambda: session.model(**inputs, labels=inputs["input_ids"]))


def packed(session: Session) -> None:
    inputs, _ = session.one()
    positions = torch.arange(inputs["input_ids"].shape[1])[None] % 10
    refused(lambda: session.model(**inputs, position_ids=positions))


def in_chunks(session: Session) -> None:
    inputs, _ = session.one()
    refused(lambda: session.answer(inputs, prefill_chunk_size=8))


def into_the_image(session: Session) -> None:
    inputs, last = session.one()
    refused(lambda: continued(session.model, inputs, last, inputs["input_ids"]))


def misspelt(session: Session) -> None:
    inputs, _ = session.one()
    refused(lambda: session.model(**inputs, logit_to_keep=1))


LEGAL: list[Callable[[Session], None]] = [
    *(greedy, padded, static, text_alone, assisted, looked_up, positions_of_logits),
    *(without_a_cache, cropped, cropped_after),
]
RARE: list[Callable[[Session], None]] = [copied, taken_back]
"""Graphs are compiled anew after each."""
REFUSED: list[Callable[[Session], None]] = [
    *(padded_after, more_images, no_place, labelled, packed, in_chunks),
    *(into_the_image, misspelt),
]


def run(sequences: int, seed: int) -> None:
    torch.compiler.reset()
    draw = random.Random(seed)
    session = Session(tiny_llava.__wrapped__(layers=LAYERS), draw)
    vtprune_fx.compile(session.model, RECIPE, inner="eager")
    for number in range(sequences):
        calls = draw.choices([*LEGAL, *REFUSED], k=draw.randint(2, 5))
        if draw.random() < 0.04:
            calls.insert(draw.randrange(len(calls)), draw.choice(RARE))
        for at, call in enumerate([*calls, greedy]):
            names = [each.__name__ for each in calls[: at + 1]]
            try:
                call(session)
            except BaseException as error:
                error.add_note(f"in sequence {number} of seed {seed}: {names}")
                raise
    torch.compiler.reset()


def test_a_few_sequences_of_calls() -> None:
    run(15, seed=1)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [2, 3, 4])
def test_many_sequences_of_calls(seed: int) -> None:
    run(100, seed)
