"""Rate the visual tokens at every cut and choose what stays.

A side branch behind the node at which tokens will leave; attention stays fused::

    q: "f32[B, H, S, D]"    k: "f32[B, G, S, D]"    mask: "b8[B, 1, S, S]"
    attention: "f32[B, H, S, D]" = aten.scaled_dot_product_attention(q, k, v, mask)

becomes::

    attention: "f32[B, H, S, D]" = aten.scaled_dot_product_attention(q, k, v, mask)
    vtprune_roles: "i64[B, S]"                    # once: visual, instruction, ...
    ...                                           # the scorer, traced
    score: "f32[B, S]"
    lowest_first: "i64[B, S]" = aten.sort(score)  # visual tokens, padding, text
    vtprune_keep_3: "i64[B, S - 36]" = aten.sort(lowest_first[:, 36:])

Where the best of the dropped tokens become C new ones, these are made here too::

    vtprune_new_3: "f32[B, C, E]"                 # means of clusters
    vtprune_keep_3: "i64[B, S - 36 + C]"          # -C to -1 are the new tokens
    vtprune_stand_in_3: "i64[B, S - 36 + C]"      # the position that each passes for

Ahead of a layer (``before_layer``) its queries and keys are not there yet: the nodes
that make them are copied in, to be rated by, and run again behind the cut on what is
left.

Nothing reads ``vtprune_keep_3`` yet: the graph computes what it did before.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from functools import partial
from operator import getitem

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from vtprune_fx import recycling
from vtprune_fx.errors import PlanError, VtpruneError
from vtprune_fx.graph import Inserter, Stamp, set_value, value_at_full_length
from vtprune_fx.passes.base import Pass
from vtprune_fx.plan import PlannedCut, PrunePlan
from vtprune_fx.scorers import rate_of, scorer
from vtprune_fx.scoring import (
    front_keys,
    lowest_first,
    marked,
    own_keep_set,
    own_leaving,
    own_order,
    own_stand_ins,
    token_roles,
    visual_counts,
)

aten = torch.ops.aten

ROLES = "vtprune_roles"
"""Name of the tokens' roles, [B, S]."""

KEEP_PREFIX = "vtprune_keep_"
"""A cut's keep set is named this and the layer's number, in every exported form too."""


NEW_PREFIX = "vtprune_new_"
"""The new tokens that a cut makes of dropped ones are named this and its layer."""

STAND_IN_PREFIX = "vtprune_stand_in_"
"""Where a keep set has negative numbers: positions, new tokens having those of another
one, and who left in place as padding its own."""

Insert = Callable[..., Node]
"""``(operator, *args) -> node``: inserts at the cut at hand."""

_END = sys.maxsize
"""A slice to the end of a dimension."""


