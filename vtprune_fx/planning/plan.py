"""From a recipe and an anatomy to a plan: cuts placed on nodes. Pure data.

Everything that can be refused is refused here, before any pass writes.
"""

from __future__ import annotations

from dataclasses import dataclass

import sympy
import torch
from torch import Tensor
from torch.fx import Graph, Node

from vtprune_fx.analysis.anatomy import Anatomy, Attention
from vtprune_fx.analysis.residual import module_path, seen_through
from vtprune_fx.analysis.vision_tower import Tower
from vtprune_fx.errors import PlanError
from vtprune_fx.graph.insert import Count, axes_of, mentions, size_expr, tensor_of
from vtprune_fx.recipes.rank_rule import ByRank
from vtprune_fx.recipes.schema import Cut, Recipe, Site

aten = torch.ops.aten


@dataclass(frozen=True)
class LiveValue:
    """A value that is made before a cut, used after it, and carries the token axis.

    Attributes:
        node: Its name.
        axes: Its token axes: one, or two for an attention mask.
    """

    node: str
    axes: tuple[int, ...]


@dataclass(frozen=True)
class PlannedCut:
    """One cut, placed.

    Attributes:
        attention: The layer's attention.
        site: Where in the layer.
        edge: Name of the node behind which tokens leave.
        hidden: Name of the residual stream there, [B, S, E], where the graph shows it.
        drop: Tokens that leave: visual ones, of which each sample has as many. A symbol
            where the number follows the rank.
        share: Where samples lose numbers of their own, how many of ``PrunePlan.of``
            visual tokens those are; ``drop`` then counts padding too.
        clustered: How many of them are clustered into new tokens.
        new: New tokens that these become.
        gone: Tokens fewer than ahead of the cut.
        dropped: Tokens fewer when the cut is done than the prompt came with.
        live: What has to be gathered, beside the tokens' roles that passes add.
        places: Those of them that depend on a token's place alone (rotary tables,
            position ids) where positions are compacted.
        rule: What the numbers follow from, where they are symbols.
    """

    attention: Attention
    site: Site
    edge: str
    hidden: str | None
    drop: Count
    share: int | None
    clustered: Count
    new: Count
    gone: Count
    dropped: Count
    live: tuple[LiveValue, ...]
    places: frozenset[str]
    rule: ByRank | None = None


@dataclass(frozen=True)
class PrunePlan:
    """A recipe, placed on one graph.

    Attributes:
        recipe: The recipe.
        tokens: The symbol of the prompt's length.
        visual: Names of the masks of visual tokens, [B, S] or [B, S, 1].
        visual_tokens: Visual tokens a sample comes with.
        embeddings: Name of what enters the decoder, [B, S, E], where the graph shows
            it.
        attentions: The attentions of all decoder layers, in order.
        lengths: Names of the symbolic ints that are the prompt's length.
        cuts: The cuts, in order.
        tower: The vision tower's attention, where the recipe reads it.
        of: Where samples lose numbers of their own, what those are shares of.
    """

    recipe: Recipe
    tokens: sympy.Symbol
    visual: tuple[str, ...]
    visual_tokens: int
    embeddings: str | None
    attentions: tuple[Attention, ...]
    lengths: frozenset[str]
    cuts: tuple[PlannedCut, ...]
    tower: Tower | None = None
    of: int | None = None

    @property
    def layers(self) -> int:
        """Decoder layers of the graph."""
        return len(self.attentions)

    @property
    def dropped(self) -> Count:
        """Tokens that a sample has fewer in the end."""
        return self.cuts[-1].dropped if self.cuts else 0

    @property
    def needed(self) -> int:
        """Visual tokens that a sample must have for every cut to find what it drops.

        Any number will do where counts follow the rank.
        """
        return 0 if self.recipe.adaptive else self.recipe.needed(self.visual_tokens)


