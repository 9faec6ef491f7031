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

or, in the form ``cut_op``, one operator::

    vtprune_keep_3: "i64[B, S - 36]" = vtprune.choose(vtprune_roles, 36, ...)

Where the best of the dropped tokens become C new ones, these are made here too::

    vtprune_new_3: "f32[B, C, E]"                 # of clusters
    vtprune_keep_3: "i64[B, S - 36 + C]"          # -C to -1 are the new tokens
    vtprune_stand_in_3: "i64[B, S - 36 + C]"      # the position that each passes for

Ahead of a layer (``before_layer``) its queries and keys are not there yet: the nodes
that make them are copied in, to be rated by, and run again behind the cut on what is
left.

Nothing reads ``vtprune_keep_3`` yet: the graph computes what it did before.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import partial
from operator import getitem
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from vtprune_fx.analysis.vision_tower import Tower
from vtprune_fx.errors import PlanError, VtpruneError, first_sentence
from vtprune_fx.graph.insert import Inserter
from vtprune_fx.graph.stamps import Stamp, StampKind, stamp_result
from vtprune_fx.graph.values import set_value, value_at_full_length
from vtprune_fx.ops.received import DEFINITIONS
from vtprune_fx.passes.base import Form, Pass
from vtprune_fx.passes.keep_sets import (
    Leaving,
    behind_those_leaving,
    by_number,
    by_rank,
)
from vtprune_fx.planning.plan import PlannedCut, PrunePlan
from vtprune_fx.recipes.schema import Recipe
from vtprune_fx.scorers.registry import rate_of, scorer
from vtprune_fx.scorers.roles import marked, token_roles, visual_counts
from vtprune_fx.selection import attention_rank, contextual, operators, recycling
from vtprune_fx.selection.order import lowest_first
from vtprune_fx.selection.per_sample import (
    per_sample_dropped,
    per_sample_keep_set,
    per_sample_keys,
    per_sample_order,
    per_sample_stand_ins,
)

aten = torch.ops.aten