class InsertScores(Pass):
    """Insert score and keep set of every cut, behind the node at which tokens leave.

    1. A cut behind attention or layer: rated by the layer's own queries and keys.
    2. A cut ahead of a layer: rated by copies of what will be its queries and keys.
    3. Samples that lose numbers of their own: who leaves where fewer leave in all stays
       in place as padding.
    4. No cuts: unchanged.
    """

    def __init__(self, plan: PrunePlan) -> None:
        self._plan = plan

    def edit(self, module: GraphModule) -> bool:
        """Insert the branches."""
        plan, graph = self._plan, module.graph
        named = {node.name: node for node in graph.nodes}
        if not plan.cuts:
            return False
        inserter = Inserter(graph)
        rate = rate_of(plan.recipe)
        roles: Node | None = None
        came: Node | None = None
        for cut in plan.cuts:
            anchor = named[cut.edge].next
            stamp = Stamp("score", cut.attention.layer)
            seen = _Seen(named, _look_ahead(inserter, anchor, cut, named))
            if roles is None:
                roles = self._insert_roles(inserter, anchor, cut, seen)
            evidence = _evidence(cut, seen, roles)
            rated = _trace(inserter, anchor, stamp, plan.recipe.score, rate, evidence)
            seen.erase_unread()
            if plan.of is None:
                hidden = seen.node(cut.hidden)
                _insert_keep_set(inserter, anchor, cut, (rated, roles, hidden))
                continue
            if came is None:
                came = inserter.trace(anchor, Stamp("score", -1), visual_counts, roles)
            _insert_own(inserter, anchor, cut, (rated, roles, came), plan.of)
        return True

    def _insert_roles(
        self, inserter: Inserter, anchor: Node, cut: PlannedCut, seen: _Seen
    ) -> Node:
        """Insert the roles with the first cut, whose layer's mask tells the padding."""
        insert = partial(inserter.trace, anchor, Stamp("score", -1))
        visual = insert(marked, *map(seen.node, self._plan.visual))
        roles = insert(token_roles, visual, seen.node(cut.attention.mask))
        if raters := scorer(self._plan.recipe.score).raters:
            roles = insert(raters, self._embeddings(seen), roles)
        roles._rename(ROLES)
        return roles

    def _embeddings(self, seen: _Seen) -> Node:
        if embeddings := seen.node(self._plan.embeddings):
            return embeddings
        raise PlanError(
            f"score {self._plan.recipe.score!r}",
            expected="one value that enters the decoder, to find raters in",
            found="none or several in the graph",
            fix="Use a score without raters, or report the model.",
        )


class _Seen:
    """The values that a cut is rated by: the graph's own, or copies made ahead.

    Args:
        named: The graph's nodes by name.
        ahead: Copies of nodes that stand behind the cut.
    """

    def __init__(self, named: Mapping[str, Node], ahead: Mapping[Node, Node]) -> None:
        self._named, self._ahead = named, ahead

    def node(self, name: str | None) -> Node | None:
        """A node, or its copy."""
        if name is None:
            return None
        return self._ahead.get(self._named[name], self._named[name])

    def erase_unread(self) -> None:
        """Take back copies that nobody reads."""
        for copied in reversed(list(self._ahead.values())):
            if not copied.users:
                copied.graph.erase_node(copied)


def _trace(
    inserter: Inserter,
    anchor: Node,
    stamp: Stamp,
    score: str,
    rate: Callable[..., Tensor],
    evidence: tuple[Node | float | None, ...],
) -> Node:
    try:
        return inserter.trace(anchor, stamp, rate, *evidence)
    except VtpruneError:
        raise
    except Exception as error:  # whatever a function of the user's may raise
        raise PlanError(
            f"scorer {score!r}",
            expected="a traceable function of the tensors it is given",
            found=(str(error) or type(error).__name__).splitlines()[0],
            fix="Let no shape and no branch depend on values, and make no tensor of "
            "numbers.",
        ) from error


def _evidence(
    cut: PlannedCut, seen: _Seen, roles: Node
) -> tuple[Node | float | None, ...]:
    """The fields of ``Evidence``, one after the other."""
    at, stream = cut.attention, cut.attention.stream
    heads = map(seen.node, (at.query, at.key, at.mask))
    return (
        *heads,
        roles,
        at.scale,
        *map(seen.node, (cut.hidden, stream.cos, stream.sin)),
    )


def _look_ahead(
    inserter: Inserter, anchor: Node, cut: PlannedCut, named: Mapping[str, Node]
) -> dict[Node, Node]:
    """Copy what makes a layer's queries and keys ahead of a cut that precedes them."""
    if cut.site != "before_layer":
        return {}
    at = cut.attention
    names = (at.query, at.key, at.mask)
    wanted = {named[name] for name in names if name is not None}
    behind: list[Node] = []
    node = named[at.node].prev
    while node is not named[cut.edge]:
        if node in wanted:
            behind.append(node)
            wanted.update(node.all_input_nodes)
        node = node.prev
    return inserter.copy(anchor, Stamp("score", at.layer), reversed(behind))


