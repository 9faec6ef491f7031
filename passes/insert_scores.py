"""Rate the visual tokens at every cut and choose what stays.

A side branch ahead of the layer's attention, which stays fused::

    q: "f32[B, H, S, D]"    k: "f32[B, G, S, D]"    mask: "b8[B, 1, S, S]"
    attention: "f32[B, H, S, D]" = aten.scaled_dot_product_attention(q, k, v, mask)

becomes::

    vtprune_roles: "i64[B, S]"                    # once: visual, instruction, ...
    ...                                           # the scorer, traced
    score: "f32[B, S]"                            # +inf where a token is not visual
    lowest_first: "i64[B, S]" = aten.sort(score)  # visual tokens, padding, text
    vtprune_keep_3: "i64[B, S - 36]" = aten.sort(lowest_first[:, 36:])
    attention: "f32[B, H, S, D]" = aten.scaled_dot_product_attention(q, k, v, mask)

Nothing reads ``vtprune_keep_3`` yet: the graph computes what it did before.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from functools import partial
from operator import getitem

import torch
from torch.fx import GraphModule, Node

from vtprune_fx.graph import Inserter, Stamp
from vtprune_fx.passes.base import Pass
from vtprune_fx.plan import PlannedCut, PrunePlan
from vtprune_fx.scoring import lowest_first, scorer_of, token_roles

aten = torch.ops.aten

ROLES = "vtprune_roles"
"""Name of the tokens' roles, [B, S]."""

KEEP_PREFIX = "vtprune_keep_"
"""A cut's keep set is named this and the layer's number, in every exported form too."""


_END = sys.maxsize
"""A slice to the end of a dimension."""


class InsertScores(Pass):
    """Insert score and keep set of every cut, ahead of the layer's attention.

    1. A layer with a cut: inserted.
    2. No cuts: unchanged.
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
        roles = self._insert_roles(inserter, named)
        score = scorer_of(plan.recipe)
        for cut in plan.cuts:
            at = cut.attention
            anchor = named[at.node]
            stamp = Stamp("score", at.layer)
            rated = inserter.trace(
                anchor,
                stamp,
                score,
                named[at.query],
                named[at.key],
                named[at.mask] if at.mask else None,
                roles,
                at.scale,
            )
            insert = partial(inserter.call, anchor, Stamp("keep", at.layer))
            order = inserter.trace(anchor, stamp, lowest_first, rated, roles)
            _insert_keep(insert, order, cut)
        return True

    def _insert_roles(self, inserter: Inserter, named: Mapping[str, Node]) -> Node:
        """Insert the roles ahead of the first cut's attention, whose mask they read."""
        at = self._plan.cuts[0].attention
        roles = inserter.trace(
            named[at.node],
            Stamp("score", -1),
            token_roles,
            named[self._plan.visual],
            named[at.mask] if at.mask else None,
        )
        roles._rename(ROLES)
        return roles


def _insert_keep(
    insert: Callable[..., Node], lowest_first: Node, cut: PlannedCut
) -> None:
    """Positions that stay when the first ``drop`` leave, ascending.

    Ascending order keeps a causal mask causal.
    """
    staying = insert(aten.slice.Tensor, lowest_first, 1, cut.drop, _END, drop=cut.drop)
    keep = insert(getitem, insert(aten.sort.default, staying, 1), 0)
    keep._rename(f"{KEEP_PREFIX}{cut.attention.layer}")
