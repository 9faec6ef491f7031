"""What each token of a prompt is there for.

Plain PyTorch, traced into graphs by the passes. Nothing here depends on data for a
shape: no ``nonzero``, no boolean indexing, no ``.item()``.

Shapes: B samples, S tokens.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

CONTEXT, VISUAL, INSTRUCTION, PADDING = 0, 1, 2, 3
"""Roles of tokens: text before or between images, images, text after the last, and
padding, which no token attends to."""


def marked(*masks: Tensor) -> Tensor:
    """[B, S] bool: what any of some masks [B, S] or [B, S, 1] marks."""
    flat = (mask.flatten(1) for mask in masks)
    return functools.reduce(torch.logical_or, flat)


def token_roles(visual: Tensor, mask: Tensor | None) -> Tensor:
    """What each token of a prompt is there for.

    Text is instruction after the last image of the prompt, also once that
    image has lost all its tokens; hence roles are taken once and gathered at cuts.

    Args:
        visual: [B, S] or [B, S, 1] bool.
        mask: What the first layer's attention got: [B or 1, 1, S, S], bool (True
            attends) or float (added to logits), or None for a plain causal mask.

    Returns:
        [B, S] int64.
    """
    visual = visual.flatten(1)
    seen = visual.long().cumsum(dim=1)
    last = seen == visual.long().sum(dim=1, keepdim=True)
    roles = last.long() * INSTRUCTION * (~visual).long() + visual.long() * VISUAL
    return roles if mask is None else roles.masked_fill(~_attended(mask), PADDING)


def _attended(mask: Tensor) -> Tensor:
    """[B or 1, S]: whether any query may attend to a key."""
    if mask.dtype != torch.bool:
        mask = mask > torch.finfo(mask.dtype).min / 2
    return mask.any(dim=2)[:, 0]


def visual_counts(roles: Tensor) -> Tensor:
    """[B]: visual tokens of each sample."""
    return (roles == VISUAL).sum(dim=1)


def padding_counts(roles: Tensor) -> Tensor:
    """[B, 1]: tokens of padding in each row."""
    return (roles == PADDING).sum(dim=1, keepdim=True)
