"""Any decoder in a LLaVA: what is compiled is the oracle."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, seed, settings
from torch._dynamo.exc import BackendCompilerFailed
from transformers import LlavaForConditionalGeneration

import vtprune_fx
from tests import zoo
from tests.tiny import Compiled, assert_matches_oracle, recipe_for
from vtprune_fx.errors import InputError
from vtprune_fx.export import export_onnx

PARTS, EACH = 20, 14
"""280 decoders in all; those that attend to a window are refused."""

EACH_SEES_ALL = {"layer_types": ["full_attention"] * 2, "sliding_window": 8}
"""Of decoders whose configuration wants a window, used or not."""

DECODERS: dict[str, dict[str, Any]] = {
    # What sets each apart, and the fields that it needs here.
    "llama": {},
    "mistral": {},
    "qwen2": {},
    "qwen3": {},  # norms of queries and keys
    "gemma": {},  # scaled embeddings, norms that add one
    "gemma2": {  # norms ahead of and behind attention and MLP
        "attn_logit_softcapping": None,
        "query_pre_attn_scalar": 8,
        **EACH_SEES_ALL,
    },
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
    "longrope": {  # the second of two factors for longer prompts, as these are
        "original_max_position_embeddings": 12,
        "factor": 2.0,
        "short_factor": 1.0,
        "long_factor": 1.5,
    },
}
WINDOWED = {"mistral", "phi3", "starcoder2"}
"""Whose layers all attend to a window where there is one."""


@st.composite
def configurations(draw: st.DrawFn) -> dict[str, Any]:
    decoder = draw(st.sampled_from(sorted(DECODERS)))
    kind = draw(st.sampled_from(sorted(ROTARY)))
    heads, head_dim = draw(st.sampled_from([4, 8])), draw(st.sampled_from([8, 16]))
    if decoder in {"starcoder2", "stablelm", "phi3"}:
        kind, heads, head_dim = "default", 4, 8
    theta = draw(st.sampled_from([100.0, 10000.0, 1000000.0]))
    rotary: dict[str, Any] = {"rope_type": kind, "rope_theta": theta} | ROTARY[kind]
    if kind == "longrope":
        for name in ("short_factor", "long_factor"):
            rotary[name] = [rotary[name]] * (head_dim // 2)
    if decoder == "stablelm":
        rotary["partial_rotary_factor"] = 0.5
    window = draw(st.sampled_from([None, None, None, 8]))
    windowed = {"sliding_window": window} if decoder in WINDOWED else {}
    return {
        "decoder": decoder,
        "num_hidden_layers": 2,
        "num_attention_heads": heads,
        "num_key_value_heads": draw(st.sampled_from([1, 2, 4])),
        "head_dim": head_dim,
        "attention_bias": draw(st.booleans()),
        "rope_parameters": rotary,
        **DECODERS[decoder],
        **windowed,
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
        if fields.get("sliding_window") and fields["decoder"] in WINDOWED:
            assert_refused(model, "sliding window")
            return
        inputs = prompts_for(model)
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


def prompts_for(model: Any) -> zoo.Inputs:
    return zoo.batch("LLaVA-1.5", model, (3, "image", 6), (2, "image", 1))


def assert_refused(model: Any, why: str) -> None:
    with pytest.raises(InputError, match=why):
        vtprune_fx.compile(model, recipe_for(2, {0: 2}), inner="eager")
    assert "forward" not in vars(model)


@pytest.mark.parametrize("decoder", sorted(WINDOWED))
def test_a_window_is_refused(decoder: str) -> None:
    fields = {"sliding_window": 8, **DECODERS[decoder]}
    model = made({"decoder": decoder, "num_hidden_layers": 2, **fields})
    assert_refused(model, "sliding window")


def test_logits_that_are_capped_are_refused() -> None:
    """Fused attention cannot cap them; a graph with them written out has no cut."""
    fields = DECODERS["gemma2"] | {"attn_logit_softcapping": 50.0}
    model = made({"decoder": "gemma2", "num_hidden_layers": 2, **fields})
    assert_refused(model, "capped at 50")
    for door in (vtprune_fx.prune, vtprune_fx.explain, export_onnx):
        with pytest.raises(InputError, match="capped at 50"):
            door(model, prompts_for(model), recipe_for(2, {0: 2}))
    with pytest.raises(BackendCompilerFailed, match="attention over the prompt"):
        Compiled(model, recipe_for(2, {0: 2}))(**prompts_for(model))


def test_a_window_is_refused_where_there_is_a_decode_graph() -> None:
    fields = DECODERS.get("mistral", {}) | {"sliding_window": 8}
    model = made({"decoder": "mistral", "num_hidden_layers": 2, **fields})
    with pytest.raises(InputError, match="sliding window"):
        export_onnx(model, prompts_for(model), recipe_for(2, {0: 2}))


def test_rotary_scaling_by_the_longest_prompt_is_refused() -> None:
    """Tracing it fails, deep inside: it branches on the positions' largest."""
    rotary = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    fields = {"decoder": "qwen2", "num_hidden_layers": 2, "rope_parameters": rotary}
    model = made(fields)
    assert_refused(model, "'dynamic', which makes them by the longest prompt so far")
    for door in (vtprune_fx.prune, vtprune_fx.explain, export_onnx):
        with pytest.raises(InputError, match="rope_type 'default'"):
            door(model, prompts_for(model), recipe_for(2, {0: 2}))
