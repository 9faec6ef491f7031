"""Score the visual tokens at every cut and choose which are kept.

A side branch after the node at which tokens will be dropped; attention stays fused::

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

Before a layer (``before_layer``) its queries and keys are not there yet: the nodes that
make them are copied in, to score by, and run again after the cut on what is kept.

Nothing reads ``vtprune_keep_3`` yet: the graph computes what it did before.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

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
    OF,
    SHARE,
    Chosen,
    CutWriter,
    by_number,
    by_rank,
)
from vtprune_fx.planning.plan import PlannedCut, PrunePlan
from vtprune_fx.scorers.evidence import Evidence
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
    """Insert score and keep set of every cut, after the node where tokens are dropped.

    1. A cut after attention or layer: scored by the layer's queries and keys.
    2. A cut before a layer: scored by copies of what will be its queries and keys.
    3. Samples that drop different numbers: a token dropped in one sample where fewer
       are dropped in all stays in its row as padding.
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
        if not plan.cuts:
            return False
        named = {node.name: node for node in graph.nodes}
        inserter = Inserter(graph, DEFINITIONS if self._form == "aten" else None)
        rate = rate_of(plan.recipe.score, plan.recipe.scorer_options())
        shared: _Shared | None = None
        for cut in plan.cuts:
            schedule = named.get(plan.schedule or "")
            writer = CutWriter(inserter, named[cut.edge].next, cut, schedule)
            seen = _Seen(named, _copies_before(writer, named))
            shared = shared or self._insert_shared(writer, seen)
            self._insert_cut(writer, seen, shared, rate)
            seen.erase_unread()
        return True

    def _insert_cut(
        self,
        writer: CutWriter,
        seen: _Seen,
        shared: _Shared,
        rate: Callable[[Evidence], Tensor],
    ) -> None:
        """Insert a cut's score and keep set."""
        recipe, cut = self._plan.recipe, writer.cut
        evidence = _evidence(cut, seen, shared)
        with _scorer_errors(recipe.score):
            if self._form == "cut_op" and _is_plain(cut):
                read = writer.inserter.reads(rate, evidence)  # type: ignore[arg-type] # of nodes
                self._insert_choice(writer, shared.roles, read)
                return
            scores = writer.score(rate, evidence)
        if shared.came is not None:
            self._insert_per_sample(writer, scores, shared.roles, shared.came)
            return
        order = writer.score(lowest_first, scores, shared.roles)
        if cut.rule is None:
            chosen = by_number(writer, order)
        else:
            chosen = by_rank(writer, order, evidence, recipe.recycle)
        if cut.new:
            merged = self._insert_new(writer, seen, chosen)
            _insert_keep_set_with_new(writer, merged, shared.roles, chosen)
        else:
            writer.result(writer.ascending(chosen.kept), StampKind.KEEP)

    def _insert_choice(
        self, writer: CutWriter, roles: Node, read: Evidence[Node]
    ) -> None:
        """Insert score and choice as one operator, given the evidence that is read."""
        recipe, cut = self._plan.recipe, writer.cut
        keep = writer.call(
            operators.choose,
            roles,
            writer.drop,
            recipe.score,
            json.dumps(recipe.scorer_options()),
            read.query,
            read.key,
            read.mask,
            read.scale,
            read.hidden,
            read.cos,
            read.sin,
            read.class_attention,
            drop=cut.drop,
        )
        writer.result(keep, StampKind.KEEP)

    def _insert_per_sample(
        self, writer: CutWriter, scores: Node, roles: Node, came: Node
    ) -> None:
        """Choose what is kept where each sample drops another number.

        A token that is dropped where fewer are dropped in all stays as padding, at the
        start of the row, and is -1 in the keep set.
        """
        cut = writer.cut
        share: Node | int | None = cut.share
        of: Node | int | None = self._plan.of
        if writer.schedule is not None:
            share, of = writer.number(SHARE), writer.number(OF)
        order = writer.trace(per_sample_order, scores, roles, came, share, of)
        dropped = writer.trace(per_sample_dropped, order, came, share, of)
        kept, gone = (writer.without_dropped(node) for node in (order, dropped))
        keys = writer.trace(per_sample_keys, kept, gone, dropped=cut.drop)
        ascending = writer.ascending(keys)
        writer.result(ascending, StampKind.KEYS)
        keep = writer.trace(per_sample_keep_set, ascending, dropped=cut.drop)
        writer.result(keep, StampKind.KEEP)
        stand_ins = writer.trace(per_sample_stand_ins, ascending, dropped=cut.drop)
        writer.result(stand_ins, StampKind.STAND_IN)

    def _insert_shared(self, writer: CutWriter, seen: _Seen) -> _Shared:
        """Insert, with the first cut, what serves all."""
        roles = self._insert_roles(writer, seen)
        attended = self._insert_class_attention(writer, seen)
        if self._plan.of is None:
            return _Shared(roles, attended)
        return _Shared(roles, attended, writer.for_all_cuts(visual_counts, roles))

    def _insert_roles(self, writer: CutWriter, seen: _Seen) -> Node:
        """Insert the tokens' roles; the first cut's mask shows the padding."""
        visual = writer.for_all_cuts(marked, *map(seen.node, self._plan.visual))
        mask = seen.node(writer.cut.attention.mask)
        roles = writer.for_all_cuts(token_roles, visual, mask)
        if raters := scorer(self._plan.recipe.score).raters:
            roles = writer.for_all_cuts(raters, self._embeddings(seen), roles)
        return stamp_result(roles, StampKind.ROLES)

    def _insert_class_attention(self, writer: CutWriter, seen: _Seen) -> Node | None:
        """Insert what the scorer reads of the vision tower, if it reads any."""
        tower = self._plan.tower
        if tower is None or not scorer(self._plan.recipe.score).tower:
            return None
        heads = map(seen.node, (tower.query, tower.key, *self._plan.visual))
        attended = writer.for_all_cuts(
            contextual.class_attention, *heads, tower.scale, tower.leading
        )
        return stamp_result(attended, StampKind.CLASS_ATTENTION)

    def _insert_new(self, writer: CutWriter, seen: _Seen, chosen: Chosen) -> Node:
        """Insert the new tokens: by a vision tower's keys, or by hidden states."""
        cut = writer.cut
        hidden, clustered = seen.node(cut.hidden), chosen.clustered
        assert hidden is not None, "the edge of such a cut is the residual stream"
        if (tower := self._tower_of_new) is not None:
            by = map(seen.node, (tower.key, *self._plan.visual))
            keys = writer.trace(contextual.mean_keys, *by, tower.leading)
            return writer.trace(
                contextual.merge, hidden, keys, clustered, chosen.clusters
            )
        recycle = self._plan.recipe.recycle
        paper = recycle is not None and recycle.form == "paper"
        merge = recycling.merge if cut.rule is None else attention_rank.merge
        merged = writer.trace(merge, hidden, clustered, chosen.clusters, paper)
        if cut.rule is None:
            return merged
        return writer.trace(attention_rank.first, merged, chosen.new)

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


