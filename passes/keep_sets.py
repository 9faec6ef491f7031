"""Which tokens a cut drops, and which become new ones: by number, or by rank.

By number, everything is known when the graph is made::

    kept: "i64[B, S - 36]" = lowest_first[:, 36:]

By a number that comes with each run, as the first of a row of the plan's schedule::

    count: "Sym(u0)" = aten.item(vtprune_schedule[row, 0])
    kept: "i64[B, S - u0]" = vtprune.without(lowest_first, count)

By rank of the attention, the host reads from the data how many are kept::

    rank: "i64[]" = vtprune.attention_rank(attended, vtprune_roles)
    count: "Sym(u0)" = aten.item(...)
    kept: "i64[B, u0]" = flip(lowest_first)[:, arange(u0)]
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from dataclasses import dataclass
from operator import getitem

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.node import Argument

from vtprune_fx.graph.insert import Inserter
from vtprune_fx.graph.sizes import Count
from vtprune_fx.graph.stamps import Stamp, StampKind, stamp_result
from vtprune_fx.graph.trace import Operator
from vtprune_fx.graph.values import set_value, value_at_full_length
from vtprune_fx.planning.plan import PlannedCut
from vtprune_fx.recipes.schema import Recycle
from vtprune_fx.scorers.evidence import Evidence
from vtprune_fx.selection import attention_rank, operators, recycling

aten = torch.ops.aten

DROP, SHARE, OF = range(3)
"""Places in a row of a plan's schedule."""

_END = sys.maxsize
"""A slice to the end of a dimension."""


@dataclass(frozen=True)
class CutWriter:
    """Writes the nodes of one cut.

    Attributes:
        inserter: Of the graph.
        anchor: The node before which all of them stand.
        cut: What is planned.
        schedule: The input [cuts, 3] with the numbers of a run, where they come so.
    """

    inserter: Inserter
    anchor: Node
    cut: PlannedCut
    schedule: Node | None = None

    def call(self, op: Operator, *args: Argument, drop: Count = 0) -> Node:
        """Insert an operator of the cut's choice (``Inserter.call``)."""
        return self.inserter.call(self.anchor, self._choice, op, *args, drop=drop)

    def trace(
        self, function: Callable[..., Tensor], *args: object, dropped: Count = 0
    ) -> Node:
        """Insert a function of the cut's choice (``Inserter.trace``)."""
        return self.inserter.trace(
            self.anchor, self._choice, function, *args, dropped=dropped
        )

    def score(self, function: Callable[..., Tensor], *args: object) -> Node:
        """Insert a function that scores the cut's tokens."""
        stamp = Stamp(StampKind.SCORE, self.cut.attention.layer)
        return self.inserter.trace(self.anchor, stamp, function, *args)

    def for_all_cuts(self, function: Callable[..., Tensor], *args: object) -> Node:
        """Insert a function whose result serves this cut and all later ones."""
        stamp = Stamp(StampKind.SCORE)
        return self.inserter.trace(self.anchor, stamp, function, *args)

    def read(
        self, scalar: Node, least: int, symbol: Count, of: Node | None = None
    ) -> Node:
        """Insert the reading of a count (``Inserter.read``)."""
        return self.inserter.read(self.anchor, self._choice, scalar, least, symbol, of)

    @functools.cached_property
    def drop(self) -> Node | Count:
        """How many tokens are dropped: a number, or what reads it."""
        if self.schedule is None:
            return self.cut.drop
        return self.read(self.number(DROP), 0, self.cut.drop)

    def number(self, which: int) -> Node:
        """Insert one number of the cut's row in the schedule: an int64 scalar."""
        row = self.call(aten.select.int, self.schedule, 0, self.cut.row)
        return self.call(aten.select.int, row, 0, which)

    def ascending(self, values: Node) -> Node:
        """Insert the sorted values [B, K]: a causal mask stays causal."""
        return self.call(getitem, self.call(aten.sort.default, values, 1), 0)

    def without_dropped(self, values: Node) -> Node:
        """[B, S - drop]: of values in the order of dropping, those of kept tokens."""
        dropped = self.cut.drop
        if self.schedule is None:
            return self.call(aten.slice.Tensor, values, 1, dropped, _END, drop=dropped)
        # A slice from a number that is unknown would be of unknown length.
        return self.call(operators.without, values, self.drop, drop=dropped)

    def result(self, node: Node, kind: StampKind) -> None:
        """Stamp and name a node as a result of the cut."""
        stamp_result(node, kind, self.cut.attention.layer)

    @property
    def _choice(self) -> Stamp:
        return Stamp(StampKind.CHOICE, self.cut.attention.layer)


@dataclass(frozen=True)
class Chosen:
    """Nodes of what a cut keeps and drops.

    Attributes:
        order: [B, S], positions in the order of dropping.
        kept: [B, S - drop], those that are kept.
        clustered: [B, m], those that become new tokens, the best first; None where none
            do.
        clusters: How many clusters they form.
        new: How many new tokens that gives: none where nothing is dropped.
    """

    order: Node
    kept: Node
    clustered: Node | None
    clusters: Node | Count
    new: Node | Count


def by_number(writer: CutWriter, order: Node) -> Chosen:
    """As many as the plan says."""
    cut = writer.cut
    kept = writer.without_dropped(order)
    clustered = None
    if cut.new:
        clustered = writer.trace(
            recycling.best_of_dropped, order, cut.drop, cut.clustered
        )
    return Chosen(order, kept, clustered, cut.new, cut.new)


def by_rank(
    writer: CutWriter, order: Node, evidence: Evidence[Node], recycle: Recycle | None
) -> Chosen:
    """As many as follow from the rank of the attention."""
    cut, roles = writer.cut, evidence.roles
    attended = writer.trace(attention_rank.attended, evidence)
    found = writer.call(attention_rank.attention_rank, attended, roles)
    counts = writer.trace(attention_rank.counts, found, roles, cut.rule, recycle)

    def read(which: int, least: int, symbol: Count, of: Node | None = None) -> Node:
        scalar = writer.call(aten.select.int, counts, 0, which)
        return writer.read(scalar, least, symbol, of)

    # Two at least, since a size of 1 would broadcast.
    count = read(attention_rank.KEPT, 2, cut.drop, order)
    kept = writer.trace(attention_rank.best, order, count)
    set_value(kept, value_at_full_length(order), cut.drop)
    if not cut.new:
        return Chosen(order, kept, None, 0, 0)
    chosen = read(attention_rank.CLUSTERED, 1, cut.clustered)
    clustered = writer.trace(attention_rank.best_of_dropped, order, count, chosen)
    clusters = read(attention_rank.CLUSTERS, 1, cut.new)
    return Chosen(
        order, kept, clustered, clusters, read(attention_rank.NEW, 0, cut.new)
    )
