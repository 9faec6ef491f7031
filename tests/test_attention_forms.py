"""Attention as graphs show it: fused, written out, grouped heads, half precision."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._dynamo.exc import BackendCompilerFailed

from tests.tiny import (
    Compiled,
    assert_matches_oracle,
    batch,
    recipe_for,
    tiny_llava,
)
from vtprune_fx import oracle, prune, vtprune_backend
from vtprune_fx.errors import CaptureError

RECIPE = recipe_for(2, {0: 3, 1: 5})
PROMPTS = ((3, 6), (2, 9))


@pytest.mark.parametrize("kv_heads", [2, 4])
def test_eager_attention_compiled_is_the_oracle(kv_heads: int) -> None:
    model = tiny_llava(layers=2, kv_heads=kv_heads, attention="eager")
    inputs, compiled = batch(model, *PROMPTS), Compiled(model, RECIPE)
    outputs = compiled(**inputs)
    assert_matches_oracle(outputs, compiled.recorded.keep_sets, model, RECIPE, inputs)


def test_eager_attention_exported_is_the_oracle() -> None:
    model = tiny_llava(layers=2, attention="eager")
    inputs = batch(model, *PROMPTS)
    pruned = prune(model, inputs, RECIPE)
    outputs, kept = pruned(**inputs), pruned.keep_sets(**inputs)
    assert_matches_oracle(outputs, kept, model, RECIPE, inputs)


def test_flex_attention_is_refused_with_the_setting_to_change() -> None:
    model = tiny_llava.__wrapped__(layers=2, attention="flex_attention")
    inputs = batch(model, (3, 6))
    with pytest.raises(CaptureError, match="attn_implementation='sdpa'"):
        prune(model, inputs, RECIPE)
    told: dict[str, Any] = {"recipe": RECIPE, "inner": "eager"}
    compiled = torch.compile(model, backend=vtprune_backend, options=told)
    with (
        torch.no_grad(),
        pytest.raises(BackendCompilerFailed, match="attn_implementation='sdpa'"),
    ):
        compiled(**inputs)


@pytest.mark.parametrize(
    ("dtype", "attention"),
    [
        (torch.bfloat16, "sdpa"),
        (torch.float16, "eager"),
        pytest.param(torch.bfloat16, "eager", marks=pytest.mark.slow),
        pytest.param(torch.float16, "sdpa", marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_half_precision_keeps_what_the_oracle_keeps(
    dtype: torch.dtype, attention: str
) -> None:
    model: Any = tiny_llava.__wrapped__(layers=2, attention=attention)
    model.to(dtype)
    inputs = batch(model, *PROMPTS)
    inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
    compiled = Compiled(model, RECIPE)
    compiled(**inputs)
    for row, sample in enumerate(oracle.split_batch(model, **inputs)):
        expected = oracle.prefill(model, RECIPE, sample).kept
        padding = inputs["input_ids"].shape[1] - len(sample.input_ids)
        for layer, positions in compiled.recorded.keep_sets.items():
            kept = (positions[row] - padding).tolist()
            assert [k for k in kept if k >= 0] == expected[layer].tolist()
