"""The recipe for a model without one."""

from __future__ import annotations

import itertools

from vtprune_fx.recipes.loading import load_recipe
from vtprune_fx.recipes.schema import Cut, Recipe

DEFAULT = "fitprune-llava-1.5-7b-60"
"""The shipped recipe that ``default_recipe`` starts from."""


def default_recipe(layers: int, visual_tokens: int) -> Recipe:
    """The recipe for a model without one.

    ``DEFAULT``, with its schedule stretched over the model's depth (the same share is
    dropped by the same relative depth) and its counts taken as shares. It saves about
    60 % of the visual tokens' arithmetic. On LLaVA-1.5-7B it is the published recipe;
    on another model it is a guess, and a recipe fitted to that model is better.

    Args:
        layers: Decoder layers of the model.
        visual_tokens: Visual tokens that a sample comes with.
    """
    published = load_recipe(DEFAULT)
    original = published.visual_tokens
    left = published.tokens_per_layer(original, published.layers)
    gone = [0, *(original - tokens for tokens in left)]
    stretched = [
        _at(gone, layer * published.layers / layers) for layer in range(layers + 1)
    ]
    cuts = tuple(
        Cut(layer=layer, drop=after - before)
        for layer, (before, after) in enumerate(itertools.pairwise(stretched))
        if after > before
    )
    changes = {"name": f"{DEFAULT}-stretched", "layers": layers, "cuts": cuts}
    scaled = {"of": original, "visual_tokens": visual_tokens}
    return published.model_copy(update=changes | scaled)


def _at(values: list[int], place: float) -> int:
    """``values`` between its entries, linearly, rounded down."""
    low = min(int(place), len(values) - 2)
    return int(values[low] + (place - low) * (values[low + 1] - values[low]))
