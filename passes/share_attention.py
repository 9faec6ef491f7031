"""Let a cut after attention share the attention's probabilities.

A score computes again what fused attention computed and did not keep. As one operator
they do it once, in about the time of fused attention alone (``received.attend``)::

    attention: "f32[B, H, S, D]" = aten.scaled_dot_product_attention(q, k, v, mask)
    vtprune_keep_3: "i64[B, S - 36]" = vtprune.choose(vtprune_roles, 36, ..., q, k, ...)

becomes::

    both = vtprune.attend_and_choose(v, vtprune_roles, 36, ..., q, k, ...)
    attention: "f32[B, H, S, D]" = both[0]
    vtprune_keep_3: "i64[B, S - 36]" = both[1]
"""

from __future__ import annotations

from operator import getitem

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from vtprune_fx.graph.stamps import STAMP, Stamp, StampKind, cut_nodes
from vtprune_fx.graph.values import set_value, value_at_full_length
from vtprune_fx.passes.base import Pass
from vtprune_fx.planning.plan import PrunePlan
from vtprune_fx.selection import operators

aten = torch.ops.aten


class ShareAttention(Pass):
    """Make one operator of an attention and of the choice by it.

    1. A cut after a layer's attention, fused, in float32 and with a mask that is bool
       or none; the scorer reads queries and keys; score and choice are one operator:
       done.
    2. A cut elsewhere, eager attention, half precision, a mask that is added, dropout,
       a scorer that reads something else: unchanged.

    Args:
        plan: The cuts.
    """

    requires = frozenset({"InsertScores"})
    runs_after = frozenset({"GatherTokens"})

    def __init__(self, plan: PrunePlan) -> None:
        self._plan = plan

    def edit(self, module: GraphModule) -> bool:
        """Replace both nodes of each such cut."""
        named = {node.name: node for node in module.graph.nodes}
        inserted = cut_nodes(module.graph)
        changed = False
        for cut in self._plan.cuts:
            attention = named[cut.attention.node]
            chosen = inserted[cut.attention.layer].keep
            if cut.site == "after_attention" and _can_share(attention, chosen):
                _share(attention, chosen)
                changed = True
        return changed


def _can_share(attention: Node, chosen: Node) -> bool:
    if attention.target != aten.scaled_dot_product_attention.default:
        return False
    if chosen.target != operators.choose:
        return False
    query, key, mask = chosen.args[4:7]
    if not isinstance(query, Node) or not isinstance(key, Node):
        return False
    values = map(value_at_full_length, (attention, query, key))
    exact = all(value.dtype == torch.float32 for value in values)
    return exact and _is_plain(mask, *_told(attention))


def _told(attention: Node) -> tuple[object, object]:
    """How much an attention drops out, and whether its argument makes it causal."""
    given = dict(zip(("dropout_p", "is_causal"), attention.args[4:], strict=False))
    given |= attention.kwargs
    return given.get("dropout_p", 0.0), given.get("is_causal", False)


def _is_plain(mask: object, dropout: object, causal: object) -> bool:
    """Whether attention is what ``received.attend`` makes of such a mask."""
    if dropout != 0.0:
        return False
    if not isinstance(mask, Node):
        return causal is True
    value = value_at_full_length(mask)
    return isinstance(value, Tensor) and value.dtype == torch.bool


def _share(attention: Node, chosen: Node) -> None:
    """Both stay nodes of their names, and now pick from one; nothing lies between."""
    graph = chosen.graph
    with graph.inserting_before(chosen):
        args = (attention.args[2], *chosen.args)
        both = graph.call_function(operators.attend_and_choose, args)
    layer = chosen.meta[STAMP].layer
    both.meta = chosen.meta | {STAMP: Stamp(StampKind.CHOICE, layer)}
    parts = (attention, chosen)
    # They have lost different numbers of tokens.
    set_value(both, tuple(map(value_at_full_length, parts)), None)
    both.append(attention)
    for place, part in enumerate(parts):
        part.target, part.args, part.kwargs = getitem, (both, place), {}