class InsertScores(Pass):
    """Insert score and keep set of every cut, behind the node at which tokens leave.

    1. A cut behind attention or layer: rated by the layer's own queries and keys.
    2. A cut ahead of a layer: rated by copies of what will be its queries and keys.
    3. Samples that lose numbers of their own: who leaves where fewer leave in all stays
       in place as padding.
    4. No cuts: unchanged.

    Args:
        plan: The cuts.
        form: How they are written.
    """

    def __init__(self, plan: PrunePlan, form: Form = "aten") -> None:
        self._plan = plan
        self._form = form

    def edit(self, module: GraphModule) -> bool:
        """Insert the branches."""
        plan, graph = self._plan, module.graph
        named = {node.name: node for node in graph.nodes}
        if not plan.cuts:
            return False
        inserter = Inserter(graph, DEFINITIONS if self._form == "aten" else None)
        rate = rate_of(plan.recipe.score, plan.recipe.scorer_options())
        roles: Node | None = None
        attended: Node | None = None
        came: Node | None = None
        for cut in plan.cuts:
            anchor = named[cut.edge].next
            stamp = Stamp(StampKind.SCORE, cut.attention.layer)
            seen = _Seen(named, _look_ahead(inserter, anchor, cut, named))
            if roles is None:
                roles = self._insert_roles(inserter, anchor, cut, seen)
                attended = self._insert_class_attention(inserter, anchor, seen)
            evidence = (*_evidence(cut, seen, roles), attended)
            trace = partial(_traced, plan.recipe.score, rate, evidence)
            insert = partial(inserter.trace, anchor, stamp)
            if self._form == "cut_op" and _is_plain(cut):
                read = trace(inserter.reads)
                self._insert_choice(inserter, anchor, cut, roles, read)
            elif plan.of is None:
                order = insert(lowest_first, trace(insert), roles)
                at = (inserter, anchor, order, cut)
                self._insert_keep_set(at, seen, evidence)
            else:
                rated = trace(insert)
                came = came or inserter.trace(
                    anchor, Stamp(StampKind.SCORE), visual_counts, roles
                )
                rating = (rated, roles, came)
                _insert_own(inserter, anchor, cut, rating, plan.of)
            seen.erase_unread()
        return True

    def _insert_choice(
        self,
        inserter: Inserter,
        anchor: Node,
        cut: PlannedCut,
        roles: Node,
        read: list[Any],
    ) -> None:
        """Insert score and choice as one operator, given the evidence that is read."""
        recipe, layer = self._plan.recipe, cut.attention.layer
        query, key, mask, _, *others = read
        keep = inserter.call(
            anchor,
            Stamp(StampKind.CHOICE, layer),
            operators.choose,
            *(roles, cut.drop, recipe.score, json.dumps(recipe.scorer_options())),
            *(query, key, mask, *others),
            drop=cut.drop,
        )
        stamp_result(keep, StampKind.KEEP, layer)

    def _insert_keep_set(
        self,
        at: tuple[Inserter, Node, Node, PlannedCut],
        seen: _Seen,
        evidence: tuple[Node | float | None, ...],
    ) -> None:
        """Choose who stays; ``at`` has the order of leaving behind the anchor."""
        inserter, anchor, _, cut = at
        recipe, roles = self._plan.recipe, evidence[3]
        assert isinstance(roles, Node)
        leaving = by_number(*at) if cut.rule is None else by_rank(*at, evidence, recipe)
        if cut.new:
            new = _New(inserter, anchor, cut, recipe)
            merged = new.merge(seen, leaving, self._tower_of_new, self._plan.visual)
            new.insert(merged, roles, leaving)
            return
        insert = partial(
            inserter.call, anchor, Stamp(StampKind.CHOICE, cut.attention.layer)
        )
        keep = insert(getitem, insert(aten.sort.default, leaving.staying, 1), 0)
        stamp_result(keep, StampKind.KEEP, cut.attention.layer)

    def _insert_roles(
        self, inserter: Inserter, anchor: Node, cut: PlannedCut, seen: _Seen
    ) -> Node:
        """Insert the roles with the first cut, whose layer's mask tells the padding."""
        insert = partial(inserter.trace, anchor, Stamp(StampKind.SCORE))
        visual = insert(marked, *map(seen.node, self._plan.visual))
        roles = insert(token_roles, visual, seen.node(cut.attention.mask))
        if raters := scorer(self._plan.recipe.score).raters:
            roles = insert(raters, self._embeddings(seen), roles)
        stamp_result(roles, StampKind.ROLES)
        return roles

    def _insert_class_attention(
        self, inserter: Inserter, anchor: Node, seen: _Seen
    ) -> Node | None:
        """Insert, with the first cut, what the score reads of the vision tower."""
        tower = self._plan.tower
        if tower is None or not scorer(self._plan.recipe.score).tower:
            return None
        heads = map(seen.node, (tower.query, tower.key, *self._plan.visual))
        insert = partial(inserter.trace, anchor, Stamp(StampKind.SCORE))
        sizes = tower.scale, tower.leading
        attended = insert(contextual.class_attention, *heads, *sizes)
        stamp_result(attended, StampKind.CLASS_ATTENTION)
        return attended

    @property
    def _tower_of_new(self) -> Tower | None:
        """By whose keys new tokens are merged, if not by hidden states."""
        recycle = self._plan.recipe.recycle
        by_keys = recycle is not None and recycle.form == "contextual"
        return self._plan.tower if by_keys else None

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


def _is_plain(cut: PlannedCut) -> bool:
    """Whether a number of tokens leaves, the same in each sample, for good."""
    return not cut.new and cut.rule is None and cut.share is None


