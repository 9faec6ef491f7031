"""The ``vtprune`` command: what it is made of, and its errors.

Commands import what is slow to import (torch, transformers) when they run, so that
``vtprune --help`` and ``vtprune recipes`` answer at once.
"""

from __future__ import annotations

import sys
from typing import Annotated, NoReturn

import typer

import vtprune_fx
from vtprune_fx.cli import cost, export, fit, recipes, run
from vtprune_fx.errors import VtpruneError
from vtprune_fx.optional import lacking

app = typer.Typer(
    name="vtprune",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    help="Prune visual tokens from vision-language models.",
    epilog="Example: [bold]vtprune cost --recipe fitprune-llava-1.5-7b-60[/bold]",
)
recipes_app = typer.Typer(
    invoke_without_command=True,
    epilog="Example: [bold]vtprune recipes show fitprune-llava-1.5-7b-60[/bold]",
)
export_app = typer.Typer(
    no_args_is_help=True,
    help="Export a pruned model for another runtime.",
    epilog="Example: [bold]vtprune export onnx MODEL --output DIR[/bold]",
)
app.add_typer(recipes_app, name="recipes")
app.add_typer(export_app, name="export")

recipes_app.callback()(recipes.list_recipes)
recipes_app.command("show")(recipes.show_recipe)
app.command("cost")(cost.show_cost)
app.command("explain")(cost.explain)
export_app.command("onnx")(export.export_to_onnx)
export_app.command("tensorrt")(export.export_to_tensorrt)
export_app.command("triton")(export.export_to_triton)
app.command("verify")(export.verify_export)
app.command("generate")(run.generate)
app.command("eval")(run.evaluate)
app.command("fit")(fit.fit)
app.command("calibrate")(fit.calibrate)
app.command("demo")(run.demo)


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(f"vtprune {vtprune_fx.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            callback=_show_version,
            is_eager=True,
            help="Print the version and exit.",
        ),
    ] = False,
) -> None:
    """Take the options that stand before a command; typer runs what they ask for."""


def main() -> None:
    """Run the command line; an error of ours is one message and exit status 1."""
    try:
        app(prog_name="vtprune")
    except VtpruneError as error:
        _fail(error)
    except ImportError as error:
        missing = lacking(error, "importing transformers", "the installed torch")
        if missing is None:
            raise
        _fail(missing)


def _fail(error: VtpruneError) -> NoReturn:
    typer.echo(f"vtprune: {error}", err=True)
    sys.exit(1)
