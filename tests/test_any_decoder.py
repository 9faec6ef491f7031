"""Any decoder in a LLaVA: what is compiled is the oracle."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, seed, settings
from transformers import LlavaForConditionalGeneration

import vtprune_fx
from tests import zoo
from tests.tiny import Compiled, assert_matches_oracle, recipe_for
from vtprune_fx.errors import InputError

PARTS, EACH = 20, 10
"""200 decoders in all."""

DECODERS = {
    # What sets each apart, and the fields that it needs here.
    "llama": {},
    "mistral": {},
    "qwen2": {},
    "qwen3": {},  # norms of queries and keys
    "gemma": {},  # scaled embeddings, norms that add one
    "olmo2": {},  # norms behind attention and MLP
    "cohere": {},  # attention and MLP side by side, another rotary layout
    "granite": {"residual_multiplier": 0.5, "attention_multiplier": 0.3},
    "starcoder2": {},  # layer norms and biases
    "stablelm": {},  # half of each head rotated
    "phi3": {"resid_pdrop": 0.0},  # one projection for queries, keys and values
}
ROTARY = {
    "default": {},
    "linear": {"factor": 2.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 32},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
}


@st.composite
def configurations(draw: st.DrawFn) -> dict[str, Any]:
    decoder = draw(st.sampled_from(sorted(DECODERS)))
    kind = draw(st.sampled_from(sorted(ROTARY)))
    head_dim = draw(st.sampled_from([8, 16]))
    if decoder in {"starcoder2", "stablelm", "phi3"}:
        kind, head_dim = "default", 8
    rotary: dict[str, Any] = {"rope_type": kind, "rope_theta": 10000.0} | ROTARY[kind]
    if decoder == "stablelm":
        rotary["partial_rotary_factor"] = 0.5
    return {
        "decoder": decoder,
        "num_hidden_layers": 2,
        "num_key_value_heads": draw(st.sampled_from([1, 2, 4])),
        "head_dim": head_dim,
        "attention_bias": draw(st.booleans()),
        "rope_parameters": rotary,
        **DECODERS[decoder],
    }


RECIPES = st.sampled_from(
    [
        recipe_for(2, {0: 2, 1: 3}),
        recipe_for(2, {0: 2, 1: 3}, site="after_layer"),
        recipe_for(2, {0: 3, 1: 2}, site="before_layer", score="last-token"),
    ]
)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(PARTS))
def test_any_decoder_is_the_oracle(part: int) -> None:
    @seed(part)
    @settings(
        max_examples=EACH,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(configurations(), RECIPES)
    def check(fields: dict[str, Any], recipe: Any) -> None:
        torch.compiler.reset()
        model = made(fields)
        prompts: tuple[zoo.Prompt, ...] = ((3, "image", 6), (2, "image", 1))
        inputs = zoo.batch("LLaVA-1.5", model, *prompts)
        compiled = Compiled(model, recipe)
        outputs = compiled(**inputs)
        kept = compiled.recorded.keep_sets
        assert_matches_oracle(outputs, kept, model, recipe, inputs)

    check()


def made(fields: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    config: Any = zoo.llava(**fields)
    model = LlavaForConditionalGeneration(config)
    model.train(mode=False)
    return model


@pytest.mark.parametrize("decoder", ["mistral", "phi3", "starcoder2"])
def test_a_window_is_refused(decoder: str) -> None:
    fields = {"sliding_window": 8, **DECODERS[decoder]}
    model = made({"decoder": decoder, "num_hidden_layers": 2, **fields})
    with pytest.raises(InputError, match="sliding window"):
        vtprune_fx.compile(model, recipe_for(2, {0: 2}), inner="eager")
