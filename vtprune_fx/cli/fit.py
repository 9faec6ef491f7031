"""``vtprune fit`` and ``vtprune calibrate``: recipes for a model."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from statistics import fmean, median
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from vtprune_fx.cli.options import (
    DtypeOption,
    ModelArgument,
    RecipeOption,
    check_device,
)
from vtprune_fx.cli.recipes import draw
from vtprune_fx.recipes.loading import load_recipe

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vtprune_fx.fitting.options import Fitted
    from vtprune_fx.fitting.rank_counts import Counted


DataOption = Annotated[
    str,
    typer.Option(
        help="A folder of images with a metadata.jsonl, a data set on disk or the "
        "hub, or 'reference': the reference model's training questions."
    ),
]


BudgetOption = Annotated[
    list[float],
    typer.Option(
        help="Share of the language model's prefill MACs to save, what `vtprune cost` "
        "prints as saved: 0.6. May be repeated. With --latency, share of the time."
    ),
]


ExactOption = Annotated[
    bool,
    typer.Option(
        "--exact", help="As the published code: recompute attention on the tokens kept."
    ),
]


CountOption = Annotated[
    Literal["all", "visual"],
    typer.Option(help="MACs of all tokens, or of visual ones as the paper counts."),
]


MaxCutsOption = Annotated[
    int | None,
    typer.Option(min=1, help="Merge cuts until at most this many are left."),
]


LatencyOption = Annotated[
    Literal["torch", "onnx"] | None,
    typer.Option(
        help="Budgets are shares of the time to the first token, measured here."
    ),
]


DeviceOption = Annotated[
    str | None, typer.Option(help="cpu or cuda. Default: cuda if there is one.")
]


def fit(
    model: ModelArgument,
    data: DataOption,
    budget: BudgetOption,
    output: Annotated[Path, typer.Option(help="New folder, or an earlier fit's.")],
    limit: Annotated[int, typer.Option(min=1, help="Samples at most.")] = 64,
    exact: ExactOption = False,
    count: CountOption = "all",
    max_cuts: MaxCutsOption = None,
    latency: LatencyOption = None,
    statistics: Annotated[
        Path | None, typer.Option(help="File with the statistics of an earlier fit.")
    ] = None,
    device: DeviceOption = None,
    dtype: DtypeOption = "float32",
) -> None:
    """Find FitPrune recipes for a model: how many tokens each layer drops.

    Fits on attention statistics of the unpruned model on a few prompts. They are saved
    in the folder: an interrupted run resumes, and further budgets take seconds. Under
    torchrun, processes share the samples.

    Example: [bold]vtprune fit llava-hf/llava-1.5-7b-hf --data photos
    --budget 0.6 --budget 0.5 --output llava-recipes[/bold]
    """
    from vtprune_fx.files import check_output
    from vtprune_fx.fitting.job import fit_request
    from vtprune_fx.fitting.options import Options, Request

    check_output(output, "folder to fill")
    check_device(device)
    options = Options(
        budgets=tuple(dict.fromkeys(budget)),
        count=count,
        exact=exact,
        max_cuts=max_cuts,
        latency=latency,
        statistics=statistics,
        command=shlex.join(["vtprune", *sys.argv[1:]]),
    )
    request = Request(model, data, limit, device, dtype)
    _show_fitted(output, fit_request(request, output, options))


def _show_fitted(output: Path, fitted: Sequence[Fitted]) -> None:
    if not fitted:
        return  # another process shows them
    for one in fitted:
        draw(one.recipe)
        typer.echo()
    Console().print(_fitted_table(fitted))
    first = output / f"{fitted[0].recipe.name}.json"
    typer.echo(f"Wrote {output}. Try: vtprune cost --recipe {first}")


def _fitted_table(fitted: Sequence[Fitted]) -> Table:
    table = Table(box=SIMPLE_HEAD, caption="Saved: of the calibration prompts' MACs.")
    table.add_column("recipe", overflow="fold")
    titles = (
        "budget",
        "alpha",
        "saved,\nall",
        "saved,\nvisual",
        "cuts",
        "attention\nkept",
        *["time\nsaved"] * (fitted[0].saved_time is not None),
    )
    for title in titles:
        table.add_column(title, justify="right", no_wrap=True)
    for one in fitted:
        shares = (one.saved, one.saved_visual)
        table.add_row(
            one.recipe.name,
            f"{one.budget:.1%}",
            f"{one.tolerance:.4f}",
            *(f"{share:.1%}" for share in shares),
            str(len(one.recipe.cuts)),
            f"{one.kept:.1%}",
            *([] if one.saved_time is None else [f"{one.saved_time:.1%}"]),
        )
    return table


_NOTE = "The rank rule's mean over"
"""Begins the note in a recipe that ``calibrate`` wrote, by which it is known again."""


def calibrate(
    model: ModelArgument,
    recipe: RecipeOption,
    data: DataOption,
    output: Annotated[Path, typer.Option(help="Recipe file to write.")],
    limit: Annotated[int, typer.Option(min=1, help="Samples at most.")] = 64,
    device: DeviceOption = None,
    dtype: DtypeOption = "float32",
) -> None:
    """Make a recipe with fixed counts of one whose counts follow attention's rank.

    Each prompt is pruned by its ranks. A layer of the new recipe keeps the mean number
    of tokens that were kept there, rounded.

    Example: [bold]vtprune calibrate llava-hf/llava-1.5-7b-hf --data photos
    --recipe sparsevlm-rank-llava-1.5-7b-64 --output rank-64.json[/bold]
    """
    import torch

    from vtprune_fx.files import check_output, replace_file
    from vtprune_fx.fitting import rank_counts
    from vtprune_fx.fitting.calibration import open_calibration
    from vtprune_fx.models.loading import open_checkpoint
    from vtprune_fx.recipes.schema import Provenance

    # Cheap checks first: loading a model takes minutes.
    loaded = load_recipe(recipe)
    rank_counts.check_adaptive(loaded, output)
    check_output(output, "file", inputs=[Path(recipe)], mark=_NOTE.encode())
    check_device(device)
    calibration = open_calibration(data, limit)
    opened, processor = open_checkpoint(model, getattr(torch, dtype))
    on = device or ("cuda" if torch.cuda.is_available() else "cpu")
    opened.to(torch.device(on))  # type: ignore[arg-type] # transformers' wrapper
    provenance = Provenance(
        source=shlex.join(["vtprune", *sys.argv[1:]]),
        model=model,
        note=f"{_NOTE} {len(calibration)} samples, rounded.",
    )
    static, counted = rank_counts.calibrate(
        opened, processor, loaded, calibration, provenance
    )
    replace_file(output, static.to_json().encode())
    Console().print(_counted_table(counted, len(calibration)))
    typer.echo(f"Wrote {output}. Try: vtprune cost --recipe {output}")


def _counted_table(counted: Sequence[Counted], samples: int) -> Table:
    table = Table(box=SIMPLE_HEAD, caption=f"Over {samples} samples.")
    titles = ("layer", "rank\nmin / median / max", "kept\nmin / median / max")
    for title in (*titles, "mean", "kept,\nfixed", "drop,\nfixed"):
        table.add_column(title, justify="right", no_wrap=True)
    for one in counted:
        table.add_row(
            str(one.layer),
            *map(_spread, (one.ranks, one.stayed)),
            f"{fmean(one.stayed):.1f}",
            *map(str, (one.stay, one.drop)),
        )
    return table


def _spread(counts: Sequence[int]) -> str:
    return f"{min(counts)} / {median(counts):g} / {max(counts)}"
