"""Let tokens leave: gather every live value at every cut.

At a cut, each value that is live across it and carries the token axis is gathered along
it; everything after reads the gathered version. Graph outputs do not: a layer's keys
and values go into the cache as they were made, ahead of the layer's own cut::

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

from collections.abc import Mapping
from functools import partial

import sympy
import torch
from torch.fx import GraphModule, Node

from vtprune_fx.graph.insert import Inserter, Stamp
from vtprune_fx.graph.nodes import replace_inputs
from vtprune_fx.graph.sizes import mentions, size_expr
from vtprune_fx.graph.trace import kind_of
from vtprune_fx.graph.values import dropped_tokens, set_value, value_at_full_length
from vtprune_fx.passes.base import Form, Pass
from vtprune_fx.passes.insert_scores import (
    CLASS_ATTENTION,
    KEEP_PREFIX,
    NEW_PREFIX,
    ROLES,
    STAND_IN_PREFIX,
)
from vtprune_fx.passes.keep_sets import Insert
from vtprune_fx.planning.plan import LiveValue, PlannedCut, PrunePlan
from vtprune_fx.scorers.roles import VISUAL, padding_counts
from vtprune_fx.selection import operators
from vtprune_fx.selection.per_sample import mask_without, own_places, roles_without
from vtprune_fx.selection.recycling import hidden_from_each_other, hide

aten = torch.ops.aten

IN_PROMPT_PREFIX = "vtprune_in_prompt_"
"""Positions of the tokens left, in the prompt as it came, and the layer's number."""


class GatherTokens(Pass):
    """Gather what is live at each cut, in one walk over the graph.

    1. A node behind a cut: reads the current versions of its inputs; its value has
       the shorter length.
    2. A keep set: what is live is gathered behind it; from the prompt as it came, where
       no cut makes anything else of it than a choice.
    3. A value shared by all samples, [1, ..., S, ...] (rotary tables): gathered to
       [B, ..., K, ...], since each sample keeps tokens of its own.
    4. Rotary tables where positions are compacted: the first K of each row, in samples
       that have visual tokens.
    5. The residual stream where dropped tokens become new ones: gathered from the
       stream with the new tokens behind it, all else by stand-in.
    6. Samples that lose numbers of their own: roles and masks have padding in the
       places of those who left without the row becoming shorter.
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
        lengths = [named[name] for name in plan.lengths]
        behind = {_last_inserted(cut): cut for cut in plan.cuts}
        inserter = Inserter(graph)
        values = _Values(inserter, plan.tokens)
        gather = _Gather(inserter, plan, self._form)
        current: dict[Node, Node] = {}
        dropped = 0
        for node in list(graph.nodes):
            if node.op == "output":
                break
            if current:
                replace_inputs(node, current)
                values.refresh(node, dropped)
            if cut := behind.get(node.name):
                length, shorter = gather.behind(cut, named, current)
                values.watch(shorter)
                current |= shorter | dict.fromkeys(lengths, length)
                dropped = cut.dropped
        return True


class _Gather:
    """Inserts the gathers of one cut after another."""

    def __init__(self, inserter: Inserter, plan: PrunePlan, form: Form) -> None:
        self._inserter = inserter
        constant = _constant(plan)
        self._whole = constant if form == "cut_op" else frozenset()
        self._of_prompt = constant - self._whole
        self._in_prompt: Node | None = None
        self._rows: Node | None = None
        self._has_visual: Node | None = None

    def behind(
        self,
        cut: PlannedCut,
        named: Mapping[str, Node],
        current: Mapping[Node, Node],
    ) -> tuple[Node, dict[Node, Node]]:
        """Gather what is live across a cut.

        Returns:
            The prompt's new length, and for each live value the version behind the cut.
        """
        layer = cut.attention.layer
        keep, stand_in = named[f"{KEEP_PREFIX}{layer}"], named[_last_inserted(cut)]
        anchor, stamp = stand_in.next, Stamp("gather", layer)
        insert = partial(self._inserter.call, anchor, stamp)
        length = insert(aten.sym_size.int, keep, 1)
        if self._rows is None:
            self._rows = _sample_rows(insert, keep)
        places = stand_in
        if cut.places and cut.share is not None:
            roles = current.get(named[ROLES], named[ROLES])
            places = self._own_places(anchor, stamp, roles, stand_in, keep)
        elif cut.places:
            places = self._places(insert, stand_in, length, named[ROLES])
        self._in_prompt = self._follow(insert, stand_in, layer)
        shorter: dict[Node, Node] = {}
        # Read by the scores of later cuts.
        own = [name for name in (ROLES, CLASS_ATTENTION) if name in named]
        for live in (*cut.live, *(LiveValue(name, (1,)) for name in own)):
            original = named[live.node]
            value, index = current.get(original, original), stand_in
            if live.node in cut.places:
                index = places
            elif live.node in self._of_prompt:
                value, index = original, self._in_prompt
            if cut.new and live.node == cut.hidden:
                value, index = self._with_new(insert, value, cut, named), keep
            take = _take_whole if live.node in self._whole else _take
            taken = take(insert, value, self._rows, index, live.axes)
            if cut.new and len(live.axes) == 2:
                taken = self._in_order(anchor, stamp, taken, stand_in)
            if cut.share is not None:
                taken = self._without_gone(anchor, stamp, taken, keep, live)
            shorter[original] = taken
        return length, shorter

    def _follow(self, insert: Insert, keep: Node, layer: int) -> Node:
        """[B, K]: where the tokens that are left stood in the prompt as it came."""
        if self._in_prompt is None or not self._of_prompt:
            return keep
        assert self._rows is not None
        found = _take(insert, self._in_prompt, self._rows, keep, (1,))
        found._rename(f"{IN_PROMPT_PREFIX}{layer}")
        return found

    def _places(
        self, insert: Insert, stand_in: Node, length: Node, roles: Node
    ) -> Node:
        """[B, K]: the first places of the row, or a prompt's own without image."""
        if self._has_visual is None:
            visual = insert(aten.eq.Scalar, roles, VISUAL)
            self._has_visual = insert(aten.any.dim, visual, 1, True)
        device = value_at_full_length(stand_in).device
        first = insert(aten.arange.default, length, device=device)
        return insert(aten.where.self, self._has_visual, first, stand_in)

    def _own_places(
        self, anchor: Node, stamp: Stamp, roles: Node, stand_in: Node, keep: Node
    ) -> Node:
        """[B, K]: the first places of each sample, wherever its padding ends."""
        trace = partial(self._inserter.trace, anchor, stamp)
        padding = trace(padding_counts, roles, dropped=dropped_tokens(roles))
        gone = dropped_tokens(keep)
        return trace(own_places, roles, stand_in, keep, padding, dropped=gone)

    def _with_new(
        self, insert: Insert, value: Node, cut: PlannedCut, named: Mapping[str, Node]
    ) -> Node:
        """The residual stream, and behind it the new tokens."""
        new = named[f"{NEW_PREFIX}{cut.attention.layer}"]
        longer = insert(aten.cat.default, [value, new], 1)
        gone = dropped_tokens(value)
        assert gone is not None
        set_value(longer, value_at_full_length(value), gone - cut.new)
        return longer

    def _in_order(self, anchor: Node, stamp: Stamp, mask: Node, stand_in: Node) -> Node:
        """A gathered mask, in which no new token sees one behind it."""
        gone = dropped_tokens(stand_in)
        assert gone is not None
        trace = partial(self._inserter.trace, anchor, stamp, dropped=gone)
        hidden = trace(hidden_from_each_other, stand_in)
        return trace(hide, mask, hidden)

    def _without_gone(
        self, anchor: Node, stamp: Stamp, taken: Node, keep: Node, live: LiveValue
    ) -> Node:
        """Gathered roles or a mask, in which who left in place is padding."""
        gone = dropped_tokens(keep)
        assert gone is not None
        trace = partial(self._inserter.trace, anchor, stamp, dropped=gone)
        if live.node == ROLES:
            return trace(roles_without, taken, keep)
        return trace(mask_without, taken, keep) if len(live.axes) == 2 else taken


