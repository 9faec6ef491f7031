"""Attention on ragged caches, and a model that is given back as it was."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tests.tiny import recipe_for, tiny_llava
from vtprune_fx.generation.compile import pruned
from vtprune_fx.models.ragged_attention import (
    ATTENTION,
    attention_implementation,
    ragged_sdpa,
)

HEADS, KEYS, WIDTH = 2, 5, 4


def drawn(queries: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    query = torch.randn(1, HEADS, queries, WIDTH)
    key, value = torch.randn(2, 1, HEADS, KEYS, WIDTH)
    return query, key, value


def test_a_longer_mask_is_cropped_behind_its_padding() -> None:
    query, key, value = drawn(1)
    # Two padding tokens in front; the mask is as long as a cache that lost none.
    mask = torch.tensor([0, 0, 1, 1, 1, 1, 1, 1]).bool()[None, None, None]
    found, _ = ragged_sdpa(nn.Module(), query, key, value, mask)
    logits = query @ key[:, :, 2:].transpose(2, 3) / WIDTH**0.5
    expected = (logits.softmax(-1) @ value[:, :, 2:]).transpose(1, 2)
    torch.testing.assert_close(found, expected)


def test_a_second_prompt_on_a_pruned_cache_sees_itself_causally() -> None:
    query, key, value = drawn(3)
    # Two of four cached tokens are left, the first of them padding; three are new.
    whole = torch.ones(3, 7, dtype=torch.bool).tril(diagonal=4)
    whole[:, 0] = False
    found, _ = ragged_sdpa(nn.Module(), query, key, value, whole[None, None])
    attended = torch.tensor([[0, 1, 1, 0, 0], [0, 1, 1, 1, 0], [0, 1, 1, 1, 1]]).bool()
    logits = (query @ key.transpose(2, 3) / WIDTH**0.5).masked_fill(~attended, -1e9)
    expected = (logits.softmax(-1) @ value).transpose(1, 2)
    torch.testing.assert_close(found, expected)


def test_the_attention_of_a_model_is_given_back() -> None:
    model = tiny_llava(layers=2)
    config: Any = model.config
    with attention_implementation(model, ATTENTION):
        assert config.text_config._attn_implementation == ATTENTION
        assert config.vision_config._attn_implementation == "sdpa"
    assert config.text_config._attn_implementation == "sdpa"


def test_the_forward_of_a_model_is_given_back() -> None:
    # A model of its own: transformers' exporter leaves a forward on those it exported.
    model = tiny_llava.__wrapped__(layers=2)
    before = model.forward
    with pruned(model, recipe_for(2, {0: 1}), "eager"):
        assert model.forward != before
    assert model.forward == before
    assert "forward" not in vars(model)
