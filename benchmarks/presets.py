"""Models with random weights at sizes that benchmarks share, prompts and recipes."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoModelForImageTextToText, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from vtprune_fx.fitting.coalesce import coalesced
from vtprune_fx.fitting.search import Prompts
from vtprune_fx.models.encoding import FEATURES
from vtprune_fx.models.weightless import load_config
from vtprune_fx.recipes.counting import Geometry, cost
from vtprune_fx.recipes.schema import Cut, Recipe

TEXT_BEFORE, TEXT_AFTER = 35, 40
"""Tokens of text before the image, and after it."""

FEW = 6
"""Cuts of a merged recipe at most."""

_SMALL_TOWER = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
}
"""Outside of all recipes, so small where a CPU would spend its time in it."""


def _decoder(hidden: int, intermediate: int, heads: int, layers: int) -> dict[str, int]:
    return {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "num_hidden_layers": layers,
    }


_SIZES: dict[str, tuple[str, dict[str, int], dict[str, int]]] = {
    # A configuration that ships, and what differs from it in the decoder and the tower.
    "small": ("llava-1.5-7b", _decoder(512, 1408, 8, 8), _SMALL_TOWER),
    "cpu-mid": ("llava-1.5-7b", _decoder(1024, 2752, 16, 32), _SMALL_TOWER),
    "llava-7b": ("llava-1.5-7b", {}, {}),
    "llava-13b": ("llava-1.5-13b", {}, {}),
    "next-7b": ("llava-next-34b", _decoder(4096, 11008, 32, 32), {}),
}

PRESETS = tuple(_SIZES)

_VOCABULARY = 2048
"""Of models with a small tower: the head is outside of all recipes too."""


def config_of(preset: str, layers: int | None = None) -> Any:
    """The configuration of a preset, with another number of decoder layers if given."""
    name, text, vision = _SIZES[preset]
    config: Any = load_config(name)
    decoder, tower = config.get_text_config(), config.vision_config
    for part, sizes in ((decoder, text), (tower, vision)):
        for field, size in sizes.items():
            setattr(part, field, size)
    if layers is not None:
        decoder.num_hidden_layers = layers
    decoder.head_dim = decoder.hidden_size // decoder.num_attention_heads
    if vision:
        decoder.vocab_size = _VOCABULARY
        config.image_token_id = _VOCABULARY - 1
        config.pad_token_id = decoder.pad_token_id = 0
    return config


def build(
    preset: str, device: str, dtype: torch.dtype, layers: int | None = None
) -> PreTrainedModel:
    """A model with random weights, with another number of decoder layers if given."""
    torch.manual_seed(0)
    with torch.device(device):
        model: PreTrainedModel = AutoModelForImageTextToText.from_config(
            config_of(preset, layers), dtype=dtype, attn_implementation="sdpa"
        )
    model.eval()
    return model


def prompt(model: PreTrainedModel, batch: int, visual: int | None) -> dict[str, Any]:
    """A batch of prompts with one image each, or as many as make ``visual`` tokens.

    Models that make as many tokens as an image is large are given random features.
    """
    config: Any = model.config
    vision = config.vision_config
    each = (vision.image_size // vision.patch_size) ** 2
    given: dict[str, Any]
    if config.model_type == "llava":
        images = max(1, (visual or each) // each)
        tokens = images * each
        size = (vision.num_channels, vision.image_size, vision.image_size)
        given = {"pixel_values": _random(model, batch * images, *size)}
    else:
        tokens = visual or 5 * each
        rows = _random(model, batch * tokens, config.get_text_config().hidden_size)
        # A list as encoders of this kind give one, though typed as a tensor.
        listed: Any = list(torch.split(rows, tokens))
        features = BaseModelOutputWithPooling(pooler_output=listed)
        given = {FEATURES: {"image": features}}
    ids = torch.randint(
        3, 1000, (batch, TEXT_BEFORE + tokens + TEXT_AFTER), device=model.device
    )
    ids[:, TEXT_BEFORE:-TEXT_AFTER] = config.image_token_id
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **given}


def _random(model: PreTrainedModel, *shape: int) -> torch.Tensor:
    return torch.randn(shape, device=model.device, dtype=model.dtype)


def coalesced_recipe(recipe: Recipe, geometry: Geometry, visual: int) -> Recipe:
    """A recipe's cuts merged into few that save as much.

    Merged as if all visual tokens held equal shares of the attention: of random weights
    nothing more is known, and time does not depend on which tokens are kept.
    """
    text, layers = TEXT_BEFORE + TEXT_AFTER, geometry.layers
    drops = recipe.drops(visual)
    kept = torch.linspace(0, 1, visual + 1, dtype=torch.double).expand(layers, -1)
    merged = coalesced(
        [drops.get(layer, 0) for layer in range(layers)],
        FEW,
        kept,
        geometry,
        Prompts(torch.tensor([visual]), torch.tensor([text])),
        cost(recipe, geometry, visual, text).total.saved,
    )
    cuts = tuple(
        Cut(layer=layer, drop=drop) for layer, drop in enumerate(merged) if drop
    )
    return recipe.model_copy(update={"cuts": cuts, "of": visual})


def realisation(dense: Sequence[float], pruned: Sequence[float], saved: float) -> float:
    """The median over rounds of time saved over MACs saved, both as shares."""
    pairs = zip(dense, pruned, strict=True)
    return statistics.median((1 - ours / full) / saved for full, ours in pairs)
