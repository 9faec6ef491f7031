"""Every model that pruning is tried on, tiny and random, and prompts for them.

Inputs are made without a processor: how many visual tokens an image or a video takes is
what the model's own encoder says.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import Tensor
from transformers import AutoConfig, AutoModelForImageTextToText

import vtprune_fx
from examples import llava_hr
from tests.tiny import recipe_for
from vtprune_fx import oracle
from vtprune_fx.models.arguments import cache_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from transformers import PreTrainedConfig, PreTrainedModel

    from vtprune_fx.recipes.schema import Recipe

Inputs = dict[str, Tensor]

IMAGE, VIDEO, PAD, TEXT = 99, 98, 0, 90
"""Placeholders of images and videos, padding, and how many ids are text."""
WIDTH, PATCH, LAYERS = 32, 4, 3

Prompt = tuple[int | str, ...]
"""How many text tokens, ``"image"`` or ``"video"``, in order."""


@dataclasses.dataclass(frozen=True)
class Kind:
    """One model.

    Attributes:
        config: Makes its configuration.
        image: Makes the inputs of an image; the number lets sizes vary.
        video: The same of a video, None where it takes none.
        per_sample: Whether images come as [samples, images, ...].
        times: Whether a text token stands ahead of each pair of frames of a video.
        features_until: The first layer that no visual features enter any more.
        papers: Whether a pruning paper reports on it.
    """

    config: Callable[[], PreTrainedConfig]
    image: Callable[[torch.Generator, int], Inputs]
    video: Callable[[torch.Generator, int], Inputs] | None = None
    per_sample: bool = False
    times: bool = False
    features_until: int = 0
    papers: bool = False


def tiny(name: str) -> PreTrainedModel:
    """A model of the zoo with random weights, ready to run; a new one each time."""
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForImageTextToText.from_config(ZOO[name].config())
    model.train(mode=False)
    return model


@functools.cache
def shared(name: str) -> PreTrainedModel:
    """The same, for tests that leave it as it is."""
    return tiny(name)


def batch(name: str, model: PreTrainedModel, *prompts: Prompt, seed: int = 0) -> Inputs:
    """Prompts in one batch, padded on the left.

    Args:
        name: Of the model in the zoo.
        model: The model.
        prompts: One for each sample.
        seed: Of texts and pictures.
    """
    generator = torch.Generator().manual_seed(seed)
    number = itertools.count()
    rows, made = [], dict[str, list[list[Inputs]]](image=[], video=[])
    for prompt in prompts:
        parts, own = [], dict[str, list[Inputs]](image=[], video=[])
        for part in prompt:
            if isinstance(part, int):
                parts.append(torch.randint(1, TEXT, (part,), generator=generator))
                continue
            make: Any = getattr(ZOO[name], part)
            own[part].append(make(generator, next(number)))
            parts.append(_placeholders(name, model, part, own[part][-1]))
        rows.append(torch.cat(parts))
        for kind, items in own.items():
            made[kind].append(items)
    together = _stacked if ZOO[name].per_sample else _joined
    inputs = _padded(rows)
    for samples in made.values():
        inputs |= together(samples)
    return inputs | _token_types(model, inputs["input_ids"])


def _placeholders(
    name: str, model: PreTrainedModel, kind: str, inputs: Inputs
) -> Tensor:
    """What stands for an image or a video in a prompt."""
    if ZOO[name].per_sample:
        inputs = {key: value[None] for key, value in inputs.items()}
    length = visual_tokens(model, kind, inputs)
    run = torch.full((length,), IMAGE if kind == "image" else VIDEO)
    if not ZOO[name].times or kind == "image":
        return run
    time = torch.tensor([1])
    parts = run.chunk(int(inputs["video_grid_thw"][0, 0]))
    return torch.cat([piece for part in parts for piece in (time, part)])


def placeholders(inputs: Inputs) -> Tensor:
    """[B, S]: where a visual token stands."""
    return (inputs["input_ids"] == IMAGE) | (inputs["input_ids"] == VIDEO)


def visual_tokens(model: PreTrainedModel, kind: str, inputs: Inputs) -> int:
    """How many tokens an image or a video takes."""
    encode: Any = getattr(model.base_model, f"get_{kind}_features")
    with torch.no_grad():
        found = encode(**inputs, return_dict=True).pooler_output
    each = [found] if isinstance(found, Tensor) else found
    return sum(part.numel() for part in each) // WIDTH


def recipe_of(name: str, **fields: Any) -> Recipe:
    """A recipe that drops two visual tokens in each of two layers."""
    first = ZOO[name].features_until
    return recipe_for(LAYERS, {first: 2, first + 1: 2}, **fields)


def assert_generates_like_the_oracle(
    name: str,
    prompts: Sequence[Prompt],
    recipe: Recipe,
    new: int = 8,
    inner: str = "eager",
) -> None:
    """Compare a compiled model with the oracle, sample by sample.

    Tokens kept at each cut, tokens that each layer holds, and the logits of the first
    and of each following new token, fed by what is likeliest.
    """
    model = tiny(name)
    inputs = batch(name, model, *prompts)
    samples = oracle.split_batch(model, **inputs)
    torch.compiler.reset()
    runner: Any = vtprune_fx.compile(model, recipe, inner=inner)
    made = runner.generate(
        **inputs,
        max_new_tokens=new,
        do_sample=False,
        eos_token_id=None,
        return_dict_in_generate=True,
        output_logits=True,
    )
    report = vtprune_fx.report_of(model)
    assert report is not None
    layers = cache_of(made).layers
    for row, sample in enumerate(samples):
        state = oracle.prefill(model, recipe, sample)
        padding = inputs["input_ids"].shape[1] - len(sample.input_ids)
        _compare_kept(report.keep_sets, row, padding, state)
        held = [layer.held() - int(layer.padding[row]) for layer in layers]
        assert held == [k.shape[1] + new - 1 for k in state.keys], f"sample {row}"
        logits = state.logits[-1]
        for step in range(new):
            torch.testing.assert_close(
                made.logits[step][row], logits, atol=1e-4, rtol=0
            )
            if step + 1 < new:
                token = int(made.sequences[row, step - new])
                assert token == int(logits.argmax())
                logits = oracle.step(model, state, token)


def _compare_kept(
    keep_sets: dict[int, Tensor], row: int, padding: int, run: oracle.Prefill
) -> None:
    assert sorted(keep_sets) == sorted(run.scores), "layers with a cut"
    for layer, positions in keep_sets.items():
        kept = [int(p) for p in positions[row] - padding if p >= 0]
        expected = [p for p in run.kept[layer].tolist() if p >= 0]
        assert kept == expected, f"{layer=}, sample {row}"


def _padded(rows: Sequence[Tensor]) -> Inputs:
    ids = torch.full((len(rows), max(map(len, rows))), PAD)
    mask = torch.zeros_like(ids)
    for index, row in enumerate(rows):
        ids[index, -len(row) :] = row
        mask[index, -len(row) :] = 1
    return {"input_ids": ids, "attention_mask": mask}


def _joined(samples: Iterable[Sequence[Inputs]]) -> Inputs:
    """All samples' images one behind the other; those with fewer tiles filled up."""
    items = list(itertools.chain.from_iterable(samples))
    if not items:
        return {}
    return {name: _cat([item[name] for item in items]) for name in items[0]}


