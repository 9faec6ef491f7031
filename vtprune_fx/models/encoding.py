"""What a model works out from values ahead of its decoder, done before a graph is made.

An encoder that is told more than pixels (sizes of images, grids of patches, which of
the pixels are padding) makes as many features as those values say, and some models
count positions along three axes by them. No graph can: shapes may not depend on values.
``encoded`` does both as ``generate`` does, through transformers' own methods, so the
graph starts with features and positions. A model whose encoders see pixels alone stays
whole.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from vtprune_fx.models.arguments import cache_argument, given_cache

_PIXELS = frozenset({"pixel_values", "pixel_values_videos", "pixel_values_images"})

FEATURES = "mm_encoder_outputs"
"""The argument of ``forward`` that takes what encoders gave."""


def encoded(
    model: PreTrainedModel, inputs: Mapping[str, Any], *, anyway: bool = False
) -> dict[str, Any]:
    """Inputs whose images and videos are encoded, where sizes depend on values.

    Args:
        model: An unmodified transformers model.
        inputs: What its processor returned.
        anyway: Encode where sizes do not depend on values, too.

    Returns:
        The same, or with ``mm_encoder_outputs`` and ``position_ids`` in the place of
        pixels and what came with them.
    """
    owner: Any = model
    ready = dict(inputs)
    positions = own_positions(model, ready)
    if positions is not None:
        ready["position_ids"] = positions
    if gives_pixels(ready) and (anyway or is_told_sizes(model, ready)):
        # The method by which ``generate`` encodes, for every model alike.
        ready = owner._prepare_multimodal_encoder_kwargs_for_generation(ready)
    if ready.get(FEATURES):
        ready[FEATURES] = {kind: _joined(f) for kind, f in ready[FEATURES].items()}
    return ready


def own_positions(model: PreTrainedModel, inputs: Mapping[str, Any]) -> Tensor | None:
    """[axes, B, S]: positions that a model counts along several axes by itself.

    None where they are given, or count along one axis as everywhere.

    Args:
        model: The model, which remembers how far positions have come.
        inputs: What it is called with; the cache among them if it is not empty.
    """
    base: Any = model.base_model
    count = getattr(base, "compute_3d_position_ids", None)
    ids: Tensor | None = inputs.get("input_ids")
    if count is None or ids is None or inputs.get("position_ids") is not None:
        return None
    given = {name: inputs.get(name) for name in inspect.signature(count).parameters}
    given["inputs_embeds"] = torch.empty(*ids.shape, 0, device=ids.device)
    cache = given_cache(inputs)
    if cache is not None and int(cache.get_seq_length()) == 0:
        cache = None
    if (name := cache_argument(count)) is not None:
        given[name] = cache
    found: Tensor | None = count(**given)
    return None if found is None else found[..., -ids.shape[1] :]


def token_axis(value: object, prompt: torch.Size) -> int | None:
    """Which axis of an input runs over the prompt's tokens.

    Args:
        value: The input: [B, S, ...], or positions along several axes [axes, B, S].
        prompt: (B, S).
    """
    if not isinstance(value, Tensor) or value.dim() < 2:
        return None
    if value.shape[:2] == prompt:
        return 1
    return value.dim() - 1 if value.shape[-2:] == prompt else None


def gives_pixels(inputs: Mapping[str, Any]) -> bool:
    """Whether there are images or videos to encode."""
    return any(inputs.get(name) is not None for name in _PIXELS)


def gives_images(inputs: Mapping[str, Any]) -> bool:
    """Whether there are images or videos, encoded or not."""
    return gives_pixels(inputs) or bool(inputs.get(FEATURES))


def is_told_sizes(model: PreTrainedModel, inputs: Mapping[str, Any]) -> bool:
    """Whether encoders are given more than pixels."""
    given = {name for name, value in inputs.items() if value is not None}
    encoders = (
        getattr(model.base_model, f"get_{kind}_features", None) for kind in _KINDS
    )
    taken = (inspect.signature(e).parameters for e in encoders if e is not None)
    return any(given & parameters.keys() - _PIXELS for parameters in taken)


_KINDS = ("image", "video")


def _joined(features: Any) -> Any:
    """Features of all images as one tensor, whatever their number is."""
    kept = {"pooler_output": _one(features.pooler_output)}
    if (later := getattr(features, "deepstack_features", None)) is not None:
        kept["deepstack_features"] = [_one(each) for each in later]
    return type(features)(**kept)


def _one(parts: Any) -> Any:
    return parts if isinstance(parts, Tensor) else [torch.cat(list(parts))]
