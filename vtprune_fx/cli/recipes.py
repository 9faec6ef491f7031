"""``vtprune recipes``: what ships with vtprune."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from vtprune_fx.cli.options import JsonOption, TextTokens
from vtprune_fx.recipes.counting import LLAVA_1_5_7B, cost
from vtprune_fx.recipes.loading import load_recipe, recipe_names
from vtprune_fx.recipes.methods import METHODS
from vtprune_fx.recipes.schedule import aligned_to_tiles

if TYPE_CHECKING:
    from vtprune_fx.recipes.schema import Recipe

BAR_WIDTH = 40
"""Characters of a bar that stands for all visual tokens."""


def list_recipes(context: typer.Context) -> None:
    """List the recipes that ship with vtprune, or show one of them."""
    if context.invoked_subcommand is not None:
        return
    table = Table(
        box=SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
        caption="MACs saved: over the visual tokens alone, in layers of a 7B decoder.",
    )
    for title in ("name", "model"):
        table.add_column(title, no_wrap=True)
    for title in ("layers", "visual\ntokens", "dropped", "MACs\nsaved"):
        table.add_column(title, justify="right", no_wrap=True)
    for name in recipe_names():
        table.add_row(*_summary(load_recipe(name)))
    console = Console()
    console.print(table)
    for method, about in METHODS.items():
        console.print(f"\n[bold]{about.title}[/bold] ({method}, {about.source})")
        console.print(about.explanation)


def _summary(recipe: Recipe) -> list[str]:
    sizes = (str(recipe.layers), str(recipe.visual_tokens))
    if recipe.adaptive:
        return [recipe.name, recipe.provenance.model, *sizes, "by rank", ""]
    decoder = dataclasses.replace(LLAVA_1_5_7B, layers=recipe.layers)
    saved = cost(recipe, decoder, recipe.visual_tokens, text_tokens=0).visual.saved
    left = recipe.tokens_per_layer(recipe.visual_tokens, recipe.layers)[-1]
    dropped = recipe.visual_tokens - left
    figures = (str(dropped), f"{saved:.1%}")
    return [recipe.name, recipe.provenance.model, *sizes, *figures]


def show_recipe(
    name: Annotated[str, typer.Argument(help="Shipped name, or a recipe file.")],
    tile: Annotated[
        int | None,
        typer.Option(min=1, help="Fill tiles of this many tokens after each cut."),
    ] = None,
    text_tokens: TextTokens = 75,
    as_json: JsonOption = False,
) -> None:
    """Show one recipe: the visual tokens left after each layer.

    Example: [bold]vtprune recipes show fitprune-llava-1.5-7b-60 --json[/bold]

    For prompts of one length, 704 tokens, and kernels that work in tiles of 64:
    [bold]vtprune recipes show fitprune-llava-1.5-7b-60 --tile 64 --text-tokens 128
    --json[/bold]
    """
    recipe = load_recipe(name)
    if tile is not None:
        recipe = aligned_to_tiles(recipe, tile, text_tokens)
    if as_json:
        typer.echo(recipe.to_json(), nl=False)
        return
    draw(recipe)


def draw(recipe: Recipe) -> None:
    """What a recipe is, and a bar for the tokens left after each layer."""
    typer.echo(f"{recipe.name}: {recipe.method}, {recipe.positions} positions")
    typer.echo(f"{recipe.provenance.source}. {recipe.provenance.note}".rstrip())
    typer.echo(METHODS[recipe.method].explanation)
    if recipe.adaptive:
        typer.echo("layer  of v visual tokens, with r the rank of their attention")
        for cut in recipe.cuts:
            typer.echo(f"{cut.layer:5}  {cut.by_rank}")
        return
    left = recipe.tokens_per_layer(recipe.visual_tokens, recipe.layers)
    drops = recipe.drops(recipe.visual_tokens)
    typer.echo("layer  drop  left")
    for layer, tokens in enumerate(left):
        bar = "#" * round(BAR_WIDTH * tokens / recipe.visual_tokens)
        typer.echo(f"{layer:5}  {drops.get(layer, 0):4}  {tokens:4}  {bar}".rstrip())
