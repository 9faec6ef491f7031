"""Decoding on a ragged cache, through transformers' extension points.

After a pruned prefill the layers' caches differ in length, while transformers builds
one mask for all layers, as long as the first layer's cache. ``ATTENTION`` is an
attention implementation like any other (``model.set_attn_implementation``) that fits
the mask to its layer.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Protocol, cast

import torch
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from vtprune_fx.errors import InputError
from vtprune_fx.models.ragged_cache import check_sees_all

ATTENTION = "vtprune_ragged_sdpa"
"""Name of the attention implementation in transformers' registries."""


def ragged_sdpa(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: object,
) -> tuple[Tensor, Tensor | None]:
    """Scaled dot product attention whose mask is made for caches of several lengths.

    Args:
        module: The attention module.
        query: [B, H, Q, D].
        key: [B, G, N, D].
        value: [B, G, N, D].
        attention_mask: [B, L, Q, M] with M >= N, a mask for each layer
            (``ragged_cache.attention_mask``), or [B, 1, Q, M] for all, or None. One for
            all may be longer than the keys: padding comes first and, where all
            samples have images, is kept; the new tokens come last; dropped tokens
            were between them.
        kwargs: Further arguments of transformers (scaling, dropout, ...).

    Returns:
        [B, Q, H, D], and None for the weights.
    """
    if attention_mask is not None:
        layer = cast("_Layer", module)
        attention_mask = _of_layer(layer, attention_mask, query, key)
    attend: Callable[..., tuple[Tensor, Tensor | None]] = sdpa_attention_forward
    return attend(module, query, key, value, attention_mask, **kwargs)


class _Layer(Protocol):
    """The part of an attention module that is read."""

    layer_idx: int


def _of_layer(module: _Layer, mask: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """The layer's part of a mask, [B, 1, Q, N]."""
    if mask.shape[1] > 1:
        return mask[:, module.layer_idx, None, :, : key.shape[2]]
    new = query.shape[2]
    cached, came = key.shape[2] - new, mask.shape[3] - new
    return torch.cat((mask[:, :, :, :cached], mask[:, :, :, came:]), dim=3)


def _mask(*args: object, use_vmap: bool = False, **kwargs: object) -> Tensor | None:
    """Transformers' mask, a model's patterns made by broadcasting.

    Made by vmap they could not be traced a second time, to ATen operators.
    """
    mask: Callable[..., Tensor | None] = sdpa_mask
    return mask(*args, **kwargs)


AttentionInterface.register(ATTENTION, ragged_sdpa)
AttentionMaskInterface.register(ATTENTION, _mask)


def check_decoder(text: PreTrainedConfig) -> None:
    """Refuse a decoder that would give wrong results on a ragged cache.

    Raises:
        InputError: Layers attend to a window, or ``check_traceable`` refuses it.
    """
    check_sees_all(text)
    check_traceable(text)


def check_traceable(text: PreTrainedConfig) -> None:
    """Refuse a decoder whose graph cannot be pruned, with a cache or without one.

    Raises:
        InputError: Logits of its attention are capped, which fused attention cannot do,
            or ``check_rotary`` refuses it.
    """
    check_rotary(text)
    cap = getattr(text, "attn_logit_softcapping", None)
    if cap is not None:
        raise InputError(
            "attention of the decoder",
            expected="the softmax of plain logits",
            found=f"logits that are capped at {cap:g}",
            fix="Fused attention cannot cap them. Load the model with "
            "text_config.attn_logit_softcapping = None if its answers allow it.",
        )


def check_rotary(text: PreTrainedConfig) -> None:
    """Refuse rotary positions whose frequencies are made anew for longer prompts.

    Which ones a layer has cached keys of depends on what ran before, and no graph
    branches on values.

    Raises:
        InputError: They are of that kind.
    """
    given = getattr(text, "rope_parameters", None) or {}
    each = (given, *(kind for kind in given.values() if isinstance(kind, dict)))
    if any(kind.get("rope_type") == "dynamic" for kind in each):
        raise InputError(
            "rotary positions of the decoder",
            expected="frequencies that are the same for every prompt",
            found="rope_type 'dynamic', which makes them by the longest prompt so far",
            fix="Where no prompt with its answer exceeds max_position_embeddings, load "
            "the model with rope_type 'default' in text_config.rope_parameters.",
        )


def use_ragged_attention(model: PreTrainedModel) -> None:
    """Let a model's decoder run on ragged caches; its vision tower is unchanged."""
    set_attention(model, ATTENTION)


def set_attention(model: PreTrainedModel, name: str) -> None:
    """Choose the attention implementation of a model's decoder.

    Set on the decoder alone: for a model, transformers would validate the towers too,
    and some of their parts have no attention.
    """
    decoder: _Decoder = model.get_decoder()
    decoder.set_attn_implementation(name)


def can_set_attention(model: PreTrainedModel) -> bool:
    """Whether the decoder takes its attention from transformers' registry."""
    decoder: _Decoder = model.get_decoder()
    return decoder._can_set_attn_implementation()


class _Decoder(Protocol):
    """Methods of a decoder, which transformers types as a plain module."""

    def set_attn_implementation(self, name: str, /) -> None: ...

    def _can_set_attn_implementation(self) -> bool: ...


@contextlib.contextmanager
def attention_implementation(model: PreTrainedModel, name: str) -> Iterator[None]:
    """Run a model's decoder with an attention implementation inside the block.

    Args:
        model: An unmodified transformers model.
        name: Of the implementation, in transformers' registry. The one that was set
            before is set again at the end of the block.
    """
    before = model.config.get_text_config()._attn_implementation
    set_attention(model, name)
    try:
        yield
    finally:
        set_attention(model, before)


def mark_dynamic(axis: int, *values: Tensor | None) -> None:
    """Mark a dimension of each value as one that varies from call to call."""
    for value in values:
        if value is not None:
            torch._dynamo.mark_dynamic(value, axis)