def _cat(values: Sequence[Tensor]) -> Tensor:
    if values[0].dim() != 5:
        return torch.cat(list(values))
    tiles = max(value.shape[1] for value in values)
    filled = [
        torch.cat([v, v.new_zeros(1, tiles - v.shape[1], *v.shape[2:])], dim=1)
        for v in values
    ]
    return torch.cat(filled)


def _stacked(samples: Sequence[Sequence[Inputs]]) -> Inputs:
    """[samples, images, ...], samples with fewer images filled up with zeros."""
    most = max(map(len, samples))
    if not most:
        return {}
    example = next(items[0] for items in samples if items)
    return {
        name: torch.stack(
            [
                torch.cat(
                    [item[name] for item in items]
                    + [torch.zeros_like(value)] * (most - len(items))
                )
                for items in samples
            ]
        )
        for name, value in example.items()
    }


def _token_types(model: PreTrainedModel, ids: Tensor) -> Inputs:
    """What kind each token is of, where a model asks for it."""
    types = (ids == IMAGE).int() + 2 * (ids == VIDEO).int()
    if hasattr(model.base_model, "get_rope_index"):
        return {"mm_token_type_ids": types}
    if model.config.model_type == "gemma3":
        return {"token_type_ids": types}
    return {}


# ------------------------------------------------------------------- configurations


def text(decoder: str, **fields: Any) -> PreTrainedConfig:
    """A decoder's configuration, 32 wide."""
    given = {
        "vocab_size": 100,
        "hidden_size": WIDTH,
        "intermediate_size": 48,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "initializer_range": 0.2,
        "bos_token_id": None,
        "eos_token_id": None,
        "sliding_window": None,
        "pad_token_id": PAD,
    }
    return AutoConfig.for_model(decoder, **given | fields)


