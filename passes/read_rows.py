"""Compute after the last attention only the rows that are read.

For the first token a decoder reads the last row, and takes it at the very end. All that
treats tokens one by one may as well be given that row alone: output projection and MLP
of the last layer, and the norm after it::

    view: "f32[B, S, H*D]"           # of the last layer's attention
    linear: "f32[B, S, E]" = aten.linear(view, o_proj)
    add: "f32[B, S, E]" = aten.add(residual, linear)
    ...                              # norm, MLP, norm
    norm: "f32[B, S, E]"
    last: "f32[B, 1, E]" = aten.slice(norm, 1, -1)

becomes::

    view: "f32[B, S, H*D]"
    view_read: "f32[B, 1, H*D]" = aten.slice(view, 1, -1)
    residual_read: "f32[B, 1, E]" = aten.slice(residual, 1, -1)
    linear: "f32[B, 1, E]" = aten.linear(view_read, o_proj)
    add: "f32[B, 1, E]" = aten.add(residual_read, linear)
    ...
    norm: "f32[B, 1, E]"
    last: "f32[B, 1, E]" = aten.slice(norm, 1, -1)
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.fx import Graph, GraphModule, Node

from vtprune_fx.graph.insert import Inserter
from vtprune_fx.graph.nodes import operator_of, replace_inputs
from vtprune_fx.graph.sizes import axes_of, mentions
from vtprune_fx.graph.stamps import Stamp, StampKind
from vtprune_fx.graph.values import set_value, value_at_full_length
from vtprune_fx.passes.base import Pass
from vtprune_fx.planning.plan import PrunePlan

aten = torch.ops.aten

_BY_TOKEN: frozenset[object] = frozenset({aten.linear.default, aten.to.dtype})
"""Beside pointwise operators: what treats the tokens of a [B, S, E] one by one."""

_NORMS: frozenset[object] = frozenset({aten.layer_norm.default, aten.rms_norm.default})
"""They do, if they go over the last axis alone."""

_TO_THE_END = torch.iinfo(torch.int64).max
"""End of a slice that has none."""


class ReadRows(Pass):
    """Move a slice of the last rows before what treats tokens one by one.

    1. A slice of a known number of last rows: taken as early as the graph allows.
    2. What something else reads too, a layer's keys and values, attention: all rows.
    3. No such slice, no cuts: unchanged.

    Args:
        plan: The cuts.
    """

    runs_after = frozenset({"GatherTokens", "ShiftKeys"})

    def __init__(self, plan: PrunePlan) -> None:
        self._plan = plan

    def edit(self, module: GraphModule) -> bool:
        """Move each slice."""
        if not self._plan.cuts:
            return False
        slices = module.graph.find_nodes(op="call_function", target=aten.slice.Tensor)
        moved = [self._move(module.graph, node) for node in slices]
        return any(moved)

    def _move(self, graph: Graph, last: Node) -> bool:
        if not self._takes_last_rows(last):
            return False
        region, inserter = self._region(last), Inserter(graph)
        read: dict[Node, Node] = {}
        for node in region:
            for given in node.all_input_nodes:
                if given in region or given in read or not self._has_tokens(given):
                    continue
                stamp = Stamp(StampKind.ROWS)
                rows = inserter.call(
                    given.next, stamp, operator_of(last), given, *last.args[1:]
                )
                set_value(rows, value_at_full_length(rows), 0)
                read[given] = rows
        for node in region:
            replace_inputs(node, read)
            value = inserter.value(operator_of(node), node.args, dict(node.kwargs))
            set_value(node, value, 0)
        return bool(region)

    def _takes_last_rows(self, node: Node) -> bool:
        given, axis, *bounds = node.args
        if axis != 1 or len(bounds) != 2 or not isinstance(given, Node):
            return False
        start, end = bounds
        rows = value_at_full_length(node).shape[1]
        if not isinstance(start, int) or start >= 0 or end != _TO_THE_END:
            return False
        return isinstance(rows, int) and self._is_by_token(given)

    def _region(self, last: Node) -> list[Node]:
        """What is read by nothing but each other and the slice, in order."""
        wanted, region = {last.args[0]}, dict[Node, None]()
        node = last.prev
        while node.op != "root":
            readers = node.users.keys() - region.keys() - {last}
            if node in wanted and not readers and self._treats_by_token(node):
                region[node] = None
                wanted.update(node.all_input_nodes)
            node = node.prev
        return list(reversed(region))

    def _treats_by_token(self, node: Node) -> bool:
        if not isinstance(node.target, OpOverload) or not self._is_by_token(node):
            return False
        given = filter(self._has_tokens, node.all_input_nodes)
        return _works_by_token(node) and all(map(self._is_by_token, given))

    def _has_tokens(self, node: Node) -> bool:
        return mentions(value_at_full_length(node), self._plan.tokens)

    def _is_by_token(self, node: Node) -> bool:
        """Whether its value is [B, S, E]."""
        value = value_at_full_length(node)
        if not isinstance(value, Tensor) or value.dim() != 3:
            return False
        return axes_of(value, self._plan.tokens) == (1,)


def _works_by_token(node: Node) -> bool:
    """Whether an operator that gives [B, S, E] treats tokens one by one."""
    operator = node.target
    assert isinstance(operator, OpOverload)
    if operator in _NORMS:
        axes = node.args[1]
        return isinstance(axes, (list, tuple)) and len(axes) == 1
    if operator == aten.mean.dim:
        return node.args[1] in ([-1], [2])
    if operator in _BY_TOKEN:
        return True
    return torch.Tag.pointwise in operator.tags and not operator._schema.is_mutable
