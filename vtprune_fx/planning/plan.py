"""A recipe placed on a graph: what the passes carry out. Pure data."""

from __future__ import annotations

from dataclasses import dataclass

import sympy

from vtprune_fx.analysis.anatomy import Attention
from vtprune_fx.analysis.vision_tower import Tower
from vtprune_fx.graph.sizes import Count
from vtprune_fx.recipes.rank_rule import ByRank
from vtprune_fx.recipes.schema import Recipe, Site


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
        edge: Name of the node after which tokens are dropped.
        hidden: Name of the residual stream there, [B, S, E], where the graph shows it.
        drop: Tokens dropped per sample (visual; equal across the batch). A symbol where
            the number follows the rank, or comes with each run.
        share: Where numbers are per sample, how many of ``PrunePlan.of`` visual tokens
            they are; ``drop`` then counts padding too.
        clustered: How many of them are clustered into new tokens.
        new: New tokens that these become.
        gone: Tokens fewer than before the cut.
        dropped: Tokens fewer after the cut than in the prompt.
        live: What has to be gathered, beside the tokens' roles that passes add.
        places: Those of them that depend on a token's place alone (rotary tables,
            position ids) where positions are compacted.
        sizes: Sizes that depend on the prompt's length and are read after the cut: they
            are computed once more.
        rule: What the numbers follow from, where they follow the rank.
        row: Of ``PrunePlan.schedule``, where numbers come with each run.
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
    sizes: tuple[str, ...] = ()
    rule: ByRank | None = None
    row: int | None = None


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
        of: Where numbers are per sample, what they are shares of.
        schedule: Name of the input that holds the numbers of a run, [cuts, 3] int64 on
            the CPU: for each cut the tokens dropped, and ``share`` and ``of``. None
            where numbers are fixed when the graph is made, or follow the rank.
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
    schedule: str | None = None

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

        Any number will do where counts follow the rank, or come with each run.
        """
        if self.recipe.adaptive or self.schedule is not None:
            return 0
        return self.recipe.needed(self.visual_tokens)
