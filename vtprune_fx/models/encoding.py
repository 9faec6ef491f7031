"""Computations that depend on values, done before tracing the decoder.

An encoder that takes more than pixels (sizes of images, grids of patches, which pixels
are padding) makes as many features as those values say, and some models count
positions along three axes by them. No graph can: shapes may not depend on values.
``encoded`` does both as ``generate`` does, through transformers' methods, so the graph
starts with features and positions. A model whose encoders take pixels alone is traced
with its encoders.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping
from typing import Any, Protocol, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from vtprune_fx.models.arguments import cache_argument, given_cache

_PIXELS = frozenset({"pixel_values", "pixel_values_videos", "pixel_values_images"})

FEATURES = "mm_encoder_outputs"
"""The argument of ``forward`` that takes the encoders' outputs."""


def encoded(
    model: PreTrainedModel, inputs: Mapping[str, object], *, anyway: bool = False
) -> dict[str, Any]:
    """Inputs whose images and videos are encoded, where sizes depend on values.

    Args:
        model: An unmodified transformers model.
        inputs: What its processor returned.
        anyway: Encode where sizes do not depend on values, too.

    Returns:
        The same, or with ``mm_encoder_outputs`` and ``position_ids`` in place of pixels
        and their sizes.
    """
    ready: dict[str, Any] = dict(inputs)
    positions = model_positions(model, ready)
    if positions is not None:
        ready["position_ids"] = positions
    if gives_pixels(ready) and (anyway or takes_sizes(model, ready)):
        # The method by which ``generate`` encodes, the same for every model.
        encoder = cast("_Encodes", model)
        ready = encoder._prepare_multimodal_encoder_kwargs_for_generation(ready)
    if ready.get(FEATURES):
        ready[FEATURES] = {kind: _joined(f) for kind, f in ready[FEATURES].items()}
    return ready


class _Encodes(Protocol):
    """A model with the encoding step of ``generate``, which has a wider type."""

    def _prepare_multimodal_encoder_kwargs_for_generation(
        self, inputs: dict[str, Any], /
    ) -> dict[str, Any]: ...


def prefill_inputs(
    model: PreTrainedModel, inputs: Mapping[str, object]
) -> dict[str, Any]:
    """Inputs of an exported prefill graph, from a processor's output.

    Args:
        model: An unmodified transformers model.
        inputs: What its processor returned, ``attention_mask`` [B, S] among it.

    Returns:
        The same with ``position_ids``, and with features in place of pixels where the
        model's encoders take sizes (``encoded``).
    """
    with torch.no_grad():
        ready = encoded(model, inputs)
    if ready.get("position_ids") is None:
        ready["position_ids"] = counted_positions(ready["attention_mask"])
    return ready


def counted_positions(attention_mask: Tensor) -> Tensor:
    """Positions as ``generate`` counts them along one axis: [B, S] -> [B, S].

    Each sample's first token has position 0; padding before it has 0 too.

    Args:
        attention_mask: 1 where a token is, 0 where padding is.
    """
    return (attention_mask.cumsum(1) - 1).clamp(min=0)


def model_positions(
    model: PreTrainedModel, inputs: Mapping[str, object]
) -> Tensor | None:
    """[axes, B, S]: positions of a model that counts them along several axes.

    None where they are given, or are counted along one axis.

    Args:
        model: The model. It keeps how far it has counted, for later steps.
        inputs: What it is called with, its cache among them unless that is empty.
    """
    count = getattr(model.base_model, "compute_3d_position_ids", None)
    ids = inputs.get("input_ids")
    if (
        count is None
        or not isinstance(ids, Tensor)
        or inputs.get("position_ids") is not None
    ):
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
    """Which axis of an input runs over the prompt's tokens, None if none does.

    Args:
        value: The input: [B, S, ...], or positions along several axes [axes, B, S].
        prompt: (B, S).
    """
    if not isinstance(value, Tensor) or value.dim() < 2:
        return None
    if value.shape[:2] == prompt:
        return 1
    return value.dim() - 1 if value.shape[-2:] == prompt else None


def gives_pixels(inputs: Mapping[str, object]) -> bool:
    """Whether there are images or videos to encode."""
    return any(inputs.get(name) is not None for name in _PIXELS)


def gives_images(inputs: Mapping[str, object]) -> bool:
    """Whether there are images or videos, encoded or not."""
    return gives_pixels(inputs) or bool(inputs.get(FEATURES))


def takes_sizes(model: PreTrainedModel, inputs: Mapping[str, object]) -> bool:
    """Whether the model's encoders take any input except pixels."""
    given = {name for name, value in inputs.items() if value is not None}
    encoders = (
        getattr(model.base_model, f"get_{kind}_features", None) for kind in _KINDS
    )
    taken = (inspect.signature(e).parameters for e in encoders if e is not None)
    return any(given & parameters.keys() - _PIXELS for parameters in taken)


_KINDS = ("image", "video")


_UNREAD = frozenset({"last_hidden_state", "hidden_states", "attentions"})
"""Fields of an encoder's output that no decoder reads where features are pooled."""


def _joined(features: ModelOutput) -> ModelOutput:
    """An encoder's output with the features of all images as one tensor.

    Whatever the number of images, and with all that a model may read beside them: some
    have no pooled features, others features for later layers.
    """
    kind: Any = type(features)
    kept = dict.fromkeys(field.name for field in dataclasses.fields(kind))
    pooled = getattr(features, "pooler_output", None) is not None
    for name, value in features.items():
        if name == "deepstack_features":
            kept[name] = [_one(each) for each in value]
        elif not pooled or name not in _UNREAD:
            kept[name] = _one(value)
    made: ModelOutput = kind(**kept)
    return made


def _one(parts: object) -> object:
    """Several tensors as a list of one, their rows in order; all else unchanged."""
    if not isinstance(parts, (list, tuple)):
        return parts
    tensors = [part for part in parts if isinstance(part, Tensor)]
    return [torch.cat(tensors)] if tensors and len(tensors) == len(parts) else parts
