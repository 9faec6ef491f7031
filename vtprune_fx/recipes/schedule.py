"""Arithmetic on a recipe's cuts: what is gone by a layer, what a batch may drop."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Sequence

from vtprune_fx.errors import RecipeError
from vtprune_fx.recipes.schema import Recipe


def dropped_before(recipe: Recipe, visual_tokens: int, layers: int) -> list[int]:
    """Visual tokens dropped before each layer's attention.

    Args:
        recipe: The recipe.
        visual_tokens: That a sample came with.
        layers: Decoder layers of the model.

    Returns:
        ``layers`` numbers.
    """
    drops = recipe.drops(visual_tokens)
    left = [0] * (layers + 1)
    for cut in recipe.cuts:
        first = cut.layer + (cut.site != "before_layer")
        left[first] += drops.get(cut.layer, 0)
    return list(itertools.accumulate(left))[:layers]


def common_count(
    recipe: Recipe, visual_tokens: Sequence[int], padding: Sequence[int]
) -> int:
    """Largest visual-token count whose drops every row can afford, padding included.

    Never less than the smallest sample with images has.

    Args:
        recipe: Whose drops.
        visual_tokens: Of each sample.
        padding: Of each sample.
    """
    per_sample = [recipe.drops(count) for count in visual_tokens]
    least = min(filter(None, visual_tokens))

    def too_many(count: int) -> bool:
        common = recipe.drops(count)
        for drops, room in zip(per_sample, padding, strict=True):
            more = (drops.get(c.layer, 0) - common.get(c.layer, 0) for c in recipe.cuts)
            if min(itertools.accumulate(more, initial=room)) < 0:
                return True
        return False

    counts = range(least, max(visual_tokens) + 1)
    return max(least, least + bisect.bisect_left(counts, True, key=too_many) - 1)


def aligned_to_tiles(recipe: Recipe, tile: int, text_tokens: int) -> Recipe:
    """A recipe for prompts of one length, which fills complete tiles after each cut.

    Kernels work in tiles, and a part of one takes as long as all of it: tokens that
    share a tile with kept ones are kept. Cuts that have nothing to drop are left out.

    Args:
        recipe: The recipe.
        tile: Tokens of a tile.
        text_tokens: Of a prompt, padding included, beside ``visual_tokens``.

    Raises:
        RecipeError: New tokens are made, which would come on top; or counts follow
            the rank of each sample's attention.
    """
    if recipe.recycle is not None:
        raise RecipeError(
            f"recipe {recipe.name}",
            expected="cuts that only drop, to fill complete tiles",
            found="cuts that make new tokens",
            fix="Omit the tile.",
        )
    prompt = recipe.visual_tokens + text_tokens
    drops = recipe.drops(recipe.visual_tokens)
    cuts, stays = [], prompt
    for cut, gone in zip(
        (cut for cut in recipe.cuts if cut.layer in drops),
        itertools.accumulate(drops.values()),
        strict=True,
    ):
        filled = -(-(prompt - gone) // tile) * tile
        if filled < stays:
            cuts.append(cut.model_copy(update={"drop": stays - filled}))
            stays = filled
    changes = {"name": f"{recipe.name}-tile-{tile}", "of": None, "cuts": tuple(cuts)}
    return recipe.model_copy(update=changes)
