"""Decoders other than Llama inside a LLaVA: nothing is known of a model by name."""

from __future__ import annotations

from typing import Any

import pytest
from torch._dynamo.exc import BackendCompilerFailed

import vtprune_fx
from tests.tiny import (
    Compiled,
    assert_matches_oracle,
    batch,
    counted_positions,
    recipe_for,
    tiny_llava,
)
from vtprune_fx import oracle, prune
from vtprune_fx.errors import InputError

DECODERS = ("llama", "mistral", "qwen2", "gemma")
RECIPE = recipe_for(2, {0: 3, 1: 5})
PROMPTS = ((3, 6), (2, 0, 9))


def some_slow(*slow: str) -> list[Any]:
    """Decoders; what a slow one shows, other tests show too."""
    marks = pytest.mark.slow
    return [pytest.param(d, marks=marks) if d in slow else d for d in DECODERS]


@pytest.mark.parametrize("kv_heads", [pytest.param(1, marks=pytest.mark.slow), 2])
@pytest.mark.parametrize("decoder", some_slow("llama"))
def test_compiled_is_the_oracle(decoder: str, kv_heads: int) -> None:
    model = tiny_llava(layers=2, kv_heads=kv_heads, decoder=decoder)
    inputs = batch(model, *PROMPTS)
    compiled = Compiled(model, RECIPE)
    outputs = compiled(**inputs)
    kept = compiled.recorded.keep_sets
    assert_matches_oracle(outputs, kept, model, RECIPE, inputs)


@pytest.mark.parametrize("decoder", some_slow("mistral"))
def test_exported_is_the_oracle(decoder: str) -> None:
    model = tiny_llava(layers=2, kv_heads=2, decoder=decoder)
    inputs = batch(model, *PROMPTS)
    pruned = prune(model, inputs, RECIPE)
    outputs, kept = pruned(**inputs), pruned.keep_sets(**inputs)
    assert_matches_oracle(outputs, kept, model, RECIPE, inputs)


@pytest.mark.parametrize("decoder", some_slow("llama", "mistral"))
def test_generates_like_the_oracle(decoder: str) -> None:
    model: Any = tiny_llava.__wrapped__(layers=2, kv_heads=2, decoder=decoder)
    inputs = batch(model, (3, 6), (2, 0, 9), (5,))
    samples = oracle.split_batch(
        model, **inputs, position_ids=counted_positions(inputs)
    )
    expected = [oracle.generate(model, RECIPE, sample, 8) for sample in samples]
    vtprune_fx.compile(model, RECIPE, inner="eager")
    ids = model.generate(**inputs, max_new_tokens=8, do_sample=False, eos_token_id=None)
    assert ids[:, inputs["input_ids"].shape[1] :].tolist() == expected


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_the_backend_refuses_a_sliding_window(implementation: str) -> None:
    model: Any = tiny_llava.__wrapped__(layers=2, kv_heads=2, decoder="mistral")
    model.config.text_config.sliding_window = 64
    model.set_attn_implementation(implementation)
    with pytest.raises(BackendCompilerFailed, match="sliding_window = None"):
        Compiled(model, RECIPE)(**batch(model, *PROMPTS))


def test_a_sliding_window_is_refused() -> None:
    model: Any = tiny_llava.__wrapped__(layers=2, decoder="mistral")
    model.config.text_config.sliding_window = 64
    with pytest.raises(InputError, match="sliding_window = None"):
        vtprune_fx.compile(model, RECIPE, inner="eager")
    assert "forward" not in vars(model)
