"""Fit a FitPrune recipe to a model, from its attention on a few prompts.

    python examples/fit_recipe.py my-recipes

The model is the reference model, the prompts are drawn questions that it was trained
on. For your model and images: `vtprune fit`. Needs `vtprune-fx[demo]`.
"""

from __future__ import annotations

import sys
from pathlib import Path

from vtprune_fx.fitting.calibration import open_calibration
from vtprune_fx.fitting.job import fit_recipes
from vtprune_fx.fitting.options import Options
from vtprune_fx.models import open_checkpoint
from vtprune_fx.reference import CHECKPOINT


def main(folder: str) -> str:
    """Fit one recipe to a folder; returns what it saves."""
    prompts = open_calibration("reference", limit=8)
    options = Options(budgets=(0.5,))
    [fitted] = fit_recipes(*open_checkpoint(CHECKPOINT), prompts, Path(folder), options)
    cuts = ", ".join(f"{cut.drop} in layer {cut.layer}" for cut in fitted.recipe.cuts)
    return f"{fitted.recipe.name} saves {fitted.saved:.1%} of the MACs: {cuts} dropped"


if __name__ == "__main__":
    print(main(*sys.argv[1:]))