def _constant(plan: PrunePlan) -> frozenset[str]:
    """Values that are there at the first cut: later cuts only choose from them.

    New tokens and those that left in place change masks and roles at each cut.
    """
    first, *_ = plan.cuts
    if any(cut.new or cut.share is not None for cut in plan.cuts):
        return frozenset()
    return frozenset({live.node for live in first.live} | {ROLES, CLASS_ATTENTION})


def _last_inserted(cut: PlannedCut) -> str:
    """Name of the positions that a cut gathers by, the last node of its score.

    The keep set, unless that has negative numbers.
    """
    stands_in = cut.new or cut.share is not None
    return f"{STAND_IN_PREFIX if stands_in else KEEP_PREFIX}{cut.attention.layer}"


def _sample_rows(insert: Insert, keep: Node) -> Node:
    """[B, 1]: the number of each sample, to index with beside a keep set."""
    samples = insert(aten.sym_size.int, keep, 0)
    device = value_at_full_length(keep).device
    count = insert(aten.arange.default, samples, device=device)
    return insert(aten.unsqueeze.default, count, 1)


def _take(
    insert: Insert, value: Node, rows: Node, keep: Node, axes: tuple[int, ...]
) -> Node:
    """Each sample's own tokens along its token axes, by ``value[rows, keep]``.

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


def _take_whole(
    insert: Insert, value: Node, rows: Node, keep: Node, axes: tuple[int, ...]
) -> Node:
    """As ``_take``, in one operator.

    An attention's output lies in memory token by token, whatever its axes say: it is
    turned, so that the operator copies a token as a whole.
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
    """Keeps every value behind a cut true.

    Nearly always it is the value that it was, with fewer tokens. The exceptions are
    values that all samples shared and, once gathered, no longer do: what reads one of
    those is run on fakes again.
    """

    def __init__(self, inserter: Inserter, tokens: sympy.Symbol) -> None:
        self._inserter = inserter
        self._tokens = tokens
        self._widened: set[Node] = set()

    def watch(self, shorter: Mapping[Node, Node]) -> None:
        """Note which values a cut made one per sample."""
        self._widened |= {
            now for was, now in shorter.items() if _samples(was) != _samples(now)
        }

    def refresh(self, node: Node, dropped: int) -> None:
        """Set the value of a node behind a cut."""
        full, gone = value_at_full_length(node), dropped_tokens(node)
        if not self._widened.isdisjoint(node.all_input_nodes):
            shared = full
            full = self._inserter.value(node.target, node.args, dict(node.kwargs))
            if kind_of(full) != kind_of(shared):
                self._widened.add(node)
        if mentions(full, self._tokens):
            set_value(node, full, None if gone is None else gone + dropped)


def _samples(node: Node) -> sympy.Expr:
    return size_expr(value_at_full_length(node).shape[0])
