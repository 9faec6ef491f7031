"""Decoding on a ragged cache, through transformers' own extension points.

After a pruned prefill each layer's cache has its own length, while transformers builds
one mask for all layers, as long as the first layer's cache. ``ATTENTION`` is an
attention implementation like any other (``model.set_attn_implementation``) that fits
the mask to its layer.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from vtprune_fx.errors import InputError

ATTENTION = "vtprune_ragged_sdpa"
"""Name of the attention implementation in transformers' registries."""


def ragged_sdpa(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Scaled dot product attention whose mask is made for caches of several lengths.

    Args:
        module: The attention module.
        query: [B, H, Q, D].
        key: [B, G, N, D].
        value: [B, G, N, D].
        attention_mask: [B, L, Q, M] with M >= N, a mask for each layer
            (``cache.attention_mask``), or [B, 1, Q, M] for all, or None. One for all
            may be longer than the keys for a single new token: that sees all that is no
            padding, which stands in front and, where all samples have images, stays.
        kwargs: What transformers passes on (scaling, dropout, ...).

    Returns:
        [B, Q, H, D], and None for the weights.

    Raises:
        InputError: Several new tokens meet one mask longer than the keys: a second
            prompt on a pruned cache, whose own causal part cropping would shift.
    """
    if attention_mask is not None:
        attention_mask = _of_layer(module, attention_mask, query, key)
    output: tuple[Tensor, Tensor | None] = sdpa_attention_forward(
        module, query, key, value, attention_mask, **kwargs
    )
    return output


def _of_layer(module: Any, mask: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """The layer's own part of a mask, [B, 1, Q, N]."""
    if mask.shape[1] > 1:
        mask = mask[:, module.layer_idx, None]
    elif query.shape[2] > 1 and mask.shape[3] > key.shape[2]:
        raise InputError(
            "prompt on a pruned cache",
            expected="one new token at a time",
            found=f"{query.shape[2]} tokens",
            fix="Generate with vtprune_fx.compile, or start from an empty cache.",
        )
    return mask[:, :, :, : key.shape[2]]


def _mask(*args: Any, use_vmap: bool = False, **kwargs: Any) -> Tensor | None:
    """Transformers' mask, patterns of a model's own made by broadcasting.

    Made by vmap they could not be traced a second time, to ATen operators.
    """
    return sdpa_mask(*args, **kwargs)


AttentionInterface.register(ATTENTION, ragged_sdpa)
AttentionMaskInterface.register(ATTENTION, _mask)


def use_ragged_attention(model: PreTrainedModel) -> None:
    """Let a model's decoder run on ragged caches; its vision tower stays as it is."""
    set_attention(model, ATTENTION)


def set_attention(model: PreTrainedModel, name: str) -> None:
    """Choose the attention implementation of a model's decoder alone."""
    alone = model.config.get_text_config() is model.config
    model.set_attn_implementation(name if alone else {"text_config": name})


@contextlib.contextmanager
def ragged_attention(model: PreTrainedModel) -> Iterator[None]:
    """Let a model's decoder run on ragged caches for a while."""
    before = model.config.get_text_config()._attn_implementation
    use_ragged_attention(model)
    try:
        yield
    finally:
        set_attention(model, before)


def mark_dynamic(axis: int, *values: Tensor | None) -> None:
    """Tell Dynamo that a dimension of each value varies from call to call."""
    for value in values:
        if value is not None:
            torch._dynamo.mark_dynamic(value, axis)
