"""``vtprune::received`` in Triton, for GPUs: queries and keys in, sums out.

The log-sum-exps that fused attention left are read; without them a first kernel finds
those of the rows that have a weight. The second kernel cuts the pairs into blocks, and
a program takes the heads of a block in turn: products, maximum or sum over heads, one
exp a pair (for the maximum) and the weighted sum of rows stay in registers. Each of up
to ``SHARES`` shares of the rows has other sums; PyTorch adds them up, so the order
of additions never changes. A block in which no row with a weight may attend to
anything, such as nearly half of those of a causal mask, costs a glance at weights and
mask.

Compilers do not look into the operator, as they would into a
``torch.library.triton_op``: a graph holds one call a cut, nothing is compiled anew for
another length, and all that fusion could save beside two launches is the addition of
the shares. Graphs for ONNX and TensorRT hold ``received.spelled_out``.

Products of float32 take three of TF32 each, which lose next to nothing, and are not
what sizes are chosen for. Those of half precision are added up in float32, and not
rounded before the softmax as ``spelled_out`` rounds them.

Shapes as in ``received``; a block is of R rows and C columns.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vtprune_fx.ops.attention import NEVER, Received

SIDE = 64
"""Rows and columns of a block at most. While heads go by, products, their maximum and
the mask are kept: 96 registers of each of a program's threads."""

TILE_BYTES = 16_384
"""Of a head's queries or keys of a block at most: 64 tokens of 128 numbers in half
precision, 32 in float32."""

STAGES = 3
"""Queries and keys on their way at a time: 96 KiB with what is being multiplied, less
than a program may have on any GPU since Ampere."""

WARPS = 4

SHARES = 16
"""Shares of the rows at most. With 651 tokens each is one block, and one sample's
blocks at and below the diagonal are 66 programs."""

_NEVER = tl.constexpr(NEVER / 2)
"""A mask's value below this is of a pair that may not attend."""