@dataclass(frozen=True)
class _Shared:
    """Nodes that serve all cuts.

    Attributes:
        roles: [B, S].
        class_attention: [B, S], None where the scorer does not read it.
        came: [B], visual tokens that samples came with; None where all drop the same.
    """

    roles: Node
    class_attention: Node | None
    came: Node | None = None


class _Seen:
    """The values that a cut is scored by: the graph's, or copies made before the cut.

    Args:
        named: The graph's nodes by name.
        copies: Copies of nodes that stand after the cut.
    """

    def __init__(self, named: Mapping[str, Node], copies: Mapping[Node, Node]) -> None:
        self._named, self._copies = named, copies

    def node(self, name: str | None) -> Node | None:
        """A node, or its copy."""
        if name is None:
            return None
        return self._copies.get(self._named[name], self._named[name])

    def given(self, name: str) -> Node:
        """The same of a name that every cut has."""
        return self._copies.get(self._named[name], self._named[name])

    def erase_unread(self) -> None:
        """Erase copies that nothing reads."""
        for copied in reversed(list(self._copies.values())):
            if not copied.users:
                copied.graph.erase_node(copied)


def _is_plain(cut: PlannedCut) -> bool:
    """Whether a fixed number of tokens is dropped, the same in each sample."""
    return not cut.new and cut.rule is None and cut.share is None


@contextlib.contextmanager
def _scorer_errors(score: str) -> Iterator[None]:
    """Errors of a scorer that is traced, as errors of ours.

    Raises:
        PlanError: The scorer cannot be traced.
    """
    try:
        yield
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


def _evidence(cut: PlannedCut, seen: _Seen, shared: _Shared) -> Evidence[Node]:
    """The nodes that a cut is scored by."""
    at, stream = cut.attention, cut.attention.stream
    return Evidence(
        query=seen.given(at.query),
        key=seen.given(at.key),
        mask=seen.node(at.mask),
        roles=shared.roles,
        scale=at.scale,
        hidden=seen.node(cut.hidden),
        cos=seen.node(stream.cos),
        sin=seen.node(stream.sin),
        class_attention=shared.class_attention,
    )


def _copies_before(writer: CutWriter, named: Mapping[str, Node]) -> dict[Node, Node]:
    """Copy what makes a layer's queries and keys, for a cut that comes before them."""
    cut, at = writer.cut, writer.cut.attention
    if cut.site != "before_layer":
        return {}
    names = (at.query, at.key, at.mask)
    wanted = {named[name] for name in names if name is not None}
    later: list[Node] = []
    node = named[at.node].prev
    while node is not named[cut.edge]:
        if node in wanted:
            later.append(node)
            wanted.update(node.all_input_nodes)
        node = node.prev
    stamp = Stamp(StampKind.SCORE, at.layer)
    return writer.inserter.copy(writer.anchor, stamp, reversed(later))


def _insert_keep_set_with_new(
    writer: CutWriter, merged: Node, roles: Node, chosen: Chosen
) -> None:
    """Insert the keep set that contains a cut's new tokens."""
    cut = writer.cut
    writer.result(merged, StampKind.NEW)
    last = writer.trace(recycling.last_keys, chosen.order, roles, chosen.new)
    kept = writer.trace(recycling.kept_keys, chosen.kept, chosen.new, dropped=cut.drop)
    keys = writer.call(aten.cat.default, [kept, last], 1)
    set_value(keys, value_at_full_length(kept), cut.gone)
    ascending = writer.ascending(keys)
    writer.result(ascending, StampKind.KEYS)
    keep = writer.trace(recycling.keep_set, ascending, chosen.new, dropped=cut.gone)
    writer.result(keep, StampKind.KEEP)
    stand_ins = writer.trace(
        recycling.stand_ins, ascending, chosen.new, dropped=cut.gone
    )
    writer.result(stand_ins, StampKind.STAND_IN)
