"""What a scorer is given, and attention computed from it.

Plain PyTorch, traced into graphs by the passes. Nothing here depends on data for a
shape: no ``nonzero``, no boolean indexing, no ``.item()``.

Shapes: B samples, H query heads, G key heads, S tokens, D head width, E hidden width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from vtprune_fx.scoring import PADDING

_NEVER = torch.finfo(torch.float32).min
"""Logit of a pair that may not attend. Finite, so that a row which may attend nothing
(left padding) has a finite softmax instead of NaN."""


class Evidence(NamedTuple):
    """What the tokens of a layer can be rated by.

    Attributes:
        query: [B, H, S, D], rotated.
        key: [B, G, S, D], rotated; G divides H.
        mask: What the layer's own attention got: [B or 1, 1, S, S], bool (True attends)
            or float (added to logits), or None for a plain causal mask.
        roles: [B, S] int64, as ``scoring.token_roles`` gives them.
        scale: What the layer's attention multiplies its logits by.
        hidden: [B, S, E], the residual stream where it is cut: behind the layer at
            ``after_layer``, else ahead of it. None where the graph does not show it.
        cos: [B or 1, S, D], what queries and keys were rotated by, or None where the
            graph does not show it.
        sin: As ``cos``.
        class_attention: [B, S] float32, what a visual token's patch gets of the vision
            tower's attention (``patches.class_attention``), for scorers that say they
            look at it (``Scorer.tower``); else None.
    """

    query: Tensor
    key: Tensor
    mask: Tensor | None
    roles: Tensor
    scale: float
    hidden: Tensor | None = None
    cos: Tensor | None = None
    sin: Tensor | None = None
    class_attention: Tensor | None = None


def logits(seen: Evidence) -> Tensor:
    """[B, H, S, S] float32: what the layer's attention takes the softmax of."""
    key = per_query_head(seen)
    products = seen.query @ key.transpose(2, 3) * seen.scale
    return products.float() + attention_bias(seen.mask, seen.query)


def last_row(seen: Evidence) -> Tensor:
    """[B, H, S] float32: attention of each sample's last token to all others."""
    samples, last = _last_tokens(seen.roles)
    query = seen.query.transpose(1, 2)[samples, last]
    products = (query[:, :, None] @ per_query_head(seen).transpose(2, 3)) * seen.scale
    bias = attention_bias(seen.mask, seen.query)
    # Not len(): it would make a constant of a symbolic size.
    bias = bias.expand(seen.roles.shape[0], -1, -1, -1)[:, 0][samples, last]
    return (products[:, :, 0].float() + bias[:, None]).softmax(dim=2)


def _last_tokens(roles: Tensor) -> tuple[Tensor, Tensor]:
    """[B] and [B]: each sample's number, and where its last token stands."""
    places = torch.arange(roles.shape[1], device=roles.device)
    last = places.masked_fill(roles == PADDING, -1).amax(dim=1)
    return torch.arange(roles.shape[0], device=roles.device), last


def per_query_head(seen: Evidence) -> Tensor:
    """[B, H, S, D]: each key head, once for each query head that it serves."""
    groups = seen.query.shape[1] // seen.key.shape[1]
    return seen.key if groups == 1 else seen.key.repeat_interleave(groups, dim=1)


def attention_bias(mask: Tensor | None, query: Tensor) -> Tensor:
    """A mask as float32 to add to logits, [B or 1, 1, S, S], at least ``_NEVER``.

    Args:
        mask: As in ``Evidence``.
        query: [B, H, S, D].
    """
    if mask is None:
        order = torch.arange(query.shape[2], device=query.device)
        mask = (order[:, None] >= order)[None, None]
    if mask.dtype == torch.bool:
        return (~mask).float() * _NEVER
    return mask.float().clamp(min=_NEVER)
