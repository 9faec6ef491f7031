"""The attention that tokens get: what FitPrune, SparseVLM and FastV rate them by.

One custom operator, ``vtprune::received``, so that no compiler ever writes the
[B, H, S, S] probabilities down. ``spelled_out`` defines it in plain PyTorch, and is
what exported graphs hold; on a CPU it is computed in blocks of rows that fit the
cache, on a GPU in Triton (``received_triton``). ``attend`` computes it on a CPU beside
the attention itself, whose probabilities it then costs no second time.

Operations, counted: the products of queries and keys, ``B * H * R * S * D``
multiply-adds with R the rows that have a weight, and as many again without the
log-sum-exps that fused attention gives; bytes: queries and keys once for each block.

Shapes: B samples, H query heads, G key heads (G divides H), S tokens, D head width, W
ways to weight rows.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from vtprune_fx.ops.attention import (
    NEVER,
    Received,
    added_bias,
    causal_mask,
    lets_through,
    logits,
    per_query_head,
)
from vtprune_fx.ops.register import operator

_BLOCK = 2**20
"""Logits at a time: 4 MiB, some cores' caches. 100 rows of 16 heads and 651 tokens."""


def _fake(
    query: Tensor, key: Tensor, mask: Tensor | None, weights: Tensor, *_: object
) -> Tensor:
    return weights.new_empty(weights.shape)


@operator("vtprune::received", _fake)
def received(
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    weights: Tensor,
    lse: Tensor | None,
    scale: float,
    maximum: bool,
) -> Tensor:
    """What each token gets of the attention of some rows, heads taken together.

    ``sum over rows r of weights[w, r] * P[r, i]``, P the maximum or the mean over heads
    of the attention probabilities.

    Args:
        query: [B, H, S, D], rotated.
        key: [B, G, S, D], rotated.
        mask: [B or 1, 1, S, S], bool (True attends) or float (added to logits), or None
            for a plain causal mask.
        weights: [B, W, S] float32, of rows.
        lse: [B, H, S] float32, each row's log-sum-exp of its logits, where it is known;
            -inf in a row that may attend nothing.
        scale: What logits are multiplied by.
        maximum: The maximum over heads instead of the mean.

    Returns:
        [B, W, S] float32.
    """
    # Autocast would round the products of what is float32 by then.
    with torch.no_grad(), torch.autocast(query.device.type, enabled=False):
        heads, asked = _Heads(query, key, mask, scale), _Sums(weights, lse, maximum)
        sums = torch.zeros_like(weights, memory_format=torch.contiguous_format)
        for sample in range(query.shape[0]):
            _sum_up(heads.of(sample), sums[sample], asked.of(sample))
        return sums


def _on_gpu(*given: Any) -> Tensor:
    from vtprune_fx.ops import received_triton  # noqa: PLC0415 - PyTorch's GPU builds have it

    return received_triton.received(Received(*given))


torch.library.impl("vtprune::received", "cuda", _on_gpu)


def spelled_out(*given: Any) -> Tensor:
    """What ``received`` is, in plain PyTorch. Takes and returns the same.

    No matrix product makes the sums: autocast would round it to half precision.
    """
    asked = Received(*given)
    found = logits(asked.query, asked.key, asked.mask, asked.scale)
    lse, weights = asked.lse, asked.weights
    probabilities = found.softmax(dim=3) if lse is None else _normalised(found, lse)
    over = probabilities.amax if asked.maximum else probabilities.mean
    pairs = over(dim=1)
    sums = [(pairs * each[:, :, None]).sum(dim=1) for each in weights.unbind(dim=1)]
    return torch.stack(sums, dim=1)


DEFINITIONS = {received: spelled_out}
"""What graphs hold where operators of vtprune may not be."""