def place(
    recipe: Recipe, anatomy: Anatomy, graph: Graph, *, own: bool = False
) -> PrunePlan:
    """Place a recipe's cuts on a graph.

    Args:
        recipe: The recipe.
        anatomy: What was found in the graph.
        graph: The graph.
        own: Let each sample lose its own share of visual tokens. As many tokens leave
            as if a sample had ``anatomy.visual_tokens``; padding makes up for the rest.

    Raises:
        PlanError: The recipe asks for what this version does not do, names a layer that
            the model does not have, or drops more visual tokens than a sample has; or a
            live value cannot be gathered.
    """
    _check_fits(recipe, anatomy)
    _check_shows_tower(recipe, anatomy)
    if own:
        _check_own(recipe, anatomy)
    uses = _Uses(graph)
    lengths = frozenset(
        n.name for n in graph.nodes if _is_length(n.meta.get("val"), anatomy.tokens)
    )
    cuts: list[PlannedCut] = []
    counted = _counts(recipe, anatomy.visual_tokens, own=own)
    compacted = recipe.positions == "compacted" and counted
    places = _of_place(recipe, graph, anatomy) if compacted else frozenset()
    dropped: Count = 0
    for cut in recipe.cuts:
        if cut.layer not in counted:
            continue
        drop, chosen, new, gone = counted[cut.layer]
        dropped = dropped + gone
        attention = anatomy.layers[cut.layer]
        edge, hidden = _edge(recipe, cut, attention)
        uses.check_complete(edge, recipe, cut)
        live = _live(uses, edge, anatomy, lengths)
        planned = PlannedCut(
            attention=attention,
            site=cut.site,
            edge=edge,
            hidden=hidden,
            drop=drop,
            share=cut.drop if own else None,
            clustered=chosen,
            new=new,
            gone=gone,
            dropped=dropped,
            live=live,
            places=places & {value.node for value in live},
            rule=cut.by_rank,
        )
        cuts.append(planned)
    return PrunePlan(
        recipe=recipe,
        tokens=anatomy.tokens,
        visual=anatomy.visual,
        visual_tokens=anatomy.visual_tokens,
        embeddings=anatomy.layers[0].stream.entry,
        attentions=anatomy.layers,
        lengths=lengths,
        cuts=tuple(cuts),
        tower=anatomy.tower if recipe.sees_tower else None,
        of=recipe.of if own else None,
    )


def _counts(
    recipe: Recipe, visual_tokens: int, *, own: bool
) -> dict[int, tuple[Count, Count, Count, Count]]:
    """By layer: how many leave, are clustered and new, and are fewer in all."""
    if recipe.adaptive:
        layers = [cut.layer for cut in recipe.cuts]
        return {layer: _symbols(layer, recipe.recycle is not None) for layer in layers}
    counts: dict[int, tuple[Count, Count, Count, Count]] = {}
    drops = recipe.drops(visual_tokens)
    if own:
        drops = {cut.layer: drops.get(cut.layer, 0) for cut in recipe.cuts if cut.drop}
    for layer, drop in drops.items():
        chosen, new = recipe.recycle.counts(drop) if recipe.recycle else (0, 0)
        counts[layer] = drop, chosen, new, drop - new
    return counts


def _symbols(layer: int, recycled: bool) -> tuple[Count, Count, Count, Count]:
    drop, chosen, new, gone = (
        sympy.Symbol(f"{name}_{layer}", integer=True, nonnegative=True)
        for name in ("drop", "clustered", "new", "gone")
    )
    return (drop, chosen, new, gone) if recycled else (drop, 0, 0, drop)


def _of_place(recipe: Recipe, graph: Graph, anatomy: Anatomy) -> frozenset[str]:
    """Values that depend on a token's place alone: rotary tables and what makes them.

    Raises:
        PlanError: A layer does not show what it rotates by.
    """
    named = {node.name: node for node in graph.nodes}
    found: set[Node] = set()
    for layer in anatomy.layers:
        if layer.stream.cos is None or layer.stream.sin is None:
            raise PlanError(
                f"recipe {recipe.name}, field positions",
                expected="queries rotated by q * cos + rotate_half(q) * sin",
                found=f"another form in layer {layer.layer}, or no rotary embedding",
                fix="Use a recipe with 'positions': 'kept'.",
            )
        found |= {named[layer.stream.cos], named[layer.stream.sin]}
    tables = frozenset(found)
    _check_one_axis(recipe, tables, anatomy)
    for node in reversed(graph.nodes):
        # What nothing but the tables is made of.
        if node.users and all(user in found for user in node.users):
            found.add(node)
    views = (n for n in graph.nodes if any(v in tables for v in seen_through(n)))
    return frozenset(node.name for node in (*found, *views))


def _check_one_axis(recipe: Recipe, tables: frozenset[Node], anatomy: Anatomy) -> None:
    """Refuse to renumber tokens whose positions count along several axes."""
    ahead = {node for table in tables for node in seen_through(table)}
    for _ in range(_STEPS_TO_POSITIONS):
        ahead |= {source for node in ahead for source in node.all_input_nodes}
    if any(_has_axes(node, anatomy) for node in ahead):
        raise PlanError(
            f"recipe {recipe.name}, field positions",
            expected="positions along one axis, to compact them",
            found="rotary positions along several: time, height and width",
            fix="Use a recipe with 'positions': 'kept', such as SparseVLM+'s.",
        )


_STEPS_TO_POSITIONS = 12
"""Operators between rotary tables and positions: cast, scale, cosine, recomposition."""


def _has_axes(node: Node, anatomy: Anatomy) -> bool:
    """[axes, B, S, ...]."""
    value = tensor_of(node)
    if value is None or value.dim() < 3:
        return False
    _, batch, tokens, *_ = map(size_expr, value.shape)
    return bool(batch == anatomy.batch and tokens == anatomy.tokens)


