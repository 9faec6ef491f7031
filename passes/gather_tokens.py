"""Drop tokens: gather every live value at every cut.

At a cut, each value that is live across it and carries the token axis is gathered along
it; everything after reads the gathered version. Graph outputs do not: a layer's keys
and values go into the cache as they were made, before that layer's cut::

    attention: "f32[B, H, S, D]" = aten.scaled_dot_product_attention(q, k, v, mask)
    vtprune_keep_3: "i64[B, S - 36]"
    view: "f32[B, S, H*D]" = aten.reshape(transpose, [B, S, -1])
    linear: "f32[B, S, E]" = aten.linear(view, o_proj)
    add: "f32[B, S, E]" = aten.add(residual, linear)

becomes::

    attention: "f32[B, H, S, D]" = aten.scaled_dot_product_attention(q, k, v, mask)
    vtprune_keep_3: "i64[B, S - 36]"
    length: "Sym(S - 36)" = aten.sym_size(vtprune_keep_3, 1)
    attention_3: "f32[B, H, S - 36, D]" = ...        # attention at vtprune_keep_3
    residual_3: "f32[B, S - 36, E]" = ...
    mask_3: "b8[B, 1, S - 36, S - 36]" = ...         # both axes
    view: "f32[B, S - 36, H*D]" = aten.reshape(transpose, [B, length, -1])
    linear: "f32[B, S - 36, E]" = aten.linear(view, o_proj)
    add: "f32[B, S - 36, E]" = aten.add(residual_3, linear)

What no layer changes (masks, rotary tables, roles) is gathered from the prompt as it
came at every cut, not from what the cut before gathered: a compiler would write that as
one kernel that follows all positions back, a longer one for each cut::

    vtprune_in_prompt_7: "i64[B, S - 92]" = ...      # vtprune_keep_3 at vtprune_keep_7
    mask_7: "b8[B, 1, S - 92, S - 92]" = ...         # mask at vtprune_in_prompt_7

In the form ``cut_op`` each of these gathers is one operator that a compiler does not
look into. There they do follow one another: it would compute the prompt's mask anew for
each that reads it. Besides, they become smaller::

    mask_7: "b8[B, 1, S - 92, S - 92]" = vtprune.take(mask_3, vtprune_keep_7, [2, 3])
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import sympy
import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from vtprune_fx.graph.insert import Inserter
from vtprune_fx.graph.nodes import operator_of, replace_inputs
from vtprune_fx.graph.sizes import Count, mentions, size_expr
from vtprune_fx.graph.stamps import (
    STAMP,
    CutNodes,
    Stamp,
    StampKind,
    cut_nodes,
    stamp_result,
)
from vtprune_fx.graph.trace import kind_of
from vtprune_fx.graph.values import dropped_tokens, set_value, value_at_full_length
from vtprune_fx.passes.base import Form, Pass
from vtprune_fx.planning.plan import LiveValue, PlannedCut, PrunePlan
from vtprune_fx.scorers.roles import VISUAL, padding_counts
from vtprune_fx.selection import operators
from vtprune_fx.selection.per_sample import (
    mask_without,
    per_sample_places,
    roles_without,
)
from vtprune_fx.selection.recycling import hidden_from_each_other, hide

aten = torch.ops.aten

_CHOICES = (operators.choose, operators.attend_and_choose)

Insert = Callable[..., Node]
"""``(operator, *args) -> node``: inserts at the cut at hand."""


class GatherTokens(Pass):
    """Gather what is live at each cut, in one walk over the graph.

    1. A node after a cut: reads the current versions of its inputs; its value has
       the shorter length.
    2. A keep set: what is live is gathered after it; from the original prompt, where
       every cut only chooses from it.
    3. A value shared by all samples, [1, ..., S, ...] (rotary tables): gathered to
       [B, ..., K, ...], since samples keep different tokens.
    4. Rotary tables where positions are compacted: the first K of each row, in samples
       that have visual tokens.
    5. The residual stream where dropped tokens become new ones: gathered from the
       stream with the new tokens appended, all else by stand-in.
    6. Per-sample counts: roles and masks have padding in the places of tokens that are
       dropped without the row becoming shorter.
    7. The output: reads what it read.
    8. No cuts: unchanged.
    """

    requires = frozenset({"InsertScores"})

    def __init__(self, plan: PrunePlan, form: Form = "aten") -> None:
        self._plan = plan
        self._form = form

    def edit(self, module: GraphModule) -> bool:
        """Walk the graph once."""
        plan, graph = self._plan, module.graph
        if not plan.cuts:
            return False
        named = {node.name: node for node in graph.nodes}
        inserted = cut_nodes(graph)
        nodes_of = [inserted[cut.attention.layer] for cut in plan.cuts]
        cuts = {n.positions: (c, n) for c, n in zip(plan.cuts, nodes_of, strict=True)}
        lengths = [named[name] for name in plan.lengths]
        inserter = Inserter(graph)
        values = _Values(inserter, plan.tokens)
        gather = _Gather(inserter, plan, self._form, nodes_of[0])
        current: dict[Node, Node] = {}
        dropped: Count = 0
        for node in list(graph.nodes):
            if node.op == "output":
                break
            if current:
                replace_inputs(node, current)
                values.refresh(node, dropped)
            if node in cuts:
                cut, nodes = cuts[node]
                length, shorter = gather.after(cut, nodes, named, current)
                values.watch(shorter)
                current |= shorter | dict.fromkeys(lengths, length)
                sizes = [named[name] for name in cut.sizes]
                current |= gather.recompute(length, nodes.keep, sizes)
                dropped = cut.dropped
        return True


class _Gather:
    """Inserts the gathers of one cut after another.

    Args:
        inserter: Inserts them.
        plan: The cuts.
        form: How they are written.
        first: The first cut's nodes.
    """

    def __init__(
        self, inserter: Inserter, plan: PrunePlan, form: Form, first: CutNodes
    ) -> None:
        self._inserter = inserter
        self._tokens = plan.tokens
        # Read by the scores of later cuts.
        found = (first.roles, first.class_attention)
        self._read_later = [node.name for node in found if node is not None]
        constant = _constant(plan) | frozenset(self._read_later)
        if _changes_roles(plan):
            constant = frozenset()
        self._by_operator = constant if form == "cut_op" else frozenset()
        self._of_prompt = constant - self._by_operator
        self._in_prompt: Node | None = None
        self._rows: Node | None = None
        self._has_visual: Node | None = None

    def after(
        self,
        cut: PlannedCut,
        nodes: CutNodes,
        named: Mapping[str, Node],
        current: Mapping[Node, Node],
    ) -> tuple[Node, dict[Node, Node]]:
        """Gather what is live across a cut.

        Returns:
            The prompt's new length, and for each live value the version after the cut.
        """
        layer = cut.attention.layer
        keep, positions = nodes.keep, nodes.positions
        anchor, stamp = positions.next, Stamp(StampKind.GATHER, layer)
        insert = partial(self._inserter.call, anchor, stamp)
        length = insert(aten.sym_size.int, keep, 1)
        if self._rows is None:
            self._rows = _sample_rows(insert, keep)
        places = positions
        if cut.places and cut.share is not None:
            roles = current.get(nodes.roles, nodes.roles)
            places = self._per_sample_places(anchor, stamp, roles, nodes)
        elif cut.places:
            places = self._places(insert, positions, length, nodes.roles)
        self._in_prompt = self._follow(insert, positions, layer)
        shorter: dict[Node, Node] = {}
        for live in (*cut.live, *(LiveValue(name, (1,)) for name in self._read_later)):
            original = named[live.node]
            value, index = current.get(original, original), positions
            if live.node in cut.places:
                index = places
            elif live.node in self._of_prompt:
                value, index = original, self._in_prompt
            if nodes.new is not None and live.node == cut.hidden:
                value, index = _with_new(insert, value, nodes.new, cut), keep
            take = _take_by_operator if live.node in self._by_operator else _take
            taken = take(insert, value, self._rows, index, live.axes)
            if nodes.new is not None and len(live.axes) == 2:
                taken = self._in_order(anchor, stamp, taken, positions)
            if cut.share is not None:
                change = _change_of(live, nodes)
                taken = self._changed(anchor, stamp, change, taken, keep)
            shorter[original] = taken
        return length, shorter

    def recompute(
        self, length: Node, keep: Node, sizes: Sequence[Node]
    ) -> dict[Node, Node]:
        """Compute sizes once more, of the prompt's new length.

        Args:
            length: The new length.
            keep: The cut's keep set.
            sizes: Nodes of sizes that depend on the length of the prompt, and of the
                batch at most.
        """
        anchor, stamp = length.next, length.meta[STAMP]
        known = {self._tokens: length}
        made: dict[Node, Node] = {}
        for size in sizes:
            expr = size_expr(value_at_full_length(size))
            if not expr.free_symbols <= known.keys():
                batch = self._inserter.call(anchor, stamp, aten.sym_size.int, keep, 0)
                known[size_expr(value_at_full_length(batch))] = batch
            made[size] = self._inserter.size(anchor, stamp, expr, known)
        return made

    def _follow(self, insert: Insert, positions: Node, layer: int) -> Node:
        """[B, K]: positions of the kept tokens in the original prompt."""
        if self._in_prompt is None or not self._of_prompt:
            return positions
        assert self._rows is not None
        found = _take(insert, self._in_prompt, self._rows, positions, (1,))
        return stamp_result(found, StampKind.IN_PROMPT, layer)

    def _places(
        self, insert: Insert, positions: Node, length: Node, roles: Node
    ) -> Node:
        """[B, K]: the first places; ``positions`` in a sample without an image."""
        if self._has_visual is None:
            visual = insert(aten.eq.Scalar, roles, VISUAL)
            self._has_visual = insert(aten.any.dim, visual, 1, True)
        device = value_at_full_length(positions).device
        first = insert(aten.arange.default, length, device=device)
        return insert(aten.where.self, self._has_visual, first, positions)

    def _per_sample_places(
        self, anchor: Node, stamp: Stamp, roles: Node, nodes: CutNodes
    ) -> Node:
        """[B, K]: the first places of each sample, wherever its padding ends."""
        trace = partial(self._inserter.trace, anchor, stamp)
        padding = trace(padding_counts, roles, dropped=_known(roles))
        gone = _known(nodes.keep)
        found = (roles, nodes.positions, nodes.keep, padding)
        return trace(per_sample_places, *found, dropped=gone)

    def _in_order(
        self, anchor: Node, stamp: Stamp, mask: Node, positions: Node
    ) -> Node:
        """A gathered mask in which no new token attends to a later one."""
        gone = _known(positions)
        trace = partial(self._inserter.trace, anchor, stamp, dropped=gone)
        hidden = trace(hidden_from_each_other, positions)
        return trace(hide, mask, hidden)

    def _changed(
        self,
        anchor: Node,
        stamp: Stamp,
        change: Callable[[Tensor, Tensor], Tensor] | None,
        taken: Node,
        keep: Node,
    ) -> Node:
        """Gathered roles or a mask in which tokens dropped in place are padding."""
        if change is None:
            return taken
        trace = partial(self._inserter.trace, anchor, stamp, dropped=_known(keep))
        return trace(change, taken, keep)


def _change_of(
    live: LiveValue, nodes: CutNodes
) -> Callable[[Tensor, Tensor], Tensor] | None:
    """What makes padding of tokens that are dropped in place, in a gathered value."""
    if live.node == nodes.roles.name:
        return roles_without
    return mask_without if len(live.axes) == 2 else None


def _known(node: Node) -> Count:
    """The number of tokens that a value lacks, where that is known."""
    gone = dropped_tokens(node)
    assert gone is not None, f"{node} lacks a known number of tokens"
    return gone


def _with_new(insert: Insert, value: Node, new: Node, cut: PlannedCut) -> Node:
    """The residual stream with the new tokens appended."""
    longer = insert(aten.cat.default, [value, new], 1)
    set_value(longer, value_at_full_length(value), _known(value) - cut.new)
    return longer


def _changes_roles(plan: PrunePlan) -> bool:
    """Whether cuts make more of masks and roles than a choice.

    New tokens and tokens that are dropped in place change both at each cut.
    """
    return any(cut.new or cut.share is not None for cut in plan.cuts)


def _constant(plan: PrunePlan) -> frozenset[str]:
    """Values that are there at the first cut: later cuts only choose from them."""
    return frozenset(live.node for live in plan.cuts[0].live)


def _sample_rows(insert: Insert, keep: Node) -> Node:
    """[B, 1]: the number of each sample, to index with beside a keep set."""
    samples = insert(aten.sym_size.int, keep, 0)
    device = value_at_full_length(keep).device
    count = insert(aten.arange.default, samples, device=device)
    return insert(aten.unsqueeze.default, count, 1)


def _take(
    insert: Insert, value: Node, rows: Node, keep: Node, axes: tuple[int, ...]
) -> Node:
    """The kept tokens of each sample along the token axes, by ``value[rows, keep]``.

    Not ``aten.gather``: its index would be blown up to the value's shape, and TensorRT
    has no converter for it with dynamic shapes.
    """
    gone = dropped_tokens(keep)
    for axis in axes:
        if axis != 1:
            value = insert(aten.transpose.int, value, 1, axis)
        if _samples(value) == 1:
            value = insert(aten.squeeze.dim, value, 0)
            value = insert(aten.index.Tensor, value, [keep])
        else:
            value = insert(aten.index.Tensor, value, [rows, keep])
        if axis != axes[-1]:
            set_value(value, value_at_full_length(value), None)
        if axis != 1:
            value = insert(aten.transpose.int, value, 1, axis)
    set_value(value, value_at_full_length(value), gone)
    return value


def _take_by_operator(
    insert: Insert, value: Node, rows: Node, keep: Node, axes: tuple[int, ...]
) -> Node:
    """As ``_take``, in one operator.

    An attention's output lies in memory token by token, whatever its axes say: it is
    transposed first, so that the operator copies one token after the other.
    """
    turned = len(axes) == 1 and axes != (1,)
    if turned:
        value = insert(aten.transpose.int, value, 1, *axes)
    taken = insert(operators.take, value, keep, [1] if turned else list(axes))
    set_value(taken, value_at_full_length(taken), dropped_tokens(keep))
    if turned:
        taken = insert(aten.transpose.int, taken, 1, *axes)
        set_value(taken, value_at_full_length(taken), dropped_tokens(keep))
    return taken


class _Values:
    """Keeps every recorded value after a cut correct.

    Nearly always it is the value that it was, with fewer tokens. The exceptions are
    values that all samples shared and, once gathered, no longer do: what reads one of
    those is run on fakes again, except a choice: it has a row per sample as it is, and
    run at full length it would drop tokens.
    """

    def __init__(self, inserter: Inserter, tokens: sympy.Symbol) -> None:
        self._inserter = inserter
        self._tokens = tokens
        self._widened: set[Node] = set()

    def watch(self, shorter: Mapping[Node, Node]) -> None:
        """Note which values have one row per sample since a cut, and had one."""
        self._widened |= {
            now for was, now in shorter.items() if _samples(was) != _samples(now)
        }

    def refresh(self, node: Node, dropped: Count) -> None:
        """Set the value of a node after a cut."""
        full, gone = value_at_full_length(node), dropped_tokens(node)
        reads_widened = not self._widened.isdisjoint(node.all_input_nodes)
        if reads_widened and operator_of(node) not in _CHOICES:
            shared = full
            full = self._inserter.value(operator_of(node), node.args, dict(node.kwargs))
            if kind_of(full) != kind_of(shared):
                self._widened.add(node)
        if mentions(full, self._tokens):
            set_value(node, full, None if gone is None else gone + dropped)


def _samples(node: Node) -> sympy.Expr:
    return size_expr(value_at_full_length(node).shape[0])
