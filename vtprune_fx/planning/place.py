"""Placing a recipe's cuts on a graph: from a recipe and an anatomy to a plan.

Everything that can be refused is refused here, before any pass writes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import sympy
from torch.fx import Graph

from vtprune_fx.analysis.anatomy import Anatomy, Attention
from vtprune_fx.errors import PlanError
from vtprune_fx.graph.sizes import Count
from vtprune_fx.planning.live import Uses, is_length, live_values, sizes_across
from vtprune_fx.planning.plan import PlannedCut, PrunePlan
from vtprune_fx.planning.positions import values_of_place
from vtprune_fx.recipes.schema import Cut, Recipe


def place(
    recipe: Recipe,
    anatomy: Anatomy,
    graph: Graph,
    *,
    per_sample: bool = False,
    schedule: str | None = None,
) -> PrunePlan:
    """Place a recipe's cuts on a graph.

    Args:
        recipe: The recipe.
        anatomy: What was found in the graph.
        graph: The graph.
        per_sample: Let each sample drop its share of visual tokens. As many tokens are
            dropped as if a sample had ``anatomy.visual_tokens``; padding makes up for
            the rest.
        schedule: Name of the graph's input that says how many tokens each cut drops,
            as ``PrunePlan`` has it; None for the recipe's numbers.

    Raises:
        PlanError: The recipe asks for what this version does not do, names a layer that
            the model does not have, or drops more visual tokens than a sample has; or a
            live value cannot be gathered.
    """
    _check_fits(recipe, anatomy, counted=schedule is None)
    _check_shows_tower(recipe, anatomy)
    if per_sample:
        _check_per_sample(recipe, anatomy)
    lengths = frozenset(
        n.name for n in graph.nodes if is_length(n.meta.get("val"), anatomy.tokens)
    )
    return PrunePlan(
        recipe=recipe,
        tokens=anatomy.tokens,
        visual=anatomy.visual,
        visual_tokens=anatomy.visual_tokens,
        embeddings=anatomy.layers[0].stream.entry,
        attentions=anatomy.layers,
        lengths=lengths,
        cuts=tuple(
            _cuts(
                recipe,
                anatomy,
                graph,
                lengths,
                per_sample=per_sample,
                scheduled=schedule is not None,
            )
        ),
        tower=anatomy.tower if recipe.sees_tower else None,
        of=recipe.of if per_sample else None,
        schedule=schedule,
    )


def with_counts(plan: PrunePlan, recipe: Recipe, visual_tokens: int) -> PrunePlan:
    """A plan of which the numbers come with each run, with those of one run.

    Args:
        plan: The plan.
        recipe: Whose numbers, at some of the plan's places.
        visual_tokens: That its shares are taken of.
    """
    drops, gone, cuts = recipe.drops(visual_tokens), 0, []
    shares = {cut.layer: cut.drop for cut in recipe.cuts}
    for cut in plan.cuts:
        layer = cut.attention.layer
        drop = drops.get(layer, 0)
        gone += drop
        share = None if cut.share is None else shares.get(layer, 0)
        cuts.append(dataclasses.replace(cut, drop=drop, dropped=gone, share=share))
    of = None if plan.of is None else recipe.of
    return dataclasses.replace(
        plan, recipe=recipe, visual_tokens=visual_tokens, cuts=tuple(cuts), of=of
    )


def _cuts(
    recipe: Recipe,
    anatomy: Anatomy,
    graph: Graph,
    lengths: frozenset[str],
    *,
    per_sample: bool,
    scheduled: bool,
) -> Iterator[PlannedCut]:
    """The cuts that drop tokens, in order."""
    uses = Uses(graph, anatomy.tokens)
    if scheduled:
        counted = {
            cut.layer: _symbols(cut.layer, recycled=False) for cut in recipe.cuts
        }
    else:
        counted = _counts(recipe, anatomy.visual_tokens, per_sample=per_sample)
    compacted = recipe.positions == "compacted" and counted
    places = values_of_place(recipe, graph, anatomy) if compacted else frozenset()
    dropped: Count = 0
    for row, cut in enumerate(recipe.cuts):
        if cut.layer not in counted:
            continue
        drop, chosen, new, gone = counted[cut.layer]
        dropped = dropped + gone
        attention = anatomy.layers[cut.layer]
        edge, hidden = _edge(recipe, cut, attention)
        uses.check_complete(edge, recipe, cut)
        uses.check_not_numbered(edge, recipe, cut)
        live = live_values(uses, edge, anatomy, lengths)
        yield PlannedCut(
            attention=attention,
            site=cut.site,
            edge=edge,
            hidden=hidden,
            drop=drop,
            share=cut.drop if per_sample else None,
            clustered=chosen,
            new=new,
            gone=gone,
            dropped=dropped,
            live=live,
            places=places & {value.node for value in live},
            sizes=sizes_across(uses, edge, anatomy, lengths),
            rule=cut.by_rank,
            row=row if scheduled else None,
        )


def _counts(
    recipe: Recipe, visual_tokens: int, *, per_sample: bool
) -> dict[int, tuple[Count, Count, Count, Count]]:
    """By layer: tokens dropped, clustered, new, and fewer in all."""
    if recipe.adaptive:
        layers = [cut.layer for cut in recipe.cuts]
        recycled = recipe.recycle is not None
        return {layer: _symbols(layer, recycled=recycled) for layer in layers}
    counts: dict[int, tuple[Count, Count, Count, Count]] = {}
    drops = recipe.drops(visual_tokens)
    if per_sample:
        drops = {cut.layer: drops.get(cut.layer, 0) for cut in recipe.cuts if cut.drop}
    for layer, drop in drops.items():
        chosen, new = recipe.recycle.counts(drop) if recipe.recycle else (0, 0)
        counts[layer] = drop, chosen, new, drop - new
    return counts


def _symbols(layer: int, *, recycled: bool) -> tuple[Count, Count, Count, Count]:
    drop, chosen, new, gone = (
        sympy.Symbol(f"{name}_{layer}", integer=True, nonnegative=True)
        for name in ("drop", "clustered", "new", "gone")
    )
    return (drop, chosen, new, gone) if recycled else (drop, 0, 0, drop)


def check_layers(recipe: Recipe, layers: int) -> None:
    """Refuse a recipe that cuts at layers which a model of so many does not have.

    Raises:
        PlanError: It does.
    """
    deepest = max((cut.layer for cut in recipe.cuts), default=-1)
    if deepest >= layers:
        raise PlanError(
            f"recipe {recipe.name}, cut at layer {deepest}",
            expected=f"a layer below {layers}, which the model has",
            found=f"a recipe made for {recipe.layers} layers",
            fix="Choose a recipe for this model, or fit one.",
        )


def _check_fits(recipe: Recipe, anatomy: Anatomy, *, counted: bool) -> None:
    check_layers(recipe, len(anatomy.layers))
    if recipe.adaptive or not counted:
        return
    needed = recipe.needed(anatomy.visual_tokens)
    if needed > anatomy.visual_tokens:
        raise PlanError(
            f"recipe {recipe.name}",
            expected=f"at most {anatomy.visual_tokens} dropped, which a sample has",
            found=f"{needed} visual tokens dropped",
            fix="A recipe with the field 'of' scales to what a sample has.",
        )


def _check_shows_tower(recipe: Recipe, anatomy: Anatomy) -> None:
    if recipe.sees_tower and recipe.cuts and anatomy.tower is None:
        raise PlanError(
            f"recipe {recipe.name}",
            expected="a graph from pixels on, in which a layer of the vision tower "
            "makes all image features, one token each",
            found=str(anatomy.no_tower),
            fix="Give the model pixel_values, in one graph (fullgraph=True), or use a "
            "recipe that does not look at the vision tower.",
        )


def _check_per_sample(recipe: Recipe, anatomy: Anatomy) -> None:
    """Refuse what cannot be done with numbers that differ from sample to sample."""
    masked = all(layer.mask is not None for layer in anatomy.layers)
    if recipe.of is None or recipe.recycle or not masked:
        found = "recycling" if recipe.recycle else "plain counts"
        raise PlanError(
            f"recipe {recipe.name}, samples with different numbers of visual tokens",
            expected="shares ('of'), no recycling, and an attention_mask",
            found=found if recipe.recycle or recipe.of is None else "no attention_mask",
            fix="Run samples with equal numbers of visual tokens together.",
        )


def _edge(recipe: Recipe, cut: Cut, attention: Attention) -> tuple[str, str | None]:
    """The node after which tokens are dropped, and the residual stream there."""
    stream = attention.stream
    if cut.site == "after_attention":
        return attention.node, stream.entry
    end, hidden = (
        (stream.output, stream.output)
        if cut.site == "after_layer"
        else (stream.start, stream.entry)
    )
    after = cut.site == "after_layer"
    failed = stream.no_output if after else stream.no_start or stream.no_entry
    if end is None or (recipe.recycle and hidden is None):
        raise PlanError(
            f"recipe {recipe.name}, cut at layer {cut.layer}",
            expected=f"one value that is the residual stream, to cut it {cut.site}",
            found=str(failed),
            fix="Use a recipe that cuts after_attention, or report the model.",
        )
    return end, hidden