def _check_fits(recipe: Recipe, anatomy: Anatomy) -> None:
    layers = len(anatomy.layers)
    deepest = max((cut.layer for cut in recipe.cuts), default=-1)
    if deepest >= layers:
        raise PlanError(
            f"recipe {recipe.name}, cut at layer {deepest}",
            expected=f"a layer below {layers}, which the model has",
            found=f"a recipe made for {recipe.layers} layers",
            fix="Choose a recipe for this model, or fit one.",
        )
    needed = 0 if recipe.adaptive else recipe.needed(anatomy.visual_tokens)
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
            found="none",
            fix="Give the model pixel_values, in one graph (fullgraph=True), or use a "
            "recipe that does not look at the vision tower.",
        )


def _check_own(recipe: Recipe, anatomy: Anatomy) -> None:
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
    """The node behind which tokens leave, and the residual stream there."""
    stream = attention.stream
    if cut.site == "after_attention":
        return attention.node, stream.entry
    end, hidden = (
        (stream.output, stream.output)
        if cut.site == "after_layer"
        else (stream.start, stream.entry)
    )
    if end is None or (recipe.recycle and hidden is None):
        raise PlanError(
            f"recipe {recipe.name}, cut at layer {cut.layer}",
            expected=f"one value that is the residual stream, to cut it {cut.site}",
            found="none or several in the graph",
            fix="Use a recipe that cuts after_attention, or report the model.",
        )
    return end, hidden


class _Uses:
    """Where each node stands, and where it is last read by anything but the output."""

    def __init__(self, graph: Graph) -> None:
        self.nodes: list[Node] = list(graph.nodes)
        self.order = {node: i for i, node in enumerate(self.nodes)}
        self.named = {node.name: node for node in self.nodes}
        self.last = {
            node: max(
                (self.order[u] for u in node.users if u.op != "output"), default=-1
            )
            for node in self.nodes
        }

    def check_complete(self, name: str, recipe: Recipe, cut: Cut) -> None:
        """Refuse a cut ahead of features that are placed by a mask once more.

        They are as many as visual tokens came, and would no longer fit.
        """
        edge = self.order[self.named[name]]
        later = [n for n in self.nodes[edge + 1 :] if _takes_features(n)]
        if later:
            raise PlanError(
                f"recipe {recipe.name}, cut at layer {cut.layer}",
                expected="a cut behind all layers that visual features enter",
                found=f"features that enter {module_path(later[-1])} behind it, node "
                f"{later[-1].name}",
                fix="Cut in later layers, behind the model's deep-stacked features.",
            )

    def across(self, name: str) -> list[Node]:
        """Nodes that stand at or before ``name`` and are read after it."""
        edge = self.order[self.named[name]]
        return [n for n in self.nodes[: edge + 1] if self.last[n] > edge]


def _takes_features(node: Node) -> bool:
    """Whether rows are put where a mask says."""
    if node.target == aten.masked_scatter.default:
        return True
    if node.target not in {aten.index_put.default, aten.index_put_.default}:
        return False
    indices = node.args[1]
    assert isinstance(indices, (list, tuple))
    masks = (tensor_of(n) for n in indices if isinstance(n, Node))
    return any(m is not None and m.dtype == torch.bool for m in masks)


def _live(
    uses: _Uses, edge: str, anatomy: Anatomy, lengths: frozenset[str]
) -> tuple[LiveValue, ...]:
    found: list[LiveValue] = []
    for node in uses.across(edge):
        value = node.meta.get("val")
        if node.name in lengths or not mentions(value, anatomy.tokens):
            continue
        found.append(LiveValue(node.name, _token_axes(node, edge, anatomy)))
    return tuple(found)


def _token_axes(node: Node, edge: str, anatomy: Anatomy) -> tuple[int, ...]:
    value = node.meta["val"]
    axes = axes_of(value, anatomy.tokens) if isinstance(value, Tensor) else ()
    others = [
        s
        for s in getattr(value, "shape", ())
        if mentions(s, anatomy.tokens) and size_expr(s) != anatomy.tokens
    ]
    per_sample = axes and axes[0] > 0 and _is_batch(value.shape[0], anatomy.batch)
    if not per_sample or others:
        raise PlanError(
            f"node {node.name}, live across the cut at {edge}",
            expected="a tensor [batch or 1, ..., prompt, ...]",
            found=str(getattr(value, "shape", value)).replace("torch.Size", ""),
            fix="This graph cannot be cut here; move the cut, or report the model.",
        )
    return axes


def _is_batch(size: int, batch: sympy.Expr) -> bool:
    return size_expr(size) in (batch, sympy.Integer(1))


def _is_length(value: object, tokens: sympy.Symbol) -> bool:
    return isinstance(value, torch.SymInt) and size_expr(value) == tokens
