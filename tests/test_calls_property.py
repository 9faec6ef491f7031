"""Sequences of calls as people make them: each answer is right, or refused.

Right is what the oracle says, or transformers without pruning where nothing is pruned.
After a call that was refused, an ordinary prompt is answered rightly.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vtprune_fx
from tests.tiny import (
    CACHE,
    IMAGE,
    Inputs,
    batch,
    cache_lengths,
    counted_positions,
    recipe_for,
    tiny_llava,
)
from vtprune_fx import oracle
from vtprune_fx.errors import VtpruneError
from vtprune_fx.models.arguments import cache_of

RECIPE = recipe_for(3, {0: 3, 1: 6})
PLAIN = tiny_llava(layers=3)
"""Never compiled."""
CALLS, NEW = 4, 4
OPTIONS: dict[str, Any] = {
    "max_new_tokens": NEW,
    "do_sample": False,
    "eos_token_id": None,
    "pad_token_id": 0,
}


class Wrapper(nn.Module):
    """A module around a model, as adapters are."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner = inner

    def get_base_model(self) -> Any:
        """What is wrapped."""
        return self.inner

    def generate(self, **inputs: Any) -> Any:
        """The inner model's answer."""
        return self.inner.generate(**inputs)


@pytest.fixture(scope="module")
def models() -> Iterator[list[Any]]:
    """A compiled model, a compiled copy of it, and one that is wrapped."""
    torch.compiler.reset()
    fresh = tiny_llava.__wrapped__
    model = vtprune_fx.compile(fresh(layers=3), RECIPE, inner="eager")
    wrapped = vtprune_fx.compile(Wrapper(fresh(layers=3)), RECIPE, inner="eager")
    yield [model, copy.deepcopy(model), wrapped]
    torch.compiler.reset()


def right(inputs: Inputs) -> list[list[int]]:
    """The oracle's answer to each prompt."""
    positions = counted_positions(inputs)
    samples = oracle.split_batch(PLAIN, **inputs, position_ids=positions)
    return [oracle.generate(PLAIN, RECIPE, sample, NEW) for sample in samples]


def said(model: Any, inputs: Inputs, **options: Any) -> list[list[int]]:
    ids: Tensor = model.generate(**inputs, **OPTIONS | options)
    return ids[:, inputs["input_ids"].shape[1] :].tolist()


def one(draw: random.Random) -> Inputs:
    texts = (draw.randint(1, 5), draw.randint(2, 12))
    return batch(PLAIN, texts, seed=draw.randint(0, 99))


def inner(model: Any) -> Any:
    return model.inner if isinstance(model, Wrapper) else model


# ------------------------------------------------------------------------- the calls


def a_prompt(model: Any, draw: random.Random) -> None:
    inputs = one(draw)
    assert said(model, inputs) == right(inputs)


def a_batch(model: Any, draw: random.Random) -> None:
    """Any numbers of images; text by itself may be too long to be beside them."""
    images = [draw.choice([0, 1, 1, 2]) for _ in range(draw.randint(2, 3))]
    prompts = [[draw.randint(1, 9) for _ in range(n + 1)] for n in images]
    inputs = batch(PLAIN, *prompts, seed=draw.randint(0, 99))
    assert said(model, inputs) == right(inputs)


def an_assistant(model: Any, draw: random.Random) -> None:
    inputs = one(draw)
    assert said(model, inputs, assistant_model=PLAIN) == right(inputs)


def a_lookup(model: Any, draw: random.Random) -> None:
    inputs = one(draw)
    assert said(model, inputs, prompt_lookup_num_tokens=3) == right(inputs)


def a_kept_position(model: Any, draw: random.Random) -> None:
    inputs = one(draw)
    length = inputs["input_ids"].shape[1]
    at = draw.randint(0, length - 1)
    with torch.no_grad():
        every = inner(model)(**inputs).logits
        kept = inner(model)(**inputs, logits_to_keep=torch.tensor([at])).logits
    torch.testing.assert_close(kept[0, 0], every[0, at - length])


def a_crop(model: Any, draw: random.Random) -> None:
    """To any length: before the image it is transformers', in it there is none."""
    inputs = one(draw)
    length = inputs["input_ids"].shape[1]
    left = draw.randint(1, length - 1)
    caches = []
    with torch.no_grad():
        for each in (inner(model), PLAIN):
            caches.append(cache_of(each(**inputs)))
            caches[-1].crop(left - length)
    assert int(caches[0].get_seq_length()) == left
    ids = torch.cat([inputs["input_ids"][:, :left], torch.tensor([[7, 8]])], dim=1)
    if IMAGE in ids:
        # The same question, asked at once: words after an image change no choice.
        complete = inputs | _words(ids)
        assert said(model, complete) == right(complete)
        return
    found = said(model, _words(ids), **{CACHE: caches[0]})
    assert found == said(PLAIN, _words(ids), **{CACHE: caches[1]})


def _words(ids: Tensor) -> Inputs:
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def words(model: Any, draw: random.Random) -> None:
    inputs = batch(PLAIN, (draw.randint(2, 9),), seed=draw.randint(0, 99))
    assert said(model, inputs) == said(PLAIN, inputs)


def a_bad_prompt(model: Any, draw: random.Random) -> None:
    """Nothing but an error of ours is right."""
    inputs = one(draw)
    pixels = inputs["pixel_values"]
    kind = draw.randint(0, 4)
    if kind == 0:
        inputs["pixel_values"] = pixels.repeat(2, 1, 1, 1)
    elif kind == 1:
        inputs = batch(PLAIN, (3, 6), (3, 2))
        inputs["attention_mask"] = inputs["attention_mask"].flip(1)
    elif kind == 2:
        inputs = _words(torch.tensor([[5, IMAGE, 7, 8, *range(20, 40)]]))
        inputs["pixel_values"] = pixels
    elif kind == 3:
        inputs = batch(PLAIN, (5,)) | {"pixel_values": pixels}
    options = {"prefill_chunk_size": 8} if kind == 4 else {}
    said(model, inputs, **options)
    pytest.fail(f"answered a prompt of kind {kind}")


PLAIN_CALLS: list[Callable[[Any, random.Random], None]] = [
    a_prompt,
    a_batch,
    an_assistant,
    a_lookup,
    a_kept_position,
    a_crop,
    words,
    a_bad_prompt,
]
ALWAYS_ANSWERED = {a_prompt, an_assistant, a_lookup, words}
"""Calls that are never refused."""


def sequence(models: list[Any], seed: int) -> None:
    draw = random.Random(seed)
    model = draw.choice(models)
    for _ in range(CALLS):
        call = draw.choice(PLAIN_CALLS)
        try:
            call(model, draw)
        except VtpruneError:
            assert call not in ALWAYS_ANSWERED, call.__name__
            a_prompt(model, draw)
    with torch.no_grad():
        held = cache_lengths(inner(model)(**batch(PLAIN, (3, 6))))
    assert held == [25, 22, 16]


@pytest.mark.parametrize("seed", range(25))
def test_calls_are_right_or_refused(models: list[Any], seed: int) -> None:
    sequence(models, seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(25, 325))
def test_more_calls_are_right_or_refused(models: list[Any], seed: int) -> None:
    sequence(models, seed)
