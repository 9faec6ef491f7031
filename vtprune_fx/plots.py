"""Figures, which only some commands draw."""

from __future__ import annotations

import io
from typing import Any

from vtprune_fx.optional import optional
from vtprune_fx.recipes.schema import Recipe


def require_plots() -> Any:
    """The module that figures come from.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    return optional("matplotlib.figure", "matplotlib", "a plot")


def draw_recipe(recipe: Recipe) -> bytes:
    """A PNG picture of the visual tokens in and after each layer of a model.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    left = recipe.tokens_per_layer(recipe.visual_tokens, recipe.layers)
    figure = require_plots().Figure(figsize=(8, 4), layout="constrained")
    axes = figure.add_subplot()
    axes.bar(range(recipe.layers), [recipe.visual_tokens, *left[:-1]], color="#d0d7e2")
    axes.bar(range(recipe.layers), left, color="#3b6ea5")
    axes.set_xlabel("decoder layer")
    axes.set_ylabel("visual tokens")
    axes.set_title(recipe.name)
    axes.legend(["enter the layer", "kept by its cut"])
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=120)
    return png.getvalue()
