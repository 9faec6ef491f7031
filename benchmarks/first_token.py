"""Time to the first token, dense and pruned, on a narrow LLaVA-1.5 with random weights.

    python benchmarks/first_token.py FOLDER

LLaVA-1.5's geometry (336-pixel images, 576 visual tokens, 32 decoder layers) at hidden
256, a photograph, the recipe ``fitprune-llava-1.5-7b-60``: the demo's steps and report
on a model that is large enough for time to be saved. About twelve minutes on two CPU
cores, nearly all of it in the compilers.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from vtprune_fx.cli.demo import run_demo
from vtprune_fx.evaluation.picture import sample_photo
from vtprune_fx.recipes.loading import load_recipe
from vtprune_fx.reference.random_llava import build_checkpoint
from vtprune_fx.reference.task import Task

RECIPE = "fitprune-llava-1.5-7b-60"


def main() -> None:
    """Build the model in the folder, unless it is there, and run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="where files go")
    parser.add_argument("--recipe", default=RECIPE, help="shipped name or file")
    arguments = parser.parse_args()
    checkpoint = build_checkpoint(arguments.folder / "checkpoint")
    task = Task("What is on the table?", sample_photo())
    run_demo(arguments.folder, checkpoint, load_recipe(arguments.recipe), task)


if __name__ == "__main__":
    main()
