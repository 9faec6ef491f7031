"""The attention that tokens get: what FitPrune, SparseVLM and FastV rate them by.

One custom operator, ``vtprune::received``, so that no compiler ever writes the
[B, H, S, S] probabilities down. ``spelled_out`` defines it in plain PyTorch, and is
what exported graphs hold; on a CPU it is computed in blocks of rows that stay in the
cache, on a GPU in Triton (``received_triton``). ``attend`` computes it on a CPU beside
the attention itself, whose probabilities it then costs no second time.

Operations, counted: the products of queries and keys, ``B * H * R * S * D``
multiply-adds with R the rows that have a weight, and as many again without the
log-sum-exps that fused attention leaves; bytes: queries and keys once for each block.

Shapes: B samples, H query heads, G key heads (G divides H), S tokens, D head width, W
ways to weight rows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vtprune_fx.operators import operator

NEVER = torch.finfo(torch.float32).min
"""Logit of a pair that may not attend. Finite, so that a row which may attend nothing
(left padding) has a finite softmax instead of NaN."""

_BLOCK = 2**19
"""Logits at a time: 2 MiB, some cores' caches. With 16 heads and 651 tokens 50 rows."""


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
    strongest: bool,
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
        strongest: The maximum over heads instead of the mean.

    Returns:
        [B, W, S] float32.
    """
    # Autocast would round the products of what is float32 by then.
    with torch.autocast(query.device.type, enabled=False):
        return _in_blocks(query, key, mask, weights, lse, scale, strongest)


def _on_gpu(*given: Any) -> Tensor:
    from vtprune_fx import received_triton  # noqa: PLC0415 - PyTorch's GPU builds have it

    return received_triton.received(*given)


torch.library.impl("vtprune::received", "cuda", _on_gpu)


def spelled_out(
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    weights: Tensor,
    lse: Tensor | None,
    scale: float,
    strongest: bool,
) -> Tensor:
    """What ``received`` is, in plain PyTorch. Takes and returns the same.

    No matrix product makes the sums: autocast would round it to half precision.
    """
    found = logits(query, key, mask, scale)
    probabilities = found.softmax(dim=3) if lse is None else _normalised(found, lse)
    pairs = probabilities.amax(dim=1) if strongest else probabilities.mean(dim=1)
    sums = [(pairs * each[:, :, None]).sum(dim=1) for each in weights.unbind(dim=1)]
    return torch.stack(sums, dim=1)


DEFINITIONS = {received: spelled_out}
"""What graphs without operators of vtprune's own hold in their place."""


def _normalised(found: Tensor, lse: Tensor) -> Tensor:
    """Probabilities [B, H, S, S] by log-sum-exps; none where nothing is attended to."""
    lse = lse.masked_fill(lse == -torch.inf, torch.inf)
    return (found - lse[:, :, :, None]).exp()


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
    if mask is None:
        order = torch.arange(query.shape[2], device=query.device)
        mask = (order[:, None] >= order)[None, None]
    if mask.dtype == torch.bool:
        return (~mask).float() * NEVER
    return mask.float().clamp(min=NEVER)


def _in_blocks(
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    weights: Tensor,
    lse: Tensor | None,
    scale: float,
    strongest: bool,
) -> Tensor:
    """As ``spelled_out``, a sample at a time."""
    bias = attention_bias(mask, query).expand(query.shape[0], -1, -1, -1)[:, 0]
    reach = _reach(bias)
    # Half precision is left once for a sample, not once for a block.
    sums = [
        _of_one(
            query[own].float(),
            per_query_head(query, key[own : own + 1])[0].float().mT,
            bias[own],
            weights[own],
            None if lse is None else lse[own],
            reach[own],
            scale,
            strongest,
        )
        for own in range(query.shape[0])
    ]
    return torch.stack(sums)