def tower(kind: str, image: int = 12, **fields: Any) -> PreTrainedConfig:
    """A vision tower's configuration, 16 wide."""
    given = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": image,
        "patch_size": PATCH,
    }
    return AutoConfig.for_model(kind, **given | fields)


PLACEHOLDERS: dict[str, Any] = {"image_token_index": IMAGE, "video_token_index": VIDEO}
PINPOINTS = [[12, 24], [24, 12], [24, 24]]
ROTARY = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}


def llava(decoder: str = "llama", **fields: Any) -> PreTrainedConfig:
    return transformers.LlavaConfig(
        vision_config=tower("clip_vision_model"),
        text_config=text(decoder, **fields),
        image_token_index=IMAGE,
    )


def llava_next(decoder: str = "llama") -> PreTrainedConfig:
    return transformers.LlavaNextConfig(
        vision_config=tower("clip_vision_model"),
        text_config=text(decoder),
        image_token_index=IMAGE,
        image_grid_pinpoints=PINPOINTS,
    )


def llava_next_video() -> PreTrainedConfig:
    return transformers.LlavaNextVideoConfig(
        vision_config=tower("clip_vision_model"),
        text_config=text("llama"),
        image_grid_pinpoints=PINPOINTS,
        **PLACEHOLDERS,
    )


def video_llava() -> PreTrainedConfig:
    return transformers.VideoLlavaConfig(
        vision_config=tower("clip_vision_model"),
        text_config=text("llama"),
        **PLACEHOLDERS,
    )


def vipllava() -> PreTrainedConfig:
    return transformers.VipLlavaConfig(
        vision_config=tower("clip_vision_model"),
        text_config=text("llama"),
        image_token_index=IMAGE,
        vision_feature_layer=[-2, -1],
    )


def llava_onevision() -> PreTrainedConfig:
    return transformers.LlavaOnevisionConfig(
        vision_config=tower("siglip_vision_model"),
        text_config=text("qwen2"),
        image_grid_pinpoints=PINPOINTS,
        **PLACEHOLDERS,
    )


def qwen_vl(version: str) -> PreTrainedConfig:
    vision: dict[str, Any] = {
        "depth": 2,
        "num_heads": 2,
        "patch_size": PATCH,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    }
    if version == "qwen2_vl":
        vision |= {"embed_dim": 16, "hidden_size": WIDTH}
    else:
        vision |= {
            "hidden_size": 16,
            "out_hidden_size": WIDTH,
            "intermediate_size": 32,
        }
    if version == "qwen2_5_vl":
        vision |= {"window_size": 16, "fullatt_block_indexes": [1]}
    if version.startswith("qwen3_vl"):
        vision |= {"deepstack_visual_indexes": [0], "num_position_embeddings": 64}
    more: dict[str, Any] = {}
    if version == "qwen3_vl_moe":
        more = {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
        }
    return AutoConfig.for_model(
        version,
        vision_config=vision,
        text_config=text(f"{version}_text", rope_parameters=ROTARY, **more).to_dict(),
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=97,
        vision_end_token_id=96,
    )


def internvl() -> PreTrainedConfig:
    return transformers.InternVLConfig(
        vision_config=tower("internvl_vision", image_size=[24, 24], patch_size=[4, 4]),
        text_config=text("qwen2"),
        image_token_id=IMAGE,
    )


def gemma3() -> PreTrainedConfig:
    kinds = ["full_attention"] * LAYERS
    return transformers.Gemma3Config(
        vision_config=tower("siglip_vision_model", 24).to_dict(),
        text_config=text(
            "gemma3_text", layer_types=kinds, sliding_window=64, query_pre_attn_scalar=8
        ).to_dict(),
        image_token_index=IMAGE,
        boi_token_index=97,
        eoi_token_index=96,
        mm_tokens_per_image=9,
    )


def mistral3() -> PreTrainedConfig:
    return transformers.Mistral3Config(
        vision_config=tower("pixtral", 32),
        text_config=text("mistral"),
        image_token_index=IMAGE,
    )


def idefics3(name: str) -> PreTrainedConfig:
    return AutoConfig.for_model(
        name,
        vision_config=tower(f"{name}_vision", 24).to_dict(),
        text_config=text("llama").to_dict(),
        image_token_id=IMAGE,
        pad_token_id=PAD,
    )


def aya_vision() -> PreTrainedConfig:
    kinds = ["full_attention"] * LAYERS
    return transformers.AyaVisionConfig(
        vision_config=tower("siglip_vision_model", 24),
        text_config=text("cohere2", layer_types=kinds, sliding_window=64),
        image_token_index=IMAGE,
    )


