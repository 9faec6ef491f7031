"""How people call a compiled model: each call is right or refused, and so is the next.

Expected values are the oracle's, or what transformers gives without pruning.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    LlavaForConditionalGeneration,
    MllamaConfig,
    MllamaForConditionalGeneration,
    StaticCache,
)

import vtprune_fx
from tests.tiny import (
    CACHE,
    IMAGE,
    Inputs,
    batch,
    cache_lengths,
    recipe_for,
    tiny_llava,
)
from vtprune_fx import oracle
from vtprune_fx.errors import InputError, VtpruneError
from vtprune_fx.models.arguments import cache_of

RECIPE = recipe_for(3, {0: 3, 1: 6})
NEW = 12
PLAIN = tiny_llava(layers=3)
"""Never compiled."""
LAST_IMAGE = 3 + 16 - 1
"""Last position of the image in ``one()``."""


def fresh() -> Any:
    return tiny_llava.__wrapped__(layers=3)


@pytest.fixture
def model() -> Iterator[Any]:
    torch.compiler.reset()
    model = compiled(fresh())
    yield model
    torch.compiler.reset()


def compiled(model: nn.Module) -> Any:
    return vtprune_fx.compile(model, RECIPE, inner="eager")


def one(seed: int = 0, after: int = 20) -> Inputs:
    """Three words, an image, and words after it."""
    return batch(PLAIN, (3, after), seed=seed)


def answer(model: Any, inputs: Inputs, new: int = NEW, **options: Any) -> list[int]:
    told = {"max_new_tokens": new, "do_sample": False, "eos_token_id": None}
    ids: Tensor = model.generate(**inputs, **{"pad_token_id": 0} | told | options)
    return ids[0, inputs["input_ids"].shape[1] :].tolist()


def by_oracle(inputs: Inputs, model: Any = PLAIN, new: int = NEW) -> list[int]:
    positions = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    [sample] = oracle.split_batch(model, **inputs, position_ids=positions)
    return oracle.generate(model, RECIPE, sample, new)


def prefilled(model: Any, inputs: Inputs, **options: Any) -> Any:
    with torch.no_grad():
        return model(**inputs, **options)


def assert_prunes(model: Any) -> None:
    assert cache_lengths(prefilled(model, one(after=6))) == [25, 22, 16]


# --------------------------------------------- an error about one prompt is its alone


def too_small(_: Any) -> Inputs:
    """A placeholder of sixteen is there."""
    ids = torch.tensor([[5, IMAGE, 7, 8, *range(20, 40)]])
    mask = torch.ones_like(ids)
    pixels = one()["pixel_values"]
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels}


def text_beside_an_image(_: Any) -> Inputs:
    """The words have too little padding to give up in the place of visual tokens."""
    return batch(PLAIN, (3, 6), (20,))


def two_images_for_one(_: Any) -> Inputs:
    inputs = one()
    return inputs | {"pixel_values": inputs["pixel_values"].repeat(2, 1, 1, 1)}


def no_image_for_one(_: Any) -> Inputs:
    return batch(PLAIN, (5,)) | {"pixel_values": one()["pixel_values"]}


def padded_after(_: Any) -> Inputs:
    inputs = batch(PLAIN, (3, 6), (3, 2))
    return inputs | {"attention_mask": inputs["attention_mask"].flip(1)}


def packed(_: Any) -> Inputs:
    inputs = one()
    positions = torch.arange(inputs["input_ids"].shape[1])[None]
    return inputs | {"position_ids": torch.where(positions < 30, positions, 0)}


def wrong_pixels(_: Any) -> Inputs:
    return one() | {"pixel_values": torch.zeros(1, 3, 5, 7)}


BAD: dict[str, tuple[Callable[[Any], Inputs], type[Exception], str]] = {
    "fewer visual tokens than dropped": (
        too_small,
        VtpruneError,
        "visual tokens|placeholder",
    ),
    "text beside an image, too long": (
        text_beside_an_image,
        InputError,
        "by itself",
    ),
    "two images for one place": (two_images_for_one, InputError, "placeholder"),
    "an image without a place": (no_image_for_one, InputError, "placeholder"),
    "padding after the prompt": (padded_after, InputError, "padding_side"),
    "packed prompts": (packed, InputError, "start again"),
    "pixels of another size": (wrong_pixels, ValueError, "image size"),
}


def slow(*values: Any) -> list[Any]:
    """Cases that show little more than those before them."""
    return [pytest.param(value, marks=pytest.mark.slow) for value in values]


@pytest.mark.parametrize("case", [*list(BAD)[:3], *slow(*list(BAD)[3:])])
@pytest.mark.parametrize("first", [*slow(True), False], ids=["at first", "later"])
def test_a_refused_prompt_changes_nothing_for_the_next(
    model: Any, case: str, first: bool
) -> None:
    make, error, message = BAD[case]
    if not first:
        assert answer(model, one()) == by_oracle(one())
    with pytest.raises(error, match=message):
        prefilled(model, make(model))
    with pytest.raises(error, match=message):
        answer(model, make(model))
    assert answer(model, one()) == by_oracle(one())
    assert_prunes(model)


# ------------------------------------------------------------- the prompt, and no more


@pytest.mark.parametrize("seed", [0, *slow(1, 2)])
def test_an_assistant_does_not_change_the_answer(model: Any, seed: int) -> None:
    inputs = one(seed)
    assert answer(model, inputs, assistant_model=fresh()) == by_oracle(inputs)


def test_a_compiled_assistant_does_not_change_the_answer(model: Any) -> None:
    helper = compiled(fresh())
    assert answer(model, one(), assistant_model=helper) == by_oracle(one())


def test_prompt_lookup_does_not_change_the_answer(model: Any) -> None:
    inputs = one()
    # Words that repeat, so that the lookup finds candidates in the first call.
    inputs["input_ids"][0, -8:] = torch.tensor([7, 8, 9, 4, 7, 8, 9, 4])
    looked = answer(model, inputs, prompt_lookup_num_tokens=3)
    assert looked == by_oracle(inputs)


def test_hidden_states_with_an_assistant_are_refused(model: Any) -> None:
    with pytest.raises(InputError, match="with an assistant"):
        answer(
            model,
            one(),
            assistant_model=fresh(),
            output_hidden_states=True,
            return_dict_in_generate=True,
        )
    assert answer(model, one()) == by_oracle(one())


@pytest.mark.parametrize(
    "options",
    [{"prefill_chunk_size": 20}, {"assistant_early_exit": 1}, {"use_cache": False}],
    ids=str,
)
def test_ways_to_generate_that_would_be_wrong_are_refused(
    model: Any, options: dict[str, Any]
) -> None:
    [name] = options
    with pytest.raises(InputError, match=f"{name}.*undo"):
        answer(model, one(), **options)
    config = copy.deepcopy(model.generation_config)
    config.update(**options)
    with pytest.raises(InputError, match=f"{name}.*undo"):
        answer(model, one(), generation_config=config)
    assert answer(model, one()) == by_oracle(one())


# ------------------------------------------------- positions and lengths of the prompt


@pytest.mark.parametrize("position", [LAST_IMAGE + 1, *slow(24, 38, -1), -20])
def test_positions_of_logits_are_the_prompts(model: Any, position: int) -> None:
    """Words after the image are all kept, so their order from the end is too."""
    inputs = one()
    length = inputs["input_ids"].shape[1]
    every = prefilled(model, inputs).logits
    asked = torch.tensor([position])
    found = prefilled(model, inputs, logits_to_keep=asked).logits
    from_the_end = position if position < 0 else position - length
    torch.testing.assert_close(found[0, 0], every[0, from_the_end])


def test_the_last_logits_are_the_prompts(model: Any) -> None:
    every = prefilled(model, one()).logits
    last = prefilled(model, one(), logits_to_keep=20).logits
    torch.testing.assert_close(last, every[:, -20:])


@pytest.mark.parametrize(
    "asked", [torch.tensor([LAST_IMAGE]), torch.tensor([0]), torch.tensor([39]), 21]
)
def test_positions_up_to_the_image_are_refused(model: Any, asked: Any) -> None:
    with pytest.raises(InputError, match=r"logits_to_keep.*after its images.*18"):
        prefilled(model, one(), logits_to_keep=asked)
    assert answer(model, one()) == by_oracle(one())


def test_labels_are_refused_where_tokens_are_dropped(model: Any) -> None:
    with pytest.raises(InputError, match=r"labels.*undo"):
        prefilled(model, one(), labels=one()["input_ids"])
    words = batch(PLAIN, (5,))
    found = prefilled(model, words, labels=words["input_ids"]).loss
    expected = prefilled(PLAIN, words, labels=words["input_ids"]).loss
    torch.testing.assert_close(found, expected)


def test_lengths_of_packed_prompts_are_refused(model: Any) -> None:
    lengths = torch.tensor([0, 20, 39], dtype=torch.int32)
    with pytest.raises(InputError, match="lengths of packed prompts"):
        prefilled(model, one(), cu_seq_lens_q=lengths, cu_seq_lens_k=lengths)


def cropped(model: Any, inputs: Inputs, left: int, **options: Any) -> Any:
    """A cache that an answer filled, cropped to so many of the tokens that came."""
    out = model.generate(
        **inputs,
        max_new_tokens=5,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        return_dict_in_generate=True,
        **options,
    )
    cache = cache_of(out)
    cache.crop(left - int(cache.get_seq_length()))
    return cache


def go_on(model: Any, ids: Tensor, cache: Any) -> list[int]:
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return answer(model, given, new=5, **{CACHE: cache})


@pytest.mark.parametrize("left", [1, 3])
def test_a_cache_is_cropped_to_before_the_image(model: Any, left: int) -> None:
    words = torch.cat([one()["input_ids"][:, :left], torch.tensor([[7, 8, 9]])], dim=1)
    expected = go_on(PLAIN, words, cropped(PLAIN, one(), left))
    cache = cropped(model, one(), left)
    assert int(cache.get_seq_length()) == left
    assert go_on(model, words, cache) == expected


def test_a_cache_is_cropped_to_nothing_and_filled_again(model: Any) -> None:
    cache = cropped(model, one(), 0)
    assert int(cache.get_seq_length()) == 0
    assert answer(model, one(), **{CACHE: cache}) == by_oracle(one())


@pytest.mark.parametrize("left", [LAST_IMAGE + 1, *slow(30), 39])
def test_a_cache_is_cropped_to_after_the_image(model: Any, left: int) -> None:
    """Another question about the image, with the same pruning."""
    inputs = one()
    ids = torch.cat([inputs["input_ids"][:, :left], torch.tensor([[7, 8, 9]])], dim=1)
    cache = cropped(model, inputs, left)
    assert int(cache.get_seq_length()) == left
    assert [n.keys.shape[2] for n in cache.layers] == [left, left - 3, left - 9]
    if left == 39:
        again = cache_of(prefilled(model, inputs))
        assert go_on(model, ids, cache) == go_on(model, ids, again)


@pytest.mark.parametrize("left", [4, 10, LAST_IMAGE])
def test_a_cache_is_not_cropped_into_the_image(model: Any, left: int) -> None:
    with pytest.raises(InputError, match=rf"at most 3 .*more than 18.*found {left}\."):
        cropped(model, one(), left)


def test_a_refused_crop_leaves_the_cache_complete(model: Any) -> None:
    cache = cache_of(prefilled(model, one()))
    lengths = [layer.keys.shape[2] for layer in cache.layers]
    with pytest.raises(InputError, match="crop"):
        cache.crop(-30)
    assert [layer.keys.shape[2] for layer in cache.layers] == lengths


def test_a_static_cache_is_cropped_to_before_the_image(model: Any) -> None:
    words = torch.cat([one()["input_ids"][:, :3], torch.tensor([[7, 8, 9]])], dim=1)
    expected = go_on(PLAIN, words, cropped(PLAIN, one(), 3))
    cache = cropped(model, one(), 3, cache_implementation="static")
    assert int(cache.get_seq_length()) == 3
    assert go_on(model, words, cache) == expected


# ------------------------------------------------------------------ copies and wrappers


def smaller(model: Any) -> Any:
    """The same model with other weights."""
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(0.9)
    return model


def reloaded(model: Any) -> Any:
    """Saved before its first call: transformers' hooks cannot be saved after it."""
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize(
    "twin_of", [*slow(copy.deepcopy), reloaded], ids=["copied", "saved"]
)
def test_a_copy_has_weights_and_graphs_of_its_own(
    model: Any, twin_of: Callable[[Any], Any]
) -> None:
    if twin_of is copy.deepcopy:
        answer(model, one())
    twin = smaller(twin_of(model))
    assert answer(twin, one()) == by_oracle(one(), smaller(fresh()))
    assert answer(model, one()) == by_oracle(one())
    assert_prunes(twin)
    assert vtprune_fx.report_of(twin) is not vtprune_fx.report_of(model)
    vtprune_fx.undo(twin)
    assert cache_lengths(prefilled(twin, one(after=6))) == [25, 25, 25]
    assert_prunes(model)


