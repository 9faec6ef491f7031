"""What a scorer is given, and attention computed from it.

Plain PyTorch, traced into graphs by the passes. Nothing here depends on data for a
shape: no ``nonzero``, no boolean indexing, no ``.item()``.

Shapes: B samples, H query heads, G key heads, S tokens, D head width, E hidden width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, NamedTuple

import torch
from torch import Tensor
from typing_extensions import TypeVar

from vtprune_fx.ops import attention, received
from vtprune_fx.scorers.roles import PADDING

Value = TypeVar("Value", default=Tensor)
"""A tensor; a graph's node where passes write what a scorer reads."""


class Evidence(NamedTuple, Generic[Value]):
    """What the tokens of a layer can be rated by.

    Attributes:
        query: [B, H, S, D], rotated.
        key: [B, G, S, D], rotated; G divides H.
        mask: What the layer's attention got: [B or 1, 1, S, S], bool (True attends)
            or float (added to logits), or None for a plain causal mask.
        roles: [B, S] int64, as ``roles.token_roles`` gives them.
        scale: What the layer's attention multiplies its logits by.
        hidden: [B, S, E], the residual stream where it is cut: after the layer at
            ``after_layer``, else before it. None where the graph does not show it.
        cos: [B or 1, S, D], what queries and keys were rotated by, or None where the
            graph does not show it.
        sin: As ``cos``.
        class_attention: [B, S] float32, what a visual token's patch gets of the vision
            tower's attention (``contextual.class_attention``), for scorers that say
            they look at it (``Scorer.tower``); else None.
        receive: Computes what tokens get of the attention, as ``received.received``.
    """

    query: Value
    key: Value
    mask: Value | None
    roles: Value
    scale: float
    hidden: Value | None = None
    cos: Value | None = None
    sin: Value | None = None
    class_attention: Value | None = None
    receive: Callable[..., Tensor] = received.received


def logits(seen: Evidence) -> Tensor:
    """[B, H, S, S] float32: what the layer's attention takes the softmax of."""
    return attention.logits(seen.query, seen.key, seen.mask, seen.scale)


def strongest_from(seen: Evidence, *rows: Tensor) -> Tensor:
    """[B, W, S] float32: what tokens get of rows, by the head that gives most.

    Args:
        seen: The evidence.
        rows: W masks [B, S] of the rows that give.
    """
    return _received(seen, rows, maximum=True)


def mean_from(seen: Evidence, rows: Tensor) -> Tensor:
    """[B, S] float32: what tokens get of rows [B, S], mean over rows and heads."""
    [total] = _received(seen, (rows,), maximum=False).unbind(dim=1)
    return total / rows.sum(dim=1, keepdim=True).clamp(min=1)


def _received(seen: Evidence, rows: tuple[Tensor, ...], *, maximum: bool) -> Tensor:
    weights = torch.stack(rows, dim=1).float()
    return seen.receive(
        seen.query, seen.key, seen.mask, weights, None, seen.scale, maximum
    )


def last_token(roles: Tensor) -> Tensor:
    """[B, S] bool: where each sample's last token stands."""
    places = torch.arange(roles.shape[1], device=roles.device)
    places = places.masked_fill(roles == PADDING, -1)
    return places == places.amax(dim=1, keepdim=True)