def _normalised(found: Tensor, lse: Tensor) -> Tensor:
    """Probabilities [B, H, S, S] by log-sum-exps; none where nothing is attended to."""
    lse = lse.masked_fill(lse == -torch.inf, torch.inf)
    return (found - lse[:, :, :, None]).exp()


class _Sums(NamedTuple):
    """What sums over rows are asked for.

    Attributes:
        weights: [B, W, S]; of one sample [W, S].
        lse: [B, H, S], or None; of one sample [H, S].
        maximum: The maximum over heads instead of the mean.
    """

    weights: Tensor
    lse: Tensor | None
    maximum: bool

    def of(self, sample: int) -> _Sums:
        """Those of one sample."""
        lse = None if self.lse is None else self.lse[sample]
        return self._replace(weights=self.weights[sample], lse=lse)


def _sum_up(sample: _Sample, sums: Tensor, asked: _Sums) -> None:
    """Write sums [W, S] of one sample.

    A block of rows at a time, from the first with a weight to the last: slices, since
    gathered rows would be copied first.
    """
    weights, lse, maximum = asked
    first, end = _weighted(weights)
    for start in range(first, end, sample.at_once):
        rows = slice(start, min(start + sample.at_once, end))
        if lse is None:
            pairs = _over_heads(sample.probabilities(rows), maximum)
        else:
            pairs = sample.pairs(rows, lse[:, rows], maximum)
        sums[:, : pairs.shape[1]].addmm_(weights[:, rows], pairs)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    weights: Tensor,
    scale: float,
    maximum: bool,
) -> tuple[Tensor, Tensor]:
    """Attention, and what ``received`` gives, of the same probabilities.

    If the mask is causal, both take about as long as fused attention alone, which looks
    at pairs that may not attend, too. For float32: half precision would be left.

    Args:
        query: As ``received`` takes it, and the others of its names.
        key: See ``query``.
        value: [B, G, S, D'].
        mask: Bool or None: [B or 1, 1, S, S].
        weights: See ``query``.
        scale: See ``query``.
        maximum: See ``query``.

    Returns:
        [B, H, S, D'] in memory as [B, S, H, D'], 0 in rows that may attend nothing, as
        fused attention has it; [B, W, S] float32.
    """
    with torch.no_grad(), torch.autocast(query.device.type, enabled=False):
        heads, asked = _Heads(query, key, mask, scale), _Sums(weights, None, maximum)
        output = unwritten_output(query, value)
        sums = torch.zeros_like(weights, memory_format=torch.contiguous_format)
        values = per_query_head(query, value)
        for n in range(query.shape[0]):
            _attend_one(heads.of(n), output[n], sums[n], values[n], asked.of(n))
    return output, sums


def _attend_one(
    sample: _Sample, output: Tensor, sums: Tensor, value: Tensor, asked: _Sums
) -> None:
    """Write output [H, S, D'] and sums [W, S] of one sample, given value [H, S, D'].

    As ``_sum_up``, but over all rows; those before the first with a weight, and after
    the last, are not looked at for sums. They may be no numbers.
    """
    weights, _, maximum = asked
    first, last = _weighted(weights)
    for start in range(0, output.shape[1], sample.at_once):
        rows = slice(start, start + sample.at_once)
        probabilities = sample.probabilities(rows)
        columns = probabilities.shape[2]
        output[:, rows] = torch.bmm(probabilities, value[:, :columns])
        of, end = max(first, start), min(last, start + sample.at_once)
        if of < end:
            pairs = _over_heads(probabilities[:, of - start : end - start], maximum)
            sums[:, :columns].addmm_(weights[:, of:end], pairs)
    if sample.nothing:
        output[:, list(sample.nothing)] = 0


def unwritten_output(query: Tensor, value: Tensor) -> Tensor:
    """[B, H, S, D'], memory for an attention's output: heads side by side in a token.

    That is how fused attention gives it: a decoder goes on with [B, S, H * D'].
    """
    samples, heads, tokens, _ = query.shape
    return value.new_empty(samples, tokens, heads, value.shape[3]).transpose(1, 2)


