"""Who stays, and what is gathered of them, as one operator each.

What a compiler plans costs it time: a score, a choice and the gathers of a cut are some
forty nodes of ATen, a whole decoder layer fifty-five. On a CPU nothing is won by fusing
them, so there each is one node that runs as it is written here.

Shapes: B samples, S tokens, K of them left.
"""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor

from vtprune_fx.operators import operator
from vtprune_fx.scorers import rate_of
from vtprune_fx.scoring import lowest_first


def _chosen(roles: Tensor, drop: int, *_: object) -> Tensor:
    return roles.new_empty(roles.shape[0], roles.shape[1] - drop)


@operator("vtprune::choose", _chosen)
def choose(
    roles: Tensor,
    drop: int,
    score: str,
    options: str,
    query: Tensor | None,
    key: Tensor | None,
    mask: Tensor | None,
    scale: float,
    hidden: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    class_attention: Tensor | None,
) -> Tensor:
    """Positions of those that stay when a scorer's lowest leave.

    Args:
        roles: [B, S] int64.
        drop: How many leave.
        score: Name of the scorer.
        options: Its options, as JSON.
        query: As in ``Evidence``; None where the scorer does not read it.
        key: As ``query``.
        mask: As ``query``.
        scale: As in ``Evidence``.
        hidden: As ``query``.
        cos: As ``query``.
        sin: As ``query``.
        class_attention: As ``query``.

    Returns:
        [B, S - drop] int64, ascending: a causal mask stays causal.
    """
    evidence = (query, key, mask, roles, scale, hidden, cos, sin, class_attention)
    scores = rate_of(score, json.loads(options))(*evidence)
    return lowest_first(scores, roles)[:, drop:].sort(dim=1).values


def _taken(value: Tensor, keep: Tensor, axes: list[int]) -> Tensor:
    shape = [keep.shape[0], *value.shape[1:]]
    for axis in axes:
        shape[axis] = keep.shape[1]
    return value.new_empty(shape)


@operator("vtprune::take", _taken)
def take(value: Tensor, keep: Tensor, axes: list[int]) -> Tensor:
    """Each sample's own tokens along a value's token axes.

    Args:
        value: [B or 1, ..., S, ...].
        keep: [B, K] positions.
        axes: The token axes, one or two.

    Returns:
        [B, ..., K, ...].
    """
    samples = value.expand(len(keep), *value.shape[1:])
    taken = []
    for sample, stays in zip(samples, keep, strict=True):
        own = sample
        for axis in axes:
            own = _of_one(own, stays, axis - 1)
        taken.append(own)
    return torch.stack(taken) if len(taken) > 1 else taken[0][None]


def _of_one(sample: Tensor, stays: Tensor, axis: int) -> Tensor:
    """What stays along an axis: columns one by one, anything wider as a whole.

    By ``sample[stays]`` wide tokens take three times, and a mask's columns five times
    as long.
    """
    if axis == sample.dim() - 1:
        return sample.gather(axis, stays.expand(*sample.shape[:-1], -1))
    return sample.index_select(axis, stays)


def _remember(ctx: Any, inputs: tuple[Tensor, Tensor, list[int]], output: Any) -> None:
    value, keep, ctx.axes = inputs
    ctx.shape = value.shape
    ctx.save_for_backward(keep)


def _put_back(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
    """What was taken goes to where it stood; a token is taken once at most."""
    [keep] = ctx.saved_tensors
    for axis in reversed(ctx.axes):
        index = keep[(..., *[None] * (gradient.dim() - 2))]
        index = index.transpose(1, axis).expand_as(gradient)
        shape = list(gradient.shape)
        shape[axis] = ctx.shape[axis]
        gradient = gradient.new_zeros(shape).scatter_add(axis, index, gradient)
    if ctx.shape[0] == 1:
        gradient = gradient.sum(dim=0, keepdim=True)
    return gradient, None, None


torch.library.register_autograd("vtprune::take", _put_back, setup_context=_remember)
