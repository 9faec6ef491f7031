"""Decoders other than Llama inside a LLaVA: nothing is known of a model by name."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch._dynamo.exc import BackendCompilerFailed
from transformers import AutoConfig, LlavaConfig, LlavaForConditionalGeneration

import vtprune_fx
from tests.tiny import (
    IMAGE,
    VOCABULARY,
    Compiled,
    assert_matches_oracle,
    batch,
    counted_positions,
    recipe_for,
    tiny_llava,
)
from vtprune_fx import oracle, prune
from vtprune_fx.errors import InputError, PlanError

if TYPE_CHECKING:
    from torch import Tensor


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


# ------------------------------------------------- layers that number their tokens


def llama4(*, tuned: bool, rope: tuple[int, int] = (1, 0)) -> Any:
    """A LLaVA with a decoder of Llama 4 that attends to all tokens.

    Args:
        tuned: Whether layers without rotary positions scale queries by positions that
            they count off themselves.
        rope: 1 for each layer with rotary positions.
    """
    torch.manual_seed(0)
    text = AutoConfig.for_model(
        "llama4_text",
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        intermediate_size_mlp=48,
        num_hidden_layers=2,
        head_dim=8,
        num_attention_heads=4,
        num_key_value_heads=4,
        num_local_experts=1,
        no_rope_layers=list(rope),
        layer_types=["full_attention"] * 2,
        initializer_range=0.2,
        floor_scale=4,
        attn_scale=0.5,
        attn_temperature_tuning=tuned,
    )
    config = tiny_llava(layers=2).config.to_dict() | {"text_config": text.to_dict()}
    model = LlavaForConditionalGeneration(LlavaConfig(**config))
    model.train(mode=False)
    return model


def dense_without(
    model: Any, inputs: dict[str, Tensor], dropped: list[int], after: int
) -> Tensor:
    """[S, vocab]: logits where no layer after ``after`` attends to ``dropped``."""
    length = inputs["input_ids"].shape[1]
    allowed = torch.ones(length, length, dtype=torch.bool).tril()
    allowed[:, dropped] = False
    allowed |= torch.eye(length, dtype=torch.bool)

    def hide(_: object, args: object, kwargs: dict[str, Any]) -> tuple[object, Any]:
        return args, kwargs | {"attention_mask": allowed[None, None]}

    layers = model.get_decoder().layers[after + 1 :]
    hooks = [n.register_forward_pre_hook(hide, with_kwargs=True) for n in layers]
    with torch.no_grad():
        logits: Tensor = model(**inputs).logits[0]
    for hook in hooks:
        hook.remove()
    return logits


def assert_like_dense_without(model: Any) -> None:
    """A cut of three tokens in layer 0: kept tokens no longer see the dropped ones."""
    inputs = batch(model, (3, 6))
    compiled = Compiled(model, recipe_for(2, {0: 3}))
    outputs = compiled(**inputs)
    kept = compiled.recorded.keep_sets[0][0]
    dropped = sorted(set(range(inputs["input_ids"].shape[1])) - set(kept.tolist()))
    assert inputs["input_ids"][0, dropped].tolist() == [IMAGE] * 3
    expected = dense_without(model, inputs, dropped, after=0)
    torch.testing.assert_close(outputs.logits[0], expected[kept], atol=1e-4, rtol=0)


def test_a_later_layer_that_numbers_its_tokens_is_refused() -> None:
    """What it gets after a cut is numbered anew, though kept tokens keep positions."""
    model, recipe = llama4(tuned=True), recipe_for(2, {0: 3})
    inputs = batch(model, (3, 6))
    with pytest.raises(PlanError, match="attn_temperature_tuning = False"):
        prune(model, inputs, recipe)
    torch.compiler.reset()
    vtprune_fx.compile(model, recipe, inner="eager")
    with pytest.raises(PlanError, match="numbers the tokens that it gets"):
        model(**inputs, use_cache=False)


def test_without_these_numbers_such_a_decoder_is_pruned() -> None:
    """The refusal's advice."""
    assert_like_dense_without(llama4(tuned=False))


def test_a_cut_after_the_layers_that_number_their_tokens_is_exact() -> None:
    """The refusal's other advice: they see the prompt as it is."""
    assert_like_dense_without(llama4(tuned=True, rope=(0, 1)))


def test_the_oracle_refuses_rotary_positions_that_it_cannot_read() -> None:
    model = llama4(tuned=False)
    [sample] = oracle.split_batch(model, **batch(model, (3, 6)))
    with pytest.raises(PlanError, match="found one of complex64"):
        oracle.prefill(model, RECIPE, sample)


# ------------------------------------------------------------------------- experts


EXPERTS: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    },
    "qwen2_moe": {  # one expert that all tokens pass besides
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
        "decoder_sparse_step": 1,
    },
    "ernie4_5_moe": {
        "moe_num_experts": 4,
        "moe_k": 2,
        "moe_intermediate_size": 16,
        "moe_num_shared_experts": 1,
        "moe_layer_start_index": 0,
        "use_bias": False,
    },
    "glm4_moe": {  # experts in groups, chosen by a corrected score
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "first_k_dense_replace": 0,
        "n_group": 1,
        "topk_group": 1,
    },
    "granitemoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "phimoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "minimax_m2": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "hunyuan_v1_moe": {"num_experts": 4, "moe_topk": 2},
}
"""Decoders whose layers send each token to two of four experts, and their fields."""
FAST = ("qwen3_moe",)


def of_experts(decoder: str) -> LlavaForConditionalGeneration:
    """A LLaVA with such a decoder, random and 32 wide."""
    vision = tiny_llava(layers=2).config.vision_config
    torch.manual_seed(0)
    text = AutoConfig.for_model(
        decoder,
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        initializer_range=0.2,
        sliding_window=None,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=None,
        **EXPERTS[decoder],
    )
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=IMAGE
    )
    model = LlavaForConditionalGeneration(config)
    model.train(mode=False)
    return model


@pytest.mark.parametrize(
    "decoder",
    [d if d in FAST else pytest.param(d, marks=pytest.mark.slow) for d in EXPERTS],
)
def test_experts_get_the_kept_tokens(decoder: str) -> None:
    """Compiled, exported and generating eight tokens: the oracle."""
    model, recipe, new = of_experts(decoder), recipe_for(3, {0: 3, 1: 5}), 8
    inputs = batch(model, *PROMPTS)
    compiled = Compiled(model, recipe)
    outputs = compiled(**inputs)
    kept = compiled.recorded.keep_sets
    assert_matches_oracle(outputs, kept, model, recipe, inputs)
    exported = prune(model, inputs, recipe)
    kept = exported.keep_sets(**inputs)
    assert_matches_oracle(exported(**inputs), kept, model, recipe, inputs)
    plain = copy.deepcopy(model)
    vtprune_fx.compile(model, recipe, inner="eager")
    made = model.generate(
        **inputs, max_new_tokens=new, do_sample=False, eos_token_id=None
    )
    for row, sample in enumerate(oracle.split_batch(plain, **inputs)):
        state = oracle.prefill(plain, recipe, sample)
        logits, answer = state.logits[-1], made[row, -new:].tolist()
        for token in answer:
            assert int(logits.argmax()) == token
            logits = oracle.step(plain, state, token)
