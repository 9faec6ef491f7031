"""What a cut does on tensors: roles, the order of leaving, and who stays.

Plain PyTorch, traced into graphs by the passes. Nothing here depends on data for a
shape: no ``nonzero``, no boolean indexing, no ``.item()``. How tokens are rated is in
``scorers``.

Shapes: B samples, S tokens.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

CONTEXT, VISUAL, INSTRUCTION, PADDING = 0, 1, 2, 3
"""Roles of tokens: text ahead of or between images, images, text behind the last, and
what nobody attends to."""


def marked(*masks: Tensor) -> Tensor:
    """[B, S] bool: what any of some masks [B, S] or [B, S, 1] marks."""
    flat = (mask.flatten(1) for mask in masks)
    return functools.reduce(torch.logical_or, flat)


def token_roles(visual: Tensor, mask: Tensor | None) -> Tensor:
    """What each token of a prompt is there for.

    Text is instruction behind the last image of the prompt as it came, also once that
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


def lowest_first(scores: Tensor, roles: Tensor) -> Tensor:
    """[B, S] positions in the order in which they would leave.

    Of equal scores the earlier token leaves first; one without a score (NaN) leaves
    ahead of all. Padding leaves behind the last visual token, text never: a prompt of
    text alone beside one with an image becomes shorter by losing what nobody attends
    to.
    """
    most = torch.finfo(torch.float32).max
    scores = scores.float().masked_fill(scores.isnan(), -most)
    scores = scores.clamp(-most, most / 2).masked_fill(roles == PADDING, most)
    text = (roles == CONTEXT) | (roles == INSTRUCTION)
    scores = scores.masked_fill(text, float("inf"))
    return torch.sort(scores, dim=1, stable=True).indices


def enough_to_drop(roles: Tensor, dropped: int, exactly: int | None) -> Tensor:
    """Scalar bool: every sample holds the visual tokens that the cuts count on.

    A sample of text alone holds as much padding as leaves.

    Args:
        roles: [B, S].
        dropped: How many tokens leave in all.
        exactly: How many visual tokens a sample must hold, if not any number from
            ``dropped`` on.
    """
    visual = (roles == VISUAL).sum(dim=1)
    padding = (roles == PADDING).sum(dim=1)
    enough = visual >= dropped if exactly is None else visual == exactly
    return (enough | ((visual == 0) & (padding >= dropped))).all()