def _traced(
    score: str,
    rate: Callable[..., Tensor],
    evidence: tuple[Node | float | None, ...],
    trace: Callable[..., Any],
) -> Any:
    """What ``trace`` makes of a scorer and its evidence.

    Raises:
        PlanError: The scorer cannot be traced.
    """
    try:
        return trace(rate, *evidence)
    except VtpruneError:
        raise
    except Exception as error:  # whatever a function of the user's may raise
        raise PlanError(
            f"scorer {score!r}",
            expected="a traceable function of the tensors it is given",
            found=first_sentence(error),
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
    return inserter.copy(anchor, Stamp(StampKind.SCORE, at.layer), reversed(behind))


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
    stamp = Stamp(StampKind.CHOICE, layer)
    trace, insert = (partial(f, anchor, stamp) for f in (inserter.trace, inserter.call))
    numbers = (came, cut.share, of)
    order = trace(per_sample_order, rated, roles, *numbers)
    leaving = trace(per_sample_dropped, order, *numbers)
    staying, gone = (behind_those_leaving(insert, n, cut) for n in (order, leaving))
    keys = trace(per_sample_keys, staying, gone, dropped=cut.drop)
    ascending = insert(getitem, insert(aten.sort.default, keys, 1), 0)
    stamp_result(ascending, StampKind.KEYS, layer)
    for kind, function in (
        (StampKind.KEEP, per_sample_keep_set),
        (StampKind.STAND_IN, per_sample_stand_ins),
    ):
        found = trace(function, ascending, dropped=cut.drop)
        stamp_result(found, kind, layer)


class _New:
    """Inserts the new tokens of one cut, and the keep set that holds them."""

    def __init__(
        self, inserter: Inserter, anchor: Node, cut: PlannedCut, recipe: Recipe
    ) -> None:
        stamp = Stamp(StampKind.CHOICE, cut.attention.layer)
        self._trace = partial(inserter.trace, anchor, stamp)
        self._call = partial(inserter.call, anchor, stamp)
        self._cut = cut
        self._paper = recipe.recycle is not None and recipe.recycle.form == "paper"

    def merge(
        self,
        seen: _Seen,
        leaving: Leaving,
        tower: Tower | None,
        visual: tuple[str, ...],
    ) -> Node:
        """Insert the new tokens: by a vision tower's keys, or by hidden states."""
        hidden, clustered = seen.node(self._cut.hidden), leaving.clustered
        assert hidden is not None, "the edge of such a cut is the residual stream"
        if tower is not None:
            by = map(seen.node, (tower.key, *visual))
            keys = self._trace(contextual.mean_keys, *by, tower.leading)
            return self._trace(
                contextual.merge, hidden, keys, clustered, leaving.clusters
            )
        of = (hidden, clustered, leaving.clusters, self._paper)
        if self._cut.rule is None:
            return self._trace(recycling.merge, *of)
        merged = self._trace(attention_rank.merge, *of)
        return self._trace(attention_rank.first, merged, leaving.new)

    def insert(self, merged: Node, roles: Node, leaving: Leaving) -> None:
        """Insert the keep set that holds them."""
        cut, layer = self._cut, self._cut.attention.layer
        stamp_result(merged, StampKind.NEW, layer)
        last = self._trace(recycling.last_keys, leaving.order, roles, leaving.new)
        staying = (leaving.staying, leaving.new)
        stays = self._trace(recycling.stay_keys, *staying, dropped=cut.drop)
        keys = self._call(aten.cat.default, [stays, last], 1)
        set_value(keys, value_at_full_length(stays), cut.gone)
        ascending = self._call(getitem, self._call(aten.sort.default, keys, 1), 0)
        stamp_result(ascending, StampKind.KEYS, layer)
        for kind, function in (
            (StampKind.KEEP, recycling.keep_set),
            (StampKind.STAND_IN, recycling.stand_ins),
        ):
            found = self._trace(function, ascending, leaving.new, dropped=cut.gone)
            stamp_result(found, kind, layer)