def _weighted(weights: Tensor) -> tuple[int, int]:
    """The first of the rows [W, S] that have a weight, and the end of the last."""
    weighted = weights.any(dim=0).tolist()
    if True not in weighted:
        return 0, 0
    return weighted.index(True), len(weighted) - weighted[::-1].index(True)


class _Heads:
    """Queries, keys and masks of all samples, as ``received`` takes them."""

    def __init__(
        self, query: Tensor, key: Tensor, mask: Tensor | None, scale: float
    ) -> None:
        self._query, self._key, self._scale = query, key, scale
        self._mask = causal_mask(query)[None, None] if mask is None else mask

    def of(self, sample: int) -> _Sample:
        """One sample's, in float32 once and not for each block."""
        key = per_query_head(self._query, self._key[sample : sample + 1])[0]
        return _Sample(
            self._query[sample].float(),
            (key.float() * self._scale).mT,
            self._mask[sample if len(self._mask) > 1 else 0, 0],
        )


class _Sample:
    """One sample's attention, a block of rows at a time.

    Half of a causal mask is never looked at, and only the diagonal's blocks of it
    are added.

    Args:
        query: [H, S, D].
        key: [H, D, S], scaled.
        mask: [S, S], bool or float.

    Attributes:
        at_once: Rows of a block.
        nothing: Rows that may attend nothing.
    """

    def __init__(self, query: Tensor, key: Tensor, mask: Tensor) -> None:
        self._query, self._key, self._mask = query, key, mask
        heads, tokens, _ = query.shape
        self.at_once = max(1, _BLOCK // (heads * tokens))
        self.nothing: frozenset[int] = frozenset()
        if not lets_through(mask.diagonal()).all():
            attends = lets_through(mask).any(dim=1)
            self.nothing = frozenset((~attends).nonzero().flatten().tolist())

    def probabilities(self, rows: slice) -> Tensor:
        """[H, R, C]: up to a column after which none of the rows attends to any.

        A row that may attend nothing has a uniform softmax over all columns, as
        ``NEVER`` is finite.
        """
        return self._logits(rows).softmax(dim=2)

    def pairs(self, rows: slice, lse: Tensor, maximum: bool) -> Tensor:
        """[R, C]: probabilities by lse [H, R], heads taken together.

        exp is monotone, so the maximum over heads takes one exp a pair.
        """
        found = self._logits(rows)
        lse = lse.masked_fill(lse == -torch.inf, torch.inf)
        found -= lse[:, :, None]
        return found.amax(dim=0).exp_() if maximum else found.exp_().mean(dim=0)

    def _logits(self, rows: slice) -> Tensor:
        """[H, R, C], the mask added where it is anything but 0."""
        first, columns = self._masked(rows)
        query = self._query[:, rows]
        found = torch.bmm(query, self._key[:, :, :columns])
        mask, masked = self._mask[rows, first:columns], found[:, :, first:]
        if mask.dtype == torch.bool:
            masked.masked_fill_(~mask, NEVER)
        else:
            masked += added_bias(mask)
        return found

    def _masked(self, rows: slice) -> tuple[int, int]:
        """The first column whose mask counts, and one after all that are attended to.

        In a causal mask they enclose the block on the diagonal.
        """
        tokens = len(self._mask)
        if not self.nothing.isdisjoint(range(rows.start, rows.stop)):
            return 0, tokens
        start, stop = rows.start, min(rows.stop, tokens)
        before, after = self._mask[rows, :start], self._mask[rows, stop:]
        plain = before if before.dtype == torch.bool else before == 0
        first = start if start and plain.all() else 0
        return first, tokens if stop < tokens and lets_through(after).any() else stop


def _over_heads(pairs: Tensor, maximum: bool) -> Tensor:
    return pairs.amax(dim=0) if maximum else pairs.mean(dim=0)