def received(asked: Received) -> Tensor:
    """As ``received.received``, of the same.

    The tensors are on a GPU, or on any device under Triton's interpreter
    (``TRITON_INTERPRET=1``).
    """
    query, key, mask, weights, lse, scale, maximum = asked
    samples, heads, tokens, depth = query.shape
    width = max(16, triton.next_power_of_2(depth))
    side = max(16, min(SIDE, TILE_BYTES // (width * query.element_size())))
    weights = weights.contiguous()
    known = weights.new_empty(samples, heads, tokens) if lse is None else lse
    known = known.contiguous()
    blocks = triton.cdiv(tokens, side)
    shares = min(SHARES, blocks)
    sums = weights.new_empty(shares, *weights.shape)
    given = {
        "query": query,
        "query_strides": query.stride(),
        "key": key,
        "key_strides": key.stride(),
        "mask": mask,
        "mask_strides": _mask_strides(mask),
        "weights": weights,
        "lse": known,
        "scale": scale,
        "tokens": tokens,
        "heads": heads,
        "groups": heads // key.shape[1],
        "WAYS": weights.shape[1],
        "DEPTH": depth,
        "WIDTH": width,
        "ROWS": side,
        "COLUMNS": side,
        "num_warps": WARPS,
        "num_stages": STAGES,
    }
    with torch.cuda.device(query.get_device()):
        if lse is None:
            _log_sum_exps[blocks, heads, samples](**given)
        grid = (blocks, shares, samples)
        more = {"sums": sums, "STRONGEST": maximum, "SPREAD": lse is None}
        _weighted_sums[grid](**given, **more)
    return sums.sum(dim=0)


def _mask_strides(mask: Tensor | None) -> tuple[int, int, int]:
    """Elements from one sample, row and column of a mask to the next."""
    if mask is None:
        return 0, 0, 0
    sample, _, row, column = mask.stride()
    return 0 if mask.shape[0] == 1 else sample, row, column


# In what follows a tensor is the address of its first element, or None; what is written
# in capitals is known to the compiler. Offsets of blocks are 64 bits wide.


@triton.jit(do_not_specialize=["tokens"])
def _log_sum_exps(
    query: tl.tensor,
    query_strides: tl.tuple,
    key: tl.tensor,
    key_strides: tl.tuple,
    mask: tl.tensor,
    mask_strides: tl.tuple,
    weights: tl.tensor,
    lse: tl.tensor,
    scale: tl.tensor,
    tokens: tl.tensor,
    heads: tl.tensor,
    groups: tl.tensor,
    WAYS: tl.constexpr,
    DEPTH: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """The log-sum-exps [R] of a block of rows, for a head and a sample.

    Written where any row has a weight. -inf is that of a row without one, and of one
    that may attend nothing.
    """
    row = tl.program_id(0) * ROWS
    head = tl.program_id(1)
    sample = tl.program_id(2).to(tl.int64)
    weighted = _weighted(weights, sample, row, tokens, WAYS, ROWS)
    if tl.max(weighted.to(tl.int32)) > 0:
        query += sample * query_strides[0] + tl.cast(head, tl.int64) * query_strides[1]
        key += sample * key_strides[0] + (head // groups).to(tl.int64) * key_strides[1]
        queries = _block(query, query_strides, row, tokens, ROWS, DEPTH, WIDTH)
        # How far rows look is found before: a loop with a choice in it would load each
        # block of keys only when the one before is done with.
        end = row * 0
        for column in range(0, tokens, COLUMNS):
            bias = _bias(
                mask, mask_strides, sample, row, column, weighted, tokens, ROWS, COLUMNS
            )
            end = tl.where(tl.max(bias) > float("-inf"), column + COLUMNS, end)
        most = tl.full([ROWS], float("-inf"), tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        for column in range(0, end, COLUMNS):
            bias = _bias(
                mask, mask_strides, sample, row, column, weighted, tokens, ROWS, COLUMNS
            )
            keys = _block(key, key_strides, column, tokens, COLUMNS, DEPTH, WIDTH)
            logits = _products(queries, keys) * scale + bias
            now = tl.maximum(most, tl.max(logits, axis=1))
            shift = tl.where(now == float("-inf"), 0.0, now)
            total *= tl.exp(most - shift)
            total += tl.sum(tl.exp(logits - shift[:, None]), axis=1)
            most = now
        rows = row + tl.arange(0, ROWS)
        found = most + tl.log(tl.where(total > 0, total, 1.0))
        tl.store(lse + (sample * heads + head) * tokens + rows, found, rows < tokens)


@triton.jit(do_not_specialize=["tokens"])
def _weighted_sums(
    query: tl.tensor,
    query_strides: tl.tuple,
    key: tl.tensor,
    key_strides: tl.tuple,
    mask: tl.tensor,
    mask_strides: tl.tuple,
    weights: tl.tensor,
    lse: tl.tensor,
    scale: tl.tensor,
    tokens: tl.tensor,
    heads: tl.tensor,
    groups: tl.tensor,
    sums: tl.tensor,
    WAYS: tl.constexpr,
    DEPTH: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STRONGEST: tl.constexpr,
    SPREAD: tl.constexpr,
) -> None:
    """The sums [W, C] of a share of the rows, for a block of columns and a sample.

    Blocks of rows are dealt to shares in turn, as those further down attend to more.
    ``SPREAD``: a row that may attend nothing gives alike to all, else it gives nothing.
    """
    column = tl.program_id(0) * COLUMNS
    share = tl.program_id(1)
    sample = tl.program_id(2).to(tl.int64)
    query += sample * query_strides[0]
    key += sample * key_strides[0]
    lse += sample * heads * tokens
    ways = tl.arange(0, triton.next_power_of_2(WAYS))
    columns = column + tl.arange(0, COLUMNS)
    found = tl.zeros([triton.next_power_of_2(WAYS), COLUMNS], tl.float32)
    for row in range(share * ROWS, tokens, tl.num_programs(1) * ROWS):
        weighted = _weighted(weights, sample, row, tokens, WAYS, ROWS)
        bias = _bias(
            mask, mask_strides, sample, row, column, weighted, tokens, ROWS, COLUMNS
        )
        rows = row + tl.arange(0, ROWS)
        needed = tl.max(bias) > float("-inf")
        if SPREAD:
            lost = tl.load(lse + rows, weighted, float("inf")) == float("-inf")
            needed |= tl.max(lost.to(tl.int32)) > 0
        if needed:
            pairs = _pairs(
                query,
                query_strides,
                key,
                key_strides,
                bias,
                lse,
                weighted,
                scale,
                row,
                column,
                tokens,
                heads,
                groups,
                DEPTH,
                WIDTH,
                ROWS,
                COLUMNS,
                STRONGEST,
            )
            # What padding holds does not count, NaN neither.
            pairs = tl.where(weighted[:, None], pairs, 0.0)
            if SPREAD:
                pairs = tl.where(lost[:, None], 1.0 / tokens, pairs)
            found += _by_ways(weights, pairs, sample, row, tokens, WAYS, ROWS)
    sums += ((share * tl.num_programs(2) + sample) * WAYS) * tokens
    there = (ways < WAYS)[:, None] & (columns < tokens)[None, :]
    tl.store(
        sums + ways.to(tl.int64)[:, None] * tokens + columns[None, :], found, there
    )


@triton.jit
def _by_ways(
    weights: tl.tensor,
    pairs: tl.tensor,
    sample: tl.tensor,
    row: tl.tensor,
    tokens: tl.tensor,
    WAYS: tl.constexpr,
    ROWS: tl.constexpr,
) -> tl.tensor:
    """[W, C]: a block's pairs [R, C], summed over rows by each way to weight them."""
    rows = row + tl.arange(0, ROWS)
    ways = tl.arange(0, triton.next_power_of_2(WAYS))
    found = tl.zeros([triton.next_power_of_2(WAYS), pairs.shape[1]], tl.float32)
    for way in tl.static_range(WAYS):
        start = weights + (sample * WAYS + way) * tokens
        by = tl.load(start + rows, rows < tokens, 0.0)
        summed = tl.sum(by[:, None] * pairs, axis=0)
        found += tl.where((ways == way)[:, None], summed[None, :], 0.0)
    return found


@triton.jit
def _pairs(
    query: tl.tensor,
    query_strides: tl.tuple,
    key: tl.tensor,
    key_strides: tl.tuple,
    bias: tl.tensor,
    lse: tl.tensor,
    weighted: tl.tensor,
    scale: tl.tensor,
    row: tl.tensor,
    column: tl.tensor,
    tokens: tl.tensor,
    heads: tl.tensor,
    groups: tl.tensor,
    DEPTH: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STRONGEST: tl.constexpr,
) -> tl.tensor:
    """[R, C]: probabilities of a block, heads taken together.

    exp is monotone, so the maximum over heads takes one exp a pair.
    """
    rows = row + tl.arange(0, ROWS)
    best = tl.full([ROWS, COLUMNS], float("-inf") if STRONGEST else 0.0, tl.float32)
    for head in range(heads):
        wide = tl.cast(head, tl.int64)
        queries = _block(
            query + wide * query_strides[1],
            query_strides,
            row,
            tokens,
            ROWS,
            DEPTH,
            WIDTH,
        )
        keys = _block(
            key + (wide // groups) * key_strides[1],
            key_strides,
            column,
            tokens,
            COLUMNS,
            DEPTH,
            WIDTH,
        )
        norm = tl.load(lse + wide * tokens + rows, weighted, float("inf"))
        norm = tl.where(norm == float("-inf"), float("inf"), norm)
        relative = _products(queries, keys) * scale - norm[:, None]
        if STRONGEST:
            best = tl.maximum(best, relative, propagate_nan=tl.PropagateNan.ALL)
        else:
            best += tl.exp(relative + bias)
    return tl.exp(best + bias) if STRONGEST else best / heads


@triton.jit
def _products(queries: tl.tensor, keys: tl.tensor) -> tl.tensor:
    """[R, C] float32, of queries [R, WIDTH] and keys [C, WIDTH]."""
    return tl.dot(queries, tl.trans(keys), input_precision="tf32x3")


@triton.jit
def _block(
    start: tl.tensor,
    strides: tl.tuple,
    first: tl.tensor,
    tokens: tl.tensor,
    COUNT: tl.constexpr,
    DEPTH: tl.constexpr,
    WIDTH: tl.constexpr,
) -> tl.tensor:
    """[COUNT, WIDTH]: a head's queries or keys from a token on, zeros past the end."""
    token = tl.arange(0, COUNT)
    part = tl.arange(0, WIDTH)
    start += tl.cast(first, tl.int64) * strides[2]
    there = (first + token < tokens)[:, None] & (part < DEPTH)[None, :]
    at = token[:, None] * strides[2] + part[None, :] * strides[3]
    return tl.load(start + at, there, 0.0)


@triton.jit
def _weighted(
    weights: tl.tensor,
    sample: tl.tensor,
    row: tl.tensor,
    tokens: tl.tensor,
    WAYS: tl.constexpr,
    ROWS: tl.constexpr,
) -> tl.tensor:
    """[R] bool: which rows of a block have a weight."""
    rows = row + tl.arange(0, ROWS)
    any_way = tl.zeros([ROWS], tl.int1)
    for way in tl.static_range(WAYS):
        start = weights + (sample * WAYS + way) * tokens
        any_way |= tl.load(start + rows, rows < tokens, 0.0) != 0
    return any_way


@triton.jit
def _bias(
    mask: tl.tensor,
    strides: tl.tuple,
    sample: tl.tensor,
    row: tl.tensor,
    column: tl.tensor,
    weighted: tl.tensor,
    tokens: tl.tensor,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> tl.tensor:
    """[R, C] float32, added to logits.

    -inf where a pair may not attend, its row has no weight, or it is past the end.
    """
    rows = tl.arange(0, ROWS)[:, None]
    columns = tl.arange(0, COLUMNS)[None, :]
    there = weighted[:, None] & (column + columns < tokens)
    if mask is None:
        attends = there & (row + rows >= column + columns)
        bias = tl.zeros([ROWS, COLUMNS], tl.float32)
    else:
        mask += sample * strides[0]
        mask += tl.cast(row, tl.int64) * strides[1]
        mask += tl.cast(column, tl.int64) * strides[2]
        found = tl.load(mask + rows * strides[1] + columns * strides[2], there, 0)
        if mask.dtype.element_ty == tl.int1:
            attends = found
            bias = tl.zeros([ROWS, COLUMNS], tl.float32)
        else:
            bias = found.to(tl.float32)
            attends = there & (bias > _NEVER)
    return tl.where(attends, bias, float("-inf"))
