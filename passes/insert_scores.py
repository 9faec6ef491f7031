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

from vtprune_fx.errors import PlanError, VtpruneError
from vtprune_fx.graph import Inserter, Stamp
from vtprune_fx.passes.base import Pass
from vtprune_fx.plan import PlannedCut, PrunePlan
from vtprune_fx.scorers import rate_of
from vtprune_fx.scoring import lowest_first, token_roles

aten = torch.ops.aten

ROLES = "vtprune_roles"
"""Name of the tokens' roles, [B, S]."""

KEEP_PREFIX = "vtprune_keep_"
"""A cut's keep set is named this and the layer's number, in every exported form too."""


_END = sys.maxsize
"""A slice to the end of a dimension."""


class InsertScores(Pass):
    """Insert score and keep set of every cut, behind the node at which tokens leave.

    1. A cut behind attention or layer: rated by the layer's own queries and keys.
    2. A cut ahead of a layer: rated by copies of what will be its queries and keys.
    3. No cuts: unchanged.
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
        for cut in plan.cuts:
            anchor = named[cut.edge].next
            stamp = Stamp("score", cut.attention.layer)
            seen = _Seen(named, _look_ahead(inserter, anchor, cut, named))
            if roles is None:
                roles = self._insert_roles(inserter, anchor, cut, seen)
            evidence = _evidence(cut, seen, roles)
            rated = _trace(inserter, anchor, stamp, plan.recipe.score, rate, evidence)
            seen.erase_unread()
            insert = partial(inserter.call, anchor, Stamp("keep", cut.attention.layer))
            order = inserter.trace(anchor, stamp, lowest_first, rated, roles)
            _insert_keep(insert, order, cut)
        return True

    def _insert_roles(
        self, inserter: Inserter, anchor: Node, cut: PlannedCut, seen: _Seen
    ) -> Node:
        """Insert the roles with the first cut, whose layer's mask tells the padding."""
        roles = inserter.trace(
            anchor,
            Stamp("score", -1),
            token_roles,
            seen.node(self._plan.visual),
            seen.node(cut.attention.mask),
        )
        roles._rename(ROLES)
        return roles


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
            found=f"{type(error).__name__}: {str(error).splitlines()[0]}",
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


def _insert_keep(
    insert: Callable[..., Node], lowest_first: Node, cut: PlannedCut
) -> None:
    """Positions that stay when the first ``drop`` leave, ascending.

    Ascending order keeps a causal mask causal.
    """
    staying = insert(aten.slice.Tensor, lowest_first, 1, cut.drop, _END, drop=cut.drop)
    keep = insert(getitem, insert(aten.sort.default, staying, 1), 0)
    keep._rename(f"{KEEP_PREFIX}{cut.attention.layer}")
