"""The compiled path against recordings of the published FitPrune code."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import pytest
import torch
from transformers.utils.output_capturing import (
    install_all_output_capturing_hooks as install_hooks,
)

from tests.golden_cases import CASES, GoldenCase, encoded, llava_from_golden, load_case
from tests.tiny import CACHE, Compiled, Inner, cache_lengths
from vtprune_fx.models.arguments import cache_of
from vtprune_fx.models.ragged_attention import use_ragged_attention

pytestmark = pytest.mark.compat

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration

LOGITS = 5e-4
"""Absolute tolerance against recordings, which ran on another transformers."""

FAST = ("llama_h64_l8_T40_r0", "llama_h64_l8_T40_r60")


@functools.cache
def ragged_llava(model_name: str) -> LlavaForConditionalGeneration:
    """A model of its own: its attention implementation is changed."""
    case = next(name for name in CASES if name.startswith(f"{model_name}_T"))
    model = llava_from_golden(load_case(case))
    use_ragged_attention(model)
    install_hooks(model)
    return model


def _prefill(compiled: Compiled, case: GoldenCase) -> Any:
    ids = case.input_ids
    return compiled(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        mm_encoder_outputs=encoded(case.features),
    )


def _assert_same_prefill(outputs: Any, case: GoldenCase) -> None:
    assert cache_lengths(outputs) == case.tensor("kv_len").tolist()
    recorded = case.tensor("logits_last8")
    torch.testing.assert_close(outputs.logits[0, -8:], recorded, atol=LOGITS, rtol=0)


def _assert_same_tokens(inner: Inner, case: GoldenCase) -> None:
    """The tokens present after every layer; a layer without a cut keeps what it got."""
    kept = list(range(case.input_ids.shape[1]))
    for layer in range(len(case.tensor("kv_len"))):
        if layer in inner.keep_sets:
            kept = inner.keep_sets[layer][0].tolist()
        assert kept == case.kept(layer), f"{layer=}"
    assert sorted(inner.keep_sets) == sorted(case.recipe().drops(576))


def _assert_same_decode_steps(
    compiled: Compiled, prefilled: Any, case: GoldenCase
) -> None:
    length, cache = case.input_ids.shape[1], cache_of(prefilled)
    for step, token in enumerate(case.tensor("dec_tokens").tolist()):
        outputs = compiled(
            input_ids=torch.tensor([[token]]),
            attention_mask=torch.ones(1, length + step + 1, dtype=torch.long),
            position_ids=torch.tensor([[length + step]]),
            **{CACHE: cache},
        )
        recorded = case.tensor("dec_logits")[step]
        torch.testing.assert_close(
            outputs.logits[0, -1], recorded, atol=LOGITS, rtol=0, msg=f"{step=}"
        )
        assert cache_lengths(outputs) == case.tensor("dec_kv_len")[step].tolist()


@pytest.mark.parametrize(
    "name",
    [
        name if name in FAST else pytest.param(name, marks=pytest.mark.slow)
        for name in CASES
    ],
)
def test_compiled_run_is_the_recorded_one(name: str) -> None:
    case = load_case(name)
    compiled = Compiled(ragged_llava(case.model_name), case.recipe())
    outputs = _prefill(compiled, case)
    _assert_same_prefill(outputs, case)
    _assert_same_tokens(compiled.recorded, case)
    assert len(compiled.recorded.graphs) == 1
    if case.has_decode:
        _assert_same_decode_steps(compiled, outputs, case)
        assert len(compiled.recorded.ran) == 1 + len(case.tensor("dec_tokens"))
        assert len(compiled.recorded.graphs) <= 1 + 2


@pytest.mark.slow
def test_compiled_with_inductor_is_the_recorded_run() -> None:
    case = load_case("llama_h64_l8_T40_r60")
    model = ragged_llava(case.model_name)
    compiled = Compiled(model, case.recipe(), inner="inductor")
    _assert_same_prefill(_prefill(compiled, case), case)
