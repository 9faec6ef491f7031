"""An image in a later turn, on a cache that an answer filled, in every family.

Expected values are what transformers gives without pruning.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import vtprune_fx
from tests import zoo
from tests.tiny import CACHE, recipe_for
from vtprune_fx.errors import InputError
from vtprune_fx.models.arguments import cache_of

REFUSED = {"Gemma 3", "Qwen2-VL", "Qwen2.5-VL", "Qwen3-VL"}
"""Images attend both ways, or are counted along three axes."""
NOTHING = recipe_for(zoo.LAYERS, {})
"""Drops no token, so that a compiled model answers as a plain one."""
OPTIONS: dict[str, Any] = {
    "max_new_tokens": 3,
    "do_sample": False,
    "eos_token_id": None,
    "pad_token_id": 0,
    "return_dict_in_generate": True,
    "output_logits": True,
}


def two_turns(name: str, model: Any, images: int = 1) -> Tensor:
    """Logits of the answer to a second turn, [new, vocabulary]."""
    first = zoo.batch(name, model, (3, "image", 4))
    then = zoo.batch(name, model, (2, "image", 5), seed=3)
    if images == 2:
        then["pixel_values"] = torch.cat([then["pixel_values"]] * 2)
    made = model.generate(**first, **OPTIONS)
    ids = torch.cat([made.sequences, then["input_ids"]], dim=1)
    types = {
        key: torch.cat([first[key], torch.zeros(1, 3, dtype=value.dtype), value], dim=1)
        for key, value in then.items()
        if key == "token_type_ids"
    }
    given = then | types | {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    again = model.generate(**given, **{CACHE: cache_of(made)}, **OPTIONS)
    return torch.stack([logits[0] for logits in again.logits])


def compiled(name: str, recipe: Any = NOTHING) -> Any:
    torch.compiler.reset()
    return vtprune_fx.compile(zoo.tiny(name), recipe, inner="eager")


@pytest.mark.parametrize("name", sorted(zoo.ZOO.keys() - REFUSED))
def test_an_image_in_a_later_turn_is_seen_as_by_the_plain_model(name: str) -> None:
    expected = two_turns(name, zoo.tiny(name))
    found = two_turns(name, compiled(name))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def test_more_images_than_places_in_a_later_turn_are_refused() -> None:
    model = compiled("LLaVA-1.5")
    with pytest.raises(InputError, match="18 features for 9 placeholders"):
        two_turns("LLaVA-1.5", model, images=2)
    expected = two_turns("LLaVA-1.5", zoo.tiny("LLaVA-1.5"))
    torch.testing.assert_close(two_turns("LLaVA-1.5", model), expected)


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_a_later_image_that_needs_what_came_before_is_refused(name: str) -> None:
    model = compiled(name)
    first = zoo.batch(name, model, (3, "image", 4))
    then = zoo.batch(name, model, (2, "image", 5), seed=3)
    with torch.no_grad():
        cache = cache_of(model(**first))
        then["attention_mask"] = torch.ones(1, int(cache.get_seq_length()) + 1)
        with pytest.raises(InputError, match="Start from an empty cache"):
            model(**then, **{CACHE: cache})