def _of_one(
    query: Tensor,
    key: Tensor,
    bias: Tensor,
    weights: Tensor,
    lse: Tensor | None,
    reach: list[int],
    scale: float,
    strongest: bool,
) -> Tensor:
    """[W, S] of one sample: query [H, S, D], key [H, D, S], bias [S, S].

    A block of rows at a time, from the first with a weight to the last: slices, since
    gathered rows would be copied first.
    """
    sums = weights.new_zeros(weights.shape)
    first, behind = _weighted(weights)
    at_once = max(1, _BLOCK // (query.shape[0] * query.shape[1]))
    for start in range(first, behind, at_once):
        rows = slice(start, min(start + at_once, behind))
        columns = max(reach[rows])
        block = query[:, rows], key[:, :, :columns], bias[rows, :columns]
        if lse is None:
            pairs = _over_heads(_softmax(*block, scale), strongest)
        else:
            pairs = _by_lse(*block, lse[:, rows], scale, strongest)
        sums[:, :columns].addmm_(weights[:, rows], pairs)
    return sums


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    weights: Tensor,
    scale: float,
    strongest: bool,
) -> tuple[Tensor, Tensor]:
    """Attention, and what ``received`` gives, of the same probabilities.

    Shorter than fused attention alone, if the mask is causal: that looks at pairs which
    may not attend, too. For float32; products of half precision would be made twice.

    Args:
        query: As ``received`` takes it, and the others of its names.
        key: See ``query``.
        value: [B, G, S, D'].
        mask: Bool or None: [B or 1, 1, S, S].
        weights: See ``query``.
        scale: See ``query``.
        strongest: See ``query``.

    Returns:
        [B, H, S, D'] in memory as [B, S, H, D'], 0 in rows that may attend nothing, as
        fused attention has it; [B, W, S] float32.
    """
    with torch.autocast(query.device.type, enabled=False):
        bias = attention_bias(mask, query).expand(query.shape[0], -1, -1, -1)[:, 0]
        output, sums = unwritten_output(query, value), torch.zeros_like(weights)
        reach = _reach(bias)
        keys, values = per_query_head(query, key), per_query_head(query, value)
        for own in range(query.shape[0]):
            attention = query[own], keys[own].mT, values[own], bias[own], reach[own]
            given = weights[own], sums[own]
            _attend_one(output[own], *attention, *given, scale, strongest)
        if mask is not None:
            nothing = ~mask.any(dim=3, keepdim=True)
            if nothing.any():
                output.masked_fill_(nothing, 0)
    return output, sums


def unwritten_output(query: Tensor, value: Tensor) -> Tensor:
    """[B, H, S, D'], memory for an attention's output: heads side by side in a token.

    That is how fused attention leaves it: a decoder goes on with [B, S, H * D'].
    """
    samples, heads, tokens, _ = query.shape
    return value.new_empty(samples, tokens, heads, value.shape[3]).transpose(1, 2)


def _attend_one(
    output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor,
    reach: list[int],
    weights: Tensor,
    sums: Tensor,
    scale: float,
    strongest: bool,
) -> None:
    """Write output [H, S, D'] and sums [W, S] of one sample.

    As ``_of_one``, but over all rows; those ahead of the first with a weight, and
    behind the last, are not looked at for sums. They may be no numbers.
    """
    first, behind = _weighted(weights)
    at_once = max(1, _BLOCK // (query.shape[0] * query.shape[1]))
    for start in range(0, query.shape[1], at_once):
        rows = slice(start, start + at_once)
        columns = max(reach[rows])
        block = query[:, rows], key[:, :, :columns], bias[rows, :columns]
        probabilities = _softmax(*block, scale)
        output[:, rows] = probabilities @ value[:, :columns]
        of, end = max(first, start), min(behind, start + at_once)
        if of < end:
            pairs = _over_heads(probabilities[:, of - start : end - start], strongest)
            sums[:, :columns].addmm_(weights[:, of:end], pairs)


def _weighted(weights: Tensor) -> tuple[int, int]:
    """The first of the rows [W, S] that have a weight, and what is behind the last."""
    rows = weights.any(dim=0).nonzero().flatten().tolist()
    return (rows[0], rows[-1] + 1) if rows else (0, 0)


def _reach(bias: Tensor) -> list[list[int]]:
    """[B][S]: behind which column a row attends to nothing; S where to nothing at all.

    Half of a causal mask is never looked at. A row that may attend nothing has a
    uniform softmax over all columns, as ``NEVER`` is finite.
    """
    tokens = bias.shape[2]
    # Whole numbers up to 2 ** 24, which float32 holds.
    behind = torch.arange(1.0, tokens + 1, device=bias.device)
    last = ((bias > NEVER / 2) * behind).amax(dim=2)
    reach: list[list[int]] = last.masked_fill(last == 0, tokens).int().tolist()
    return reach


def _softmax(query: Tensor, key: Tensor, bias: Tensor, scale: float) -> Tensor:
    """[H, R, C]: probabilities of a block; key is [H, D, C], bias [R, C]."""
    return torch.baddbmm(bias[None], query, key, alpha=scale).softmax(dim=2)


def _by_lse(
    query: Tensor,
    key: Tensor,
    bias: Tensor,
    lse: Tensor,
    scale: float,
    strongest: bool,
) -> Tensor:
    """[R, C]: probabilities of a block, heads taken together, by lse [H, R].

    exp is monotone, so the maximum over heads takes one exp a pair, and what is the
    same for all heads is added once.
    """
    lse = lse.masked_fill(lse == -torch.inf, torch.inf)
    relative = torch.baddbmm(-lse[:, :, None], query, key, alpha=scale)
    if strongest:
        return relative.amax(dim=0).add_(bias).exp_()
    return relative.add_(bias).exp_().mean(dim=0)


def _over_heads(pairs: Tensor, strongest: bool) -> Tensor:
    return pairs.amax(dim=0) if strongest else pairs.mean(dim=0)
