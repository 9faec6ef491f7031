"""``vtprune generate``, ``eval`` and ``demo``: pruned models at work."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console

from vtprune_fx.cli.options import LARGEST_SEED, REFERENCE, OptionalRecipe, RecipeOption
from vtprune_fx.recipes.loading import load_recipe
from vtprune_fx.reference import CHECKPOINT

if TYPE_CHECKING:
    from vtprune_fx.recipes.schema import Recipe


def generate(
    model: Annotated[
        str, typer.Argument(help="An exported folder, a checkpoint folder or a hub id.")
    ],
    prompt: Annotated[str, typer.Option(help="The question.")],
    image: Annotated[Path | None, typer.Option(help="Image file to ask about.")] = None,
    recipe: OptionalRecipe = None,
    max_new_tokens: Annotated[
        int, typer.Option(min=1, help="Most tokens to generate.")
    ] = 32,
    inner: Annotated[
        str, typer.Option(help="torch.compile backend for a checkpoint.")
    ] = "inductor",
) -> None:
    """Answer a question about an image, pruned.

    An exported folder runs on the runtime that it was exported for, a checkpoint
    through torch.compile.

    Example: [bold]vtprune generate llava-60 --image cat.jpg
    --prompt "What is it?"[/bold]
    """
    from vtprune_fx.cli.answer import answer

    typer.echo(answer(model, prompt, image, recipe, max_new_tokens, inner))


SplitOption = Annotated[
    Literal["train", "validation", "test"], typer.Option(help="Which questions.")
]


BackendOption = Annotated[
    Literal["torch", "compile", "onnx"],
    typer.Option(help="Eager oracle, torch.compile, or ONNX Runtime."),
]


def evaluate(
    model: Annotated[
        Path, typer.Argument(help="A checkpoint folder. Default: the reference model.")
    ] = CHECKPOINT,
    recipe: Annotated[
        list[str] | None,
        typer.Option(help="Shipped name or file; may be repeated."),
    ] = None,
    baselines: Annotated[
        bool,
        typer.Option(
            help="Compare with dropping random, evenly spaced, and best tokens."
        ),
    ] = False,
    split: SplitOption = "test",
    seed: Annotated[
        int, typer.Option(min=0, max=LARGEST_SEED, help="Seed of the questions.")
    ] = 0,
    limit: Annotated[int, typer.Option(min=1, help="How many questions.")] = 500,
    backend: BackendOption = "torch",
    output: Annotated[
        Path | None, typer.Option(help="JSON file to write all results and answers to.")
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(help="PNG file for accuracy against MACs; a CSV file beside it."),
    ] = None,
) -> None:
    """Ask questions about drawn pictures; print accuracy against cost.

    Example: [bold]vtprune eval --recipe fitprune-reference-55 --baselines[/bold]
    """
    from vtprune_fx.evaluation import evaluate as evaluation
    from vtprune_fx.evaluation.curve import draw_curve
    from vtprune_fx.files import MARK, replace_file
    from vtprune_fx.models.loading import open_checkpoint
    from vtprune_fx.reference.questions import draw_samples

    _check_outputs(output, plot, recipe or [])
    recipes = _recipes(recipe or [REFERENCE], baselines=baselines)
    samples = list(draw_samples(split, seed, limit))
    result = evaluation.evaluate(*open_checkpoint(model), recipes, samples, backend)
    Console().print(*result.tables())
    if output is not None:
        asked = {"model": str(model), "split": split, "seed": seed}
        asked |= {"backend": backend, "written_by": MARK.decode()}
        text = json.dumps(asked | result.fields(), indent=1)
        replace_file(output, f"{text}\n".encode())
    if plot is not None:
        draw_curve(result, plot)


def _check_outputs(output: Path | None, plot: Path | None, recipes: list[str]) -> None:
    """Check that files can be written, before questions are asked."""
    from vtprune_fx.evaluation.curve import check_curve
    from vtprune_fx.files import MARK, check_output

    if plot is not None:
        check_curve(plot)
    if output is not None:
        check_output(output, "file", inputs=map(Path, recipes), mark=MARK)


def _recipes(names: list[str], *, baselines: bool) -> list[Recipe]:
    """Recipes in the order given, each followed by its baselines if wanted."""
    loaded = [load_recipe(name) for name in names]
    if not baselines:
        return loaded
    return [each for one in loaded for each in (one, *one.baselines())]


def demo(
    output: Annotated[Path, typer.Option(help="Folder to write to.")] = Path(
        "vtprune-demo"
    ),
    recipe: RecipeOption = REFERENCE,
    seed: Annotated[
        int, typer.Option(min=0, max=LARGEST_SEED, help="Which picture and question.")
    ] = 0,
) -> None:
    """Ask the reference model a question, before and after pruning, on every runtime.

    Takes a few minutes on two CPU cores, nearly all of it in the compilers.

    Example: [bold]vtprune demo --seed 7 --output vtprune-demo[/bold]
    """
    from vtprune_fx.cli.demo import run_demo
    from vtprune_fx.reference.task import reference_task

    loaded = load_recipe(recipe)
    run_demo(output, CHECKPOINT, loaded, reference_task(seed))