def _insert_keep_set(
    inserter: Inserter,
    anchor: Node,
    cut: PlannedCut,
    rating: tuple[Node, Node, Node | None],
) -> None:
    """Choose who stays: ``rating`` is scores, roles and the residual stream."""
    rated, roles, hidden = rating
    layer = cut.attention.layer
    insert = partial(inserter.call, anchor, Stamp("keep", layer))
    order = inserter.trace(anchor, Stamp("score", layer), lowest_first, rated, roles)
    staying = _insert_staying(insert, order, cut)
    if cut.new:
        _New(inserter, anchor, cut).insert(hidden, order, roles, staying)
        return
    keep = insert(getitem, insert(aten.sort.default, staying, 1), 0)
    keep._rename(f"{KEEP_PREFIX}{layer}")


def _insert_own(
    inserter: Inserter,
    anchor: Node,
    cut: PlannedCut,
    rating: tuple[Node, Node, Node],
    of: int,
) -> None:
    """Choose who stays where each sample loses its own number.

    ``rating`` is scores, roles and the numbers of visual tokens that samples came with.
    Who leaves where fewer leave in all stays in place as padding, in front of the row,
    and is -1 in the keep set.
    """
    rated, roles, came = rating
    layer = cut.attention.layer
    stamp = Stamp("keep", layer)
    trace, insert = (partial(f, anchor, stamp) for f in (inserter.trace, inserter.call))
    numbers = (came, cut.share, of)
    order = trace(own_order, rated, roles, *numbers)
    leaving = trace(own_leaving, order, *numbers)
    staying, gone = (_insert_staying(insert, node, cut) for node in (order, leaving))
    keys = trace(front_keys, staying, gone, dropped=cut.drop)
    ascending = insert(getitem, insert(aten.sort.default, keys, 1), 0)
    for name, function in (
        (KEEP_PREFIX, own_keep_set),
        (STAND_IN_PREFIX, own_stand_ins),
    ):
        found = trace(function, ascending, dropped=cut.drop)
        found._rename(f"{name}{layer}")


def _insert_staying(insert: Insert, lowest_first: Node, cut: PlannedCut) -> Node:
    """[B, S - drop]: positions that stay when the first ``drop`` leave.

    They are sorted next: ascending order keeps a causal mask causal.
    """
    return insert(aten.slice.Tensor, lowest_first, 1, cut.drop, _END, drop=cut.drop)


class _New:
    """Inserts the new tokens of one cut, and the keep set that holds them."""

    def __init__(self, inserter: Inserter, anchor: Node, cut: PlannedCut) -> None:
        stamp = Stamp("keep", cut.attention.layer)
        self._trace = partial(inserter.trace, anchor, stamp)
        self._call = partial(inserter.call, anchor, stamp)
        self._cut = cut

    def insert(
        self, hidden: Node | None, order: Node, roles: Node, staying: Node
    ) -> None:
        """Insert them."""
        cut, layer = self._cut, self._cut.attention.layer
        assert hidden is not None, "the edge of such a cut is the residual stream"
        counts = (cut.drop, cut.clustered, cut.new)
        merged = self._trace(recycling.merge, hidden, order, *counts)
        merged._rename(f"{NEW_PREFIX}{layer}")
        last = self._trace(recycling.last_keys, order, roles, cut.new)
        stays = self._call(aten.mul.Tensor, staying, cut.new + 1)
        keys = self._call(aten.cat.default, [stays, last], 1)
        left = cut.drop - cut.new
        set_value(keys, value_at_full_length(staying), left)
        ascending = self._call(getitem, self._call(aten.sort.default, keys, 1), 0)
        for name, function in (
            (KEEP_PREFIX, recycling.keep_set),
            (STAND_IN_PREFIX, recycling.stand_ins),
        ):
            found = self._trace(function, ascending, cut.new, dropped=left)
            found._rename(f"{name}{layer}")