# ------------------------------------------------------------------------- pictures


def pixels(side: int) -> Callable[[torch.Generator, int], Inputs]:
    """Images of one size."""

    def make(generator: torch.Generator, _: int) -> Inputs:
        values = torch.randn(1, 3, side, side, generator=generator)
        return {"pixel_values": values}

    return make


def frames(side: int, count: int) -> Callable[[torch.Generator, int], Inputs]:
    """Videos of some frames."""

    def make(generator: torch.Generator, _: int) -> Inputs:
        values = torch.randn(1, count, 3, side, side, generator=generator)
        return {"pixel_values_videos": values}

    return make


def tiles(generator: torch.Generator, number: int) -> Inputs:
    """Images of any resolution: a base tile and those of a grid, by size."""
    size, grid = [((12, 24), 2), ((24, 20), 4), ((24, 12), 2)][number % 3]
    values = torch.randn(1, 1 + grid, 3, 12, 12, generator=generator)
    return {"pixel_values": values, "image_sizes": torch.tensor([size])}


def patches(kind: str) -> Callable[[torch.Generator, int], Inputs]:
    """Qwen's: patches in a row, and the grid that they are of."""

    def make(generator: torch.Generator, number: int) -> Inputs:
        time = 1 if kind == "image" else 2
        grid = [(time, 4, 6), (time, 6, 6), (time, 6, 4)][number % 3]
        count = grid[0] * grid[1] * grid[2]
        values = torch.randn(count, 3 * 2 * PATCH**2, generator=generator)
        name = "pixel_values" if kind == "image" else "pixel_values_videos"
        return {name: values, f"{kind}_grid_thw": torch.tensor([grid])}

    return make


def sized(generator: torch.Generator, number: int) -> Inputs:
    """Pixtral's: images up to 32 wide, filled up, and their sizes."""
    height, width = [(16, 24), (24, 32), (32, 16)][number % 3]
    values = torch.zeros(1, 3, 32, 32)
    values[:, :, :height, :width] = torch.randn(
        1, 3, height, width, generator=generator
    )
    return {"pixel_values": values, "image_sizes": torch.tensor([(height, width)])}


def masked(generator: torch.Generator, _: int) -> Inputs:
    """Idefics3's: an image and which pixels are its own."""
    values = torch.randn(1, 3, 24, 24, generator=generator)
    mask = torch.ones(1, 24, 24, dtype=torch.bool)
    return {"pixel_values": values, "pixel_attention_mask": mask}


ZOO: dict[str, Kind] = {
    "LLaVA-1.5": Kind(llava, pixels(12), papers=True),
    "LLaVA-HR": Kind(llava_hr.tiny, pixels(64), papers=True),
    "LLaVA-NeXT": Kind(llava_next, tiles, papers=True),
    "LLaVA-NeXT (Mistral)": Kind(lambda: llava_next("mistral"), tiles, papers=True),
    "LLaVA-NeXT-Video": Kind(llava_next_video, tiles, frames(12, 8), papers=True),
    "Video-LLaVA": Kind(video_llava, pixels(12), frames(12, 8), papers=True),
    "Qwen2-VL": Kind(
        lambda: qwen_vl("qwen2_vl"), patches("image"), patches("video"), papers=True
    ),
    "VipLLaVA": Kind(vipllava, pixels(12)),
    "Aya Vision": Kind(aya_vision, pixels(24)),
    "InternVL3": Kind(internvl, pixels(24)),
    "Mistral 3": Kind(mistral3, sized),
    "Idefics3": Kind(lambda: idefics3("idefics3"), masked, per_sample=True),
    "SmolVLM": Kind(lambda: idefics3("smolvlm"), masked, per_sample=True),
    "LLaVA-OneVision": Kind(llava_onevision, tiles, frames(12, 4)),
    "Qwen2.5-VL": Kind(
        lambda: qwen_vl("qwen2_5_vl"), patches("image"), patches("video")
    ),
    "Gemma 3": Kind(gemma3, pixels(24)),
    "Qwen3-VL": Kind(
        lambda: qwen_vl("qwen3_vl"),
        patches("image"),
        patches("video"),
        times=True,
        features_until=1,
    ),
    "Qwen3-VL-MoE": Kind(
        lambda: qwen_vl("qwen3_vl_moe"),
        patches("image"),
        patches("video"),
        times=True,
        features_until=1,
    ),
}
"""By the name that documentation uses."""
