"""A cut's choice, and what is gathered of the kept tokens, as one operator each.

What a compiler plans costs it time: a score, a choice and the gathers of a cut are some
forty nodes of ATen, a decoder layer fifty-five. On a CPU fusing them gains nothing, so
there each is one node that runs as it is written here. ``attend_and_choose`` computes
the layer's attention besides.

Shapes: B samples, S tokens, K of them kept.
"""

from __future__ import annotations

import json
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from vtprune_fx.ops.attention import Received, logits, per_query_head
from vtprune_fx.ops.received import attend, received, unwritten_output
from vtprune_fx.ops.register import operator
from vtprune_fx.scorers.evidence import Evidence
from vtprune_fx.scorers.registry import rate_of
from vtprune_fx.selection.order import lowest_first


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
    """Positions of the tokens that are kept when a scorer's lowest are dropped.

    Args:
        roles: [B, S] int64.
        drop: How many are dropped.
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
    given = (query, key, mask, roles, scale, hidden, cos, sin, class_attention)
    seen = cast("Evidence", Evidence[Tensor | None](*given))
    scores = rate_of(score, json.loads(options))(seen)
    return _kept(scores, roles, drop)


def _kept(scores: Tensor, roles: Tensor, drop: int) -> Tensor:
    return lowest_first(scores, roles)[:, drop:].sort(dim=1).values


def _without(values: Tensor, drop: int) -> Tensor:
    return values.new_empty(values.shape[0], values.shape[1] - drop)


@operator("vtprune::without", _without)
def without(values: Tensor, drop: int) -> Tensor:
    """Values [B, S] without the first ``drop`` of each row: [B, S - drop]."""
    return values[:, drop:].clone()


def _attended(value: Tensor, roles: Tensor, drop: int, *given: Any) -> Any:
    query = given[2]
    return unwritten_output(query, value), _chosen(roles, drop)


@operator("vtprune::attend_and_choose", _attended)
def attend_and_choose(
    value: Tensor,
    roles: Tensor,
    drop: int,
    score: str,
    options: str,
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    scale: float,
    hidden: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    class_attention: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """A layer's attention, and what ``choose`` chooses by it.

    The probabilities are computed once, if the scorer asks ``Evidence.receive`` for
    what tokens get of them.

    Args:
        value: [B, G, S, D'] float32.
        roles: As ``choose`` takes it, and all others of its names.
        drop: See ``roles``.
        score: See ``roles``.
        options: See ``roles``.
        query: See ``roles``.
        key: See ``roles``.
        mask: Bool, or None for a plain causal mask; else see ``roles``.
        scale: See ``roles``.
        hidden: See ``roles``.
        cos: See ``roles``.
        sin: See ``roles``.
        class_attention: See ``roles``.

    Returns:
        [B, H, S, D'] float32; [B, S - drop] int64.
    """
    attention = _Attention(query, key, value, mask, scale)
    given = (query, key, mask, roles, scale, hidden, cos, sin, class_attention)
    evidence = Evidence(*given, receive=attention.receive)
    scores = rate_of(score, json.loads(options))(evidence)
    return attention.output(), _kept(scores, roles, drop)


class _Attention:
    """A layer's attention, which a scorer may ask what tokens get of it.

    Args:
        query: [B, H, S, D].
        key: [B, G, S, D].
        value: [B, G, S, D'].
        mask: Bool, [B or 1, 1, S, S], or None for a plain causal mask.
        scale: What logits are multiplied by.
    """

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        scale: float,
    ) -> None:
        self._query, self._key, self._value = query, key, value
        self._mask, self._scale = mask, scale
        self._output: Tensor | None = None

    def receive(self, *given: Any) -> Tensor:
        """As ``received``; of this attention, its output is computed besides."""
        asked = Received(*given)
        same = asked.query is self._query and asked.key is self._key
        same = same and asked.mask is self._mask and asked.scale == self._scale
        if not same or asked.lse is not None or self._output is not None:
            found: Tensor = received(*asked)
            return found
        self._output, sums = attend(
            asked.query,
            asked.key,
            self._value,
            asked.mask,
            asked.weights,
            asked.scale,
            asked.maximum,
        )
        return sums

    def output(self) -> Tensor:
        """[B, H, S, D']: computed now, if the scorer did not ask."""
        if self._output is not None:
            return self._output
        found = scaled_dot_product_attention(
            self._query,
            per_query_head(self._query, self._key),
            per_query_head(self._query, self._value),
            self._mask,
            is_causal=self._mask is None,
            scale=self._scale,
        )
        return unwritten_output(self._query, self._value).copy_(found)


def _remember_attention(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    value, *_, query, key, mask, ctx.scale, _, _, _, _ = inputs
    ctx.save_for_backward(query, key, value, mask)


def _through_attention(ctx: Any, gradient: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    """Gradients of value, query and key; of a choice there are none."""
    query, key, value, mask = ctx.saved_tensors
    found = logits(query, key, mask, ctx.scale).softmax(dim=3)
    if mask is not None:
        found = found.masked_fill(~mask.any(dim=3, keepdim=True), 0)
    each = gradient @ per_query_head(query, value).mT
    of_logits = found * (each - (each * found).sum(dim=3, keepdim=True)) * ctx.scale
    of_query = of_logits @ per_query_head(query, key)
    of_key = _per_key_head(of_logits.mT @ query, key)
    of_value = _per_key_head(found.mT @ gradient, value)
    return of_value, *[None] * 4, of_query, of_key, *[None] * 6


def _per_key_head(gradient: Tensor, key: Tensor) -> Tensor:
    """[B, G, S, D]: the sum over the query heads [B, H, S, D] that a key serves."""
    samples, groups, *width = key.shape
    return gradient.reshape(samples, groups, -1, *width).sum(dim=2)


torch.library.register_autograd(
    "vtprune::attend_and_choose",
    _through_attention,
    setup_context=_remember_attention,
)


def _taken(value: Tensor, keep: Tensor, axes: list[int]) -> Tensor:
    shape = [keep.shape[0], *value.shape[1:]]
    for axis in axes:
        shape[axis] = keep.shape[1]
    return value.new_empty(shape)


@operator("vtprune::take", _taken)
def take(value: Tensor, keep: Tensor, axes: list[int]) -> Tensor:
    """The kept tokens of each sample, along a value's token axes.

    Args:
        value: [B or 1, ..., S, ...].
        keep: [B, K] positions.
        axes: The token axes, one or two.

    Returns:
        [B, ..., K, ...].
    """
    samples = value.expand(len(keep), *value.shape[1:])
    taken = []
    for sample, kept in zip(samples, keep, strict=True):
        part = sample
        for axis in axes:
            part = _of_one(part, kept, axis - 1)
        taken.append(part)
    return torch.stack(taken) if len(taken) > 1 else taken[0][None]


def _of_one(sample: Tensor, kept: Tensor, axis: int) -> Tensor:
    """What is kept along an axis: columns one by one, wider tokens as one block each.

    By ``sample[kept]`` wide tokens take three times, and a mask's columns five times
    as long.
    """
    if axis == sample.dim() - 1:
        return sample.gather(axis, kept.expand(*sample.shape[:-1], -1))
    return sample.index_select(axis, kept)


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
