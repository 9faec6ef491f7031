"""Who leaves at a cut, and what becomes of them: by number, or by rank of attention.

By number, everything is known when the graph is made::

    staying: "i64[B, S - 36]" = lowest_first[:, 36:]

By rank, the host reads from the data how many stay::

    rank: "i64[]" = vtprune.attention_rank(attended, vtprune_roles)
    stay: "Sym(u0)" = aten.item(...)
    staying: "i64[B, u0]" = flip(lowest_first)[:, arange(u0)]
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch.fx import Node

from vtprune_fx.graph.insert import Inserter
from vtprune_fx.graph.sizes import Count
from vtprune_fx.graph.stamps import Stamp, StampKind
from vtprune_fx.graph.values import set_value, value_at_full_length
from vtprune_fx.planning.plan import PlannedCut
from vtprune_fx.recipes.schema import Recipe
from vtprune_fx.selection import attention_rank, recycling

aten = torch.ops.aten

Insert = Callable[..., Node]
"""``(operator, *args) -> node``: inserts at the cut at hand."""

_END = sys.maxsize
"""A slice to the end of a dimension."""


@dataclass(frozen=True)
class Leaving:
    """Nodes that tell who leaves.

    Attributes:
        order: [B, S], positions in the order of leaving.
        staying: [B, S - drop], those that stay.
        clustered: [B, m], those that become new tokens, the best first; None where none
            do.
        clusters: How many clusters they form.
        new: How many new tokens that gives: none where nothing leaves.
    """

    order: Node
    staying: Node
    clustered: Node | None
    clusters: Node | Count
    new: Node | Count


def by_number(
    inserter: Inserter, anchor: Node, order: Node, cut: PlannedCut
) -> Leaving:
    """As many as the plan says."""
    stamp = Stamp(StampKind.CHOICE, cut.attention.layer)
    insert = partial(inserter.call, anchor, stamp)
    staying = behind_those_leaving(insert, order, cut)
    clustered = None
    if cut.new:
        counts = (cut.drop, cut.clustered)
        trace = partial(inserter.trace, anchor, stamp)
        clustered = trace(recycling.best_of_dropped, order, *counts)
    return Leaving(order, staying, clustered, cut.new, cut.new)


def behind_those_leaving(insert: Insert, values: Node, cut: PlannedCut) -> Node:
    """[B, S - drop]: of values in the order of leaving, those of who stays.

    They are sorted next: ascending order keeps a causal mask causal.
    """
    return insert(aten.slice.Tensor, values, 1, cut.drop, _END, drop=cut.drop)


def by_rank(
    inserter: Inserter,
    anchor: Node,
    order: Node,
    cut: PlannedCut,
    evidence: tuple[Node | float | None, ...],
    recipe: Recipe,
) -> Leaving:
    """As many as follow from the rank of the attention."""
    stamp = Stamp(StampKind.CHOICE, cut.attention.layer)
    call, trace = partial(inserter.call, anchor, stamp), partial(inserter.trace, anchor)
    roles = evidence[3]
    attended = trace(stamp, attention_rank.attended, *evidence)
    found = call(attention_rank.attention_rank, attended, roles)
    counts = trace(stamp, attention_rank.counts, found, roles, cut.rule, recipe.recycle)

    def read(which: int, least: int, symbol: Count, of: Node | None = None) -> Node:
        scalar = call(aten.select.int, counts, 0, which)
        return inserter.read(anchor, stamp, scalar, least, symbol, of)

    # Two at least, since a size of 1 would broadcast.
    stay = read(attention_rank.STAY, 2, cut.drop, order)
    staying = trace(stamp, attention_rank.best, order, stay)
    set_value(staying, value_at_full_length(order), cut.drop)
    if not cut.new:
        return Leaving(order, staying, None, 0, 0)
    chosen = read(attention_rank.CLUSTERED, 1, cut.clustered)
    counted = (order, stay, chosen)
    clustered = trace(stamp, attention_rank.best_of_dropped, *counted)
    clusters = read(attention_rank.CLUSTERS, 1, cut.new)
    return Leaving(
        order, staying, clustered, clusters, read(attention_rank.NEW, 0, cut.new)
    )
