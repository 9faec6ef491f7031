"""Recipes: which visual tokens are dropped, where, and how many. Pure data.

Importing this module does not import torch.
"""

from vtprune_fx.recipes.counting import LLAVA_1_5_7B, Cost, Geometry, cost
from vtprune_fx.recipes.default import default_recipe
from vtprune_fx.recipes.loading import load_recipe, recipe_names
from vtprune_fx.recipes.schema import Cut, Provenance, Recipe, Recycle

__all__ = [
    "LLAVA_1_5_7B",
    "Cost",
    "Cut",
    "Geometry",
    "Provenance",
    "Recipe",
    "Recycle",
    "cost",
    "default_recipe",
    "load_recipe",
    "recipe_names",
]
