"""What else people do to a model: adapters, int8, autocast, gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import peft
import pytest
import torch
from torch import Tensor

import vtprune_fx
from tests.tiny import (
    Compiled,
    assert_matches_oracle,
    batch,
    counted_positions,
    recipe_for,
    tiny_llava,
)
from vtprune_fx import oracle, vtprune_backend
from vtprune_fx.recipes.schema import Recipe

RECIPE = recipe_for(2, {0: 3, 1: 5})
PROMPTS = ((3, 6), (2, 9))


peft_warns = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)


def adapted(model: Any) -> Any:
    """With adapters that do something, in the attention and in the MLP."""
    config = peft.LoraConfig(
        r=2, target_modules=["q_proj", "v_proj", "up_proj"], init_lora_weights=False
    )
    return peft.get_peft_model(model, config).eval()


def quantised(bits: int) -> Callable[[Any], Any]:
    def quantise(model: Any) -> Any:
        torchao = pytest.importorskip(
            "torchao.quantization", reason="pip install vtprune-fx[quantized]"
        )
        types: Any = torch  # which does not tell type checkers of int4
        config = (
            torchao.IntxWeightOnlyConfig(types.int4)
            if bits == 4
            else torchao.Int8WeightOnlyConfig()
        )
        torchao.quantize_(model.model.language_model, config)
        return model

    return quantise


CHANGES = {"adapters": adapted, "int8": quantised(8), "int4": quantised(4)}


@peft_warns
@pytest.mark.parametrize("change", list(CHANGES))
def test_a_changed_model_compiled_is_the_oracle(change: str) -> None:
    model = CHANGES[change](tiny_llava.__wrapped__(layers=2))
    inputs, compiled = batch(model, *PROMPTS), Compiled(model, RECIPE)
    outputs = compiled(**inputs)
    kept = compiled.recorded.keep_sets
    assert_matches_oracle(outputs, kept, whole(model), RECIPE, inputs)


@peft_warns
@pytest.mark.parametrize("change", list(CHANGES))
def test_a_changed_model_generates_like_the_oracle(change: str) -> None:
    model = CHANGES[change](tiny_llava.__wrapped__(layers=2))
    inputs = batch(model, *PROMPTS)
    samples = oracle.split_batch(
        whole(model), **inputs, position_ids=counted_positions(inputs)
    )
    expected = [oracle.generate(whole(model), RECIPE, s, 8) for s in samples]
    vtprune_fx.compile(whole(model), RECIPE, inner="eager")
    with torch.inference_mode():
        ids = model.generate(
            **inputs, max_new_tokens=8, do_sample=False, eos_token_id=None
        )
    assert ids[:, inputs["input_ids"].shape[1] :].tolist() == expected


def whole(model: Any) -> Any:
    """The model inside of what holds its adapters."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def test_autocast_keeps_what_the_oracle_keeps() -> None:
    """Two ways of rounding differ by no more than rounding changes the oracle."""
    model = tiny_llava(layers=2)
    inputs, compiled = batch(model, *PROMPTS), Compiled(model, RECIPE)
    exact = oracle_logits(model, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = oracle_logits(model, inputs)
        error = (rounded - exact).abs().max().item()
        assert 0 < error < exact.std(), "rounding must not drown what is compared"
        outputs = compiled(**inputs)
        kept = compiled.recorded.keep_sets
        assert outputs.logits.dtype == torch.bfloat16
        assert_matches_oracle(outputs, kept, model, RECIPE, inputs, atol=error)


def oracle_logits(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    samples = oracle.split_batch(model, **inputs)
    runs = [oracle.prefill(model, RECIPE, sample) for sample in samples]
    return torch.cat([run.logits.float() for run in runs])


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_gradients_are_the_oracles(inner: str) -> None:
    model = tiny_llava.__wrapped__(layers=2)
    inputs = batch(model, *PROMPTS)
    found = gradients(model, lambda: pruned_loss(model, inputs, inner, RECIPE))
    expected = gradients(model, lambda: oracle_loss(model, inputs))
    kept = RECIPE.keep_all()
    dense = gradients(model, lambda: pruned_loss(model, inputs, inner, kept))
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-4, rtol=1e-4)
    assert any(not torch.allclose(dense[n], expected[n], atol=1e-2) for n in dense)


def gradients(model: Any, loss: Callable[[], Tensor]) -> dict[str, Tensor]:
    model.zero_grad()
    differentiate: Any = loss().backward
    differentiate()
    # Some compilers give zeros for what leads to no loss, instead of nothing.
    return {
        name: parameter.grad
        for name, parameter in model.named_parameters()
        if parameter.grad is not None and parameter.grad.any()
    }


def pruned_loss(
    model: Any, inputs: dict[str, Tensor], inner: str, recipe: Recipe
) -> Tensor:
    torch.compiler.reset()
    told: dict[str, Any] = {"recipe": recipe, "inner": inner}
    compiled: Any = torch.compile(
        model.forward, backend=vtprune_backend, options=told, fullgraph=True
    )
    return last_tokens_loss(compiled(**inputs).logits)


def oracle_loss(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    prefill = differentiable(oracle.prefill)
    samples = differentiable(oracle.split_batch)(model, **inputs)
    return last_tokens_loss([prefill(model, RECIPE, s).logits for s in samples])


def last_tokens_loss(logits: Iterable[Tensor]) -> Tensor:
    return torch.stack([row[-1].logsumexp(0) for row in logits]).sum()


def differentiable(function: Any) -> Callable[..., Any]:
    """What ``torch.no_grad`` was wrapped around."""
    inside: Callable[..., Any] = function.__wrapped__
    return inside