class Adapter(nn.Module):
    """What peft wraps around a model, as far as it is called here."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner: Any = inner

    def get_base_model(self) -> Any:
        return self.inner

    def forward(self, **inputs: Any) -> Any:
        return self.inner(**inputs)

    def generate(self, **inputs: Any) -> Any:
        return self.inner.generate(**inputs)


def test_a_model_inside_of_an_adapter_is_pruned() -> None:
    torch.compiler.reset()
    wrapped = compiled(Adapter(fresh()))
    assert answer(wrapped, one()) == by_oracle(one())
    assert vtprune_fx.report_of(wrapped) is not None
    assert_prunes(wrapped)
    vtprune_fx.undo(wrapped)
    assert cache_lengths(prefilled(wrapped, one(after=6))) == [25, 25, 25]


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing")  # peft asks for it
def test_a_peft_model_is_pruned() -> None:
    peft = pytest.importorskip("peft")
    torch.compiler.reset()
    config = peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    torch.manual_seed(1)
    wrapped = peft.get_peft_model(fresh(), config)
    merged = copy.deepcopy(wrapped).merge_and_unload()
    assert answer(compiled(wrapped), one()) == by_oracle(one(), merged)


def test_a_model_of_torch_compile_is_refused() -> None:
    plain: Any = torch.compile(fresh(), backend="eager")
    with pytest.raises(InputError, match="Pass the model itself"):
        compiled(plain)


def test_a_module_of_another_kind_is_refused() -> None:
    with pytest.raises(InputError, match="found Linear"):
        compiled(nn.Linear(2, 2))


def test_torch_compile_around_a_compiled_model_is_refused(model: Any) -> None:
    around: Any = torch.compile(model, backend="eager")
    with pytest.raises(InputError, match="compiled once"):
        prefilled(around, one())
    assert answer(model, one()) == by_oracle(one())


def test_a_model_with_hooks_of_accelerate_is_refused() -> None:
    accelerate = pytest.importorskip("accelerate")
    parts = ("model.vision_tower", "model.multi_modal_projector", "lm_head")
    places = dict.fromkeys((*parts, "model.language_model"), "cpu")
    model = accelerate.dispatch_model(fresh(), places, force_hooks=True)
    with pytest.raises(InputError, match="remove_hook_from_submodules"):
        compiled(model)
    accelerate.hooks.remove_hook_from_submodules(model)
    assert answer(compiled(model), one()) == by_oracle(one())


def test_a_wrapper_around_a_compiled_model_must_go_before_undo(model: Any) -> None:
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(mixed_precision="bf16", cpu=True)
    prepared = accelerator.prepare(model)
    assert_prunes(prepared)
    assert vtprune_fx.report_of(prepared) is not None
    with pytest.raises(InputError, match="keep_fp32_wrapper"):
        vtprune_fx.undo(prepared)
    with pytest.raises(InputError, match="prunes already"):
        compiled(prepared)
    bare = accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)
    vtprune_fx.undo(bare)
    assert cache_lengths(prefilled(bare, one(after=6))) == [25, 25, 25]


def test_a_forward_that_was_set_before_is_refused() -> None:
    model = fresh()
    model.forward = lambda **inputs: type(model).forward(model, **inputs)
    with pytest.raises(InputError, match="wrap it then"):
        compiled(model)


def test_attention_that_is_switched_later_is_refused(model: Any) -> None:
    model.set_attn_implementation("eager")
    with pytest.raises(InputError, match=r"found eager.*undo"):
        answer(model, one())
    vtprune_fx.undo(model)
    assert answer(compiled(model), one()) == by_oracle(one())


# -------------------------------------------------------------------------- training


def set_checkpointing(model: Any, what: str) -> None:
    """By the name that the installed transformers has for it."""
    new = getattr(model, f"activation_checkpointing_{what}", None)
    (new or getattr(model, f"gradient_checkpointing_{what}"))()


def test_gradient_checkpointing_is_refused_in_training(model: Any) -> None:
    set_checkpointing(model, "enable")
    assert answer(model, one()) == by_oracle(one())
    with pytest.raises(InputError, match=r"checkpointing_disable\(\)"):
        model.train()(**one(), use_cache=False)
    set_checkpointing(model, "disable")
    model(**one(), use_cache=False).logits.sum().backward()
    layers = model.model.language_model.layers
    assert all(weight.grad is not None for weight in layers.parameters())


def test_a_prompt_without_a_cache_is_pruned(model: Any) -> None:
    outputs = prefilled(model, one(), use_cache=False)
    assert cache_of(outputs) is None
    torch.testing.assert_close(outputs.logits, prefilled(model, one()).logits)


def test_autocast_around_a_prompt_prunes(model: Any) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert_prunes(model)
    assert answer(model, one()) == by_oracle(one())


# --------------------------------------------------------- a recipe that is ignored


TEXT = {
    "model_type": "llama",
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
}


def test_a_model_that_generates_past_its_forward_is_refused() -> None:
    torch.manual_seed(0)
    tower = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
    }
    bridge = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "encoder_hidden_size": 16,
        "vocab_size": 20,
    }
    config = Blip2Config(
        vision_config=tower,
        qformer_config=bridge,
        text_config=TEXT,
        image_token_index=IMAGE,
        num_query_tokens=16,
    )
    model = compiled(Blip2ForConditionalGeneration(config).eval())
    inputs = one() | {"pixel_values": torch.randn(1, 3, 28, 28)}
    with pytest.raises(VtpruneError, match="past its forward"):
        answer(model, inputs, new=2)


def test_a_model_that_reads_images_by_cross_attention_is_refused() -> None:
    text = {
        **TEXT,
        "model_type": "mllama_text_model",
        "cross_attention_layers": [1],
        "pad_token_id": 0,
    }
    tower = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_global_layers": 1,
        "attention_heads": 2,
        "image_size": 28,
        "intermediate_layers_indices": [0],
        "vision_output_dim": 32,
        "supported_aspect_ratios": [[1, 1]],
    }
    config = MllamaConfig(vision_config=tower, text_config=text)
    model = MllamaForConditionalGeneration(config)
    with pytest.raises(InputError, match="cross attention"):
        compiled(model)
    assert "forward" not in vars(model)


def test_images_that_a_model_does_not_know_as_tokens_are_refused() -> None:
    """Nothing to prune in a prompt with an image is an error, not a dense run."""
    torch.compiler.reset()
    dense: LlavaForConditionalGeneration = fresh()
    dense.config.image_token_id = 98
    with pytest.raises(InputError, match="found images, and no placeholder"):
        prefilled(compiled(dense), one())


def test_padding_inside_of_a_batch_is_refused_in_a_later_turn(model: Any) -> None:
    cache = cache_of(prefilled(model, batch(PLAIN, (3, 6), (2, 6))))
    came = int(cache.get_seq_length())
    turn = torch.tensor([[7, 8, 9], [0, 8, 9]])
    mask = torch.ones(2, came + 3, dtype=torch.long)
    mask[1, 0] = mask[1, came] = 0
    with pytest.raises(InputError, match="equally long"):
        prefilled(model, {"input_ids": turn, "attention_mask": mask, CACHE: cache})
    mask[1, came] = 1
    given = {"input_ids": turn, "attention_mask": mask, CACHE: cache}
    assert prefilled(model, given).logits.shape[:2] == (2, 3)


def test_a_static_cache_without_use_cache_is_treated_as_transformers_does(
    model: Any,
) -> None:
    def filled(by: Any) -> tuple[bool, int]:
        cache = StaticCache(config=model.config.get_text_config(), max_cache_len=50)
        outputs = prefilled(by, one(), use_cache=False, **{CACHE: cache})
        return cache_of(outputs) is cache, int(cache.get_seq_length())

    assert filled(model) == filled(fresh())
