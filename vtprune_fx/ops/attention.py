"""Attention written out: logits, and masks as what is added to them.

Shapes: B samples, H query heads, G key heads (G divides H), S tokens, D head width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

NEVER = torch.finfo(torch.float32).min
"""Logit of a pair that may not attend. Finite, so that a row which may attend nothing
(left padding) has a finite softmax instead of NaN."""


def logits(query: Tensor, key: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """[B, H, S, S] float32: what attention takes the softmax of."""
    products = query @ per_query_head(query, key).transpose(2, 3) * scale
    return products.float() + attention_bias(mask, query)


def per_query_head(query: Tensor, key: Tensor) -> Tensor:
    """[B, H, S, D]: each key head, once for each query head that it serves."""
    groups = query.shape[1] // key.shape[1]
    return key if groups == 1 else key.repeat_interleave(groups, dim=1)


def attention_bias(mask: Tensor | None, query: Tensor) -> Tensor:
    """A mask as float32 to add to logits, [B or 1, 1, S, S], at least ``NEVER``.

    Args:
        mask: As ``received`` takes it.
        query: [B, H, S, D].
    """
    return added_bias(causal_mask(query)[None, None] if mask is None else mask)


def causal_mask(query: Tensor) -> Tensor:
    """[S, S] bool."""
    order = torch.arange(query.shape[2], device=query.device)
    return order[:, None] >= order


def added_bias(mask: Tensor) -> Tensor:
    """A mask of any shape as what is added to logits."""
    if mask.dtype == torch.bool:
        return (~mask).float() * NEVER
    return mask.float().clamp(min=NEVER)


def lets_through(mask: Tensor) -> Tensor:
    """Bool: where a mask, bool or float, lets anything through."""
    return mask if mask.dtype == torch.bool else mask > NEVER / 2


class Received(NamedTuple):
    """What ``received.received`` is given; shapes are said there."""

    query: Tensor
    key: Tensor
    mask: Tensor | None
    weights: Tensor
    lse: Tensor | None
    scale: float
    maximum: bool
