"""``vtprune cost`` and ``vtprune explain``: what a recipe saves and where it cuts."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING, Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from vtprune_fx.cli.options import (
    CONFIG_HELP,
    JsonOption,
    OptionalRecipe,
    RecipeOption,
    TextTokens,
)
from vtprune_fx.recipes.counting import LLAVA_1_5_7B, Geometry, cost
from vtprune_fx.recipes.loading import load_recipe

if TYPE_CHECKING:
    from vtprune_fx.recipes.counting import Cost, Work
    from vtprune_fx.recipes.schema import Recipe

TERA, MIB = 1e12, 2**20


def show_cost(
    recipe: RecipeOption,
    config: Annotated[
        str | None, typer.Option(help=f"{CONFIG_HELP} Default: LLaVA-1.5-7B.")
    ] = None,
    text_tokens: TextTokens = 75,
    visual_tokens: Annotated[
        int | None, typer.Option(help="Visual tokens. Default: those of the recipe.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Count what a recipe saves: MACs, FLOPs and KV cache of one sample's prefill.

    Example: [bold]vtprune cost --recipe fitprune-llava-1.5-7b-60 --json[/bold]
    """
    loaded = load_recipe(recipe)
    count = loaded.visual_tokens if visual_tokens is None else visual_tokens
    geometry = LLAVA_1_5_7B if config is None else _read_geometry(config)
    result = cost(loaded, geometry, count, text_tokens)
    if as_json:
        typer.echo(json.dumps(_cost_fields(loaded, geometry, result), indent=2))
    else:
        Console().print(_cost_table(loaded, result))
        left = " ".join(map(str, result.after))
        Console().print(f"Visual tokens left after each layer: {left}")


def _read_geometry(source: str) -> Geometry:
    from vtprune_fx.models.weightless import load_config

    return Geometry.from_config(load_config(source))


def _cost_table(recipe: Recipe, result: Cost) -> Table:
    tokens = f"{result.visual_tokens} visual, {result.text_tokens} text tokens"
    table = Table(title=f"{recipe.name}: {tokens}", box=SIMPLE_HEAD)
    table.add_column("one sample's prefill")
    for title in ("dense", "pruned", "saved"):
        table.add_column(title, justify="right")
    for name, work in (("visual tokens", result.visual), ("all tokens", result.total)):
        _add_work(table, name, work)
    return table


def _add_work(table: Table, name: str, work: Work) -> None:
    dense, pruned = work.dense_macs / TERA, work.pruned_macs / TERA
    saved = f"{work.saved:.1%}"
    table.add_row(f"TMACs, {name}", f"{dense:.3f}", f"{pruned:.3f}", saved)
    table.add_row(f"TFLOPs, {name}", f"{2 * dense:.3f}", f"{2 * pruned:.3f}", saved)
    scorer = work.scorer_macs / TERA
    table.add_row(f"TMACs, {name}, of the scorer", "", f"{scorer:.3f}", "")
    dense, pruned = work.dense_cache_bytes / MIB, work.pruned_cache_bytes / MIB
    saved = f"{1 - work.cache_ratio:.1%}"
    table.add_row(f"KV cache MiB, {name}", f"{dense:.1f}", f"{pruned:.1f}", saved)
    table.add_section()


def _cost_fields(recipe: Recipe, geometry: Geometry, result: Cost) -> dict[str, object]:
    works = {"visual": _work_fields(result.visual), "total": _work_fields(result.total)}
    sizes = {"recipe": recipe.name, "geometry": dataclasses.asdict(geometry)}
    return sizes | dataclasses.asdict(result) | works


def _work_fields(work: Work) -> dict[str, float]:
    return dataclasses.asdict(work) | {
        "dense_flops": work.dense_flops,
        "pruned_flops": work.pruned_flops,
        "ratio": work.ratio,
        "saved": work.saved,
        "cache_ratio": work.cache_ratio,
    }


def explain(
    config: Annotated[str, typer.Option(help=CONFIG_HELP)],
    recipe: OptionalRecipe = None,
    visual_tokens: Annotated[
        int | None, typer.Option(help="Visual tokens. Default: those of one image.")
    ] = None,
    text_tokens: TextTokens = 75,
    as_json: JsonOption = False,
) -> None:
    """Show what a recipe cuts in a model of full size, without its weights.

    Takes a minute for a deep model, which is traced on tensors without data.

    Example: [bold]vtprune explain --config llava-1.5-7b
    --recipe fitprune-llava-1.5-7b-60[/bold]
    """
    from vtprune_fx.cli.full_size import explain_config

    loaded = load_recipe(recipe) if recipe else None
    with Console(stderr=True).status(f"Tracing {config}"):
        found = explain_config(config, loaded, visual_tokens, text_tokens)
    if as_json:
        of_cost = _cost_fields(found.plan.recipe, found.geometry, found.cost)
        typer.echo(json.dumps(found.fields() | of_cost, indent=2))
        return
    cuts, *others = found.tables()
    Console().print(cuts, _cost_table(found.plan.recipe, found.cost), *others)
