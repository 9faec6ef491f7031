"""The ``vtprune`` command.

Commands import what is slow to import (torch, transformers) when they run, so that
``vtprune --help`` and ``vtprune recipes`` answer at once.
"""

from __future__ import annotations

import dataclasses
import enum
import json
import shlex
import sys
from pathlib import Path
from statistics import fmean, median
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from vtprune_fx import recipe as recipes_module
from vtprune_fx.cost import LLAVA_1_5_7B, Geometry, cost
from vtprune_fx.errors import VtpruneError
from vtprune_fx.methods import METHODS
from vtprune_fx.optional import lacking
from vtprune_fx.reference import CHECKPOINT

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vtprune_fx.cost import Cost, Work
    from vtprune_fx.fitting import Fitted
    from vtprune_fx.rank_counts import Counted
    from vtprune_fx.recipe import Recipe

BAR_WIDTH = 40
"""Characters of a bar that stands for all visual tokens."""

TERA, MIB = 1e12, 2**20

REFERENCE = "fitprune-reference-55"
"""The recipe for the reference model."""

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
app.add_typer(recipes_app, name="recipes")

RecipeOption = Annotated[
    str, typer.Option("--recipe", help="Name of a shipped recipe, or a recipe file.")
]
CONFIG_HELP = "Name of a shipped configuration, model folder or config.json."
TextTokens = Annotated[int, typer.Option(help="Tokens that are not visual.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]


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


@recipes_app.callback()
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
    for name in recipes_module.names():
        table.add_row(*_summary(recipes_module.load_recipe(name)))
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
    told = (str(dropped), f"{saved:.1%}")
    return [recipe.name, recipe.provenance.model, *sizes, *told]


@recipes_app.command("show")
def show_recipe(
    name: Annotated[str, typer.Argument(help="Shipped name, or a recipe file.")],
    tile: Annotated[
        int | None,
        typer.Option(min=1, help="Leave prompts that fill tiles of so many tokens."),
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
    recipe = recipes_module.load_recipe(name)
    if tile is not None:
        recipe = recipe.aligned(tile, text_tokens)
    if as_json:
        typer.echo(recipe.to_json(), nl=False)
        return
    _draw(recipe)


def _draw(recipe: Recipe) -> None:
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


@app.command("cost")
def show_cost(
    recipe: RecipeOption,
    config: Annotated[
        str | None, typer.Option(help=f"{CONFIG_HELP} Default: LLaVA-1.5-7B.")
    ] = None,
    text_tokens: TextTokens = 75,
    visual_tokens: Annotated[
        int | None, typer.Option(help="Visual tokens. Default: the recipe's own.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Count what a recipe saves: MACs, FLOPs and KV cache of one sample's prefill.

    Example: [bold]vtprune cost --recipe fitprune-llava-1.5-7b-60 --json[/bold]
    """
    loaded = recipes_module.load_recipe(recipe)
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
    from vtprune_fx.weightless import load_config

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
    table.add_row(f"TMACs, {name}, the scorer's own", "", f"{scorer:.3f}", "")
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


OptionalRecipe = Annotated[
    str | None,
    typer.Option("--recipe", help="Shipped name or file. Default: fitted by depth."),
]


@app.command("explain")
def explain(
    config: Annotated[str, typer.Option(help=CONFIG_HELP)],
    recipe: OptionalRecipe = None,
    visual_tokens: Annotated[
        int | None, typer.Option(help="Visual tokens. Default: those of one image.")
    ] = None,
    text_tokens: TextTokens = 75,
    as_json: JsonOption = False,
) -> None:
    """Tell what a recipe cuts in a model of full size, without its weights.

    A minute for a deep model: it is traced on tensors that hold no data.

    Example: [bold]vtprune explain --config llava-1.5-7b
    --recipe fitprune-llava-1.5-7b-60[/bold]
    """
    from vtprune_fx.full_size import explain_config

    loaded = recipes_module.load_recipe(recipe) if recipe else None
    with Console(stderr=True).status(f"Tracing {config}"):
        found = explain_config(config, loaded, visual_tokens, text_tokens)
    if as_json:
        of_cost = _cost_fields(found.plan.recipe, found.geometry, found.cost)
        typer.echo(json.dumps(found.fields() | of_cost, indent=2))
        return
    cuts, *others = found.tables()
    Console().print(cuts, _cost_table(found.plan.recipe, found.cost), *others)


class Dtype(enum.StrEnum):
    """Types of weights."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class Quantized(enum.StrEnum):
    """What ``vtprune export onnx`` rounds weight matrices to."""

    int8 = "int8"
    int4 = "int4"


class Opset(enum.StrEnum):
    """Versions of ONNX's operators that ``vtprune export onnx`` writes."""

    v20 = "20"
    v23 = "23"


export_app = typer.Typer(
    no_args_is_help=True,
    help="Export a pruned model for another runtime.",
    epilog="Example: [bold]vtprune export onnx MODEL --output DIR[/bold]",
)
app.add_typer(export_app, name="export")

ModelArgument = Annotated[
    str, typer.Argument(help="A checkpoint folder, or the id of a model on the hub.")
]


@export_app.command("onnx")
def export_to_onnx(
    model: ModelArgument,
    output: Annotated[Path, typer.Option(help="New folder, or an earlier export.")],
    recipe: OptionalRecipe = None,
    precision: Annotated[Dtype, typer.Option(help="Type of weights.")] = Dtype.float32,
    quantize: Annotated[
        Quantized | None, typer.Option(help="Round weight matrices, in blocks of 32.")
    ] = None,
    opset: Annotated[
        Opset, typer.Option(help="Of the operators; from 23 on attention is one.")
    ] = Opset.v20,
    batch: Annotated[
        int | None, typer.Option(min=1, help="Fix the number of samples.")
    ] = None,
    prompt: Annotated[
        int | None, typer.Option(min=3, help="Fix the length of prompts with images.")
    ] = None,
    keep_sets: Annotated[
        bool,
        typer.Option("--keep-sets", help="Let the prefill return who stays at cuts."),
    ] = False,
) -> None:
    """Write prefill and decode graphs, processor, configuration and a manifest.

    Example: [bold]vtprune export onnx llava-hf/llava-1.5-7b-hf
    --recipe fitprune-llava-1.5-7b-60 --output llava-60[/bold]
    """
    import torch

    from vtprune_fx.export import OnnxOptions, require_onnxruntime, write_onnx
    from vtprune_fx.export.folder import check_free
    from vtprune_fx.inputs import open_checkpoint

    # What can be refused is refused before anything slow.
    require_onnxruntime()
    check_free(output)
    loaded = recipes_module.load_recipe(recipe) if recipe else None
    options = OnnxOptions(
        opset=int(opset.value),
        quantize=None if quantize is None else quantize.value,
        batch=batch,
        prompt=prompt,
        keep_sets=keep_sets,
    )
    with Console(stderr=True).status(f"Exporting {model} (minutes for a deep model)"):
        parts = open_checkpoint(model, getattr(torch, precision.value))
        report = write_onnx(*parts, loaded, output, options=options)
    typer.echo(report)
    typer.echo(
        f"Wrote {output}. Try: vtprune generate {output} --image FILE --prompt TEXT"
    )


@app.command("verify")
def verify_export(
    folder: Annotated[Path, typer.Argument(help="An exported folder.")],
    model: Annotated[
        str | None,
        typer.Option(help="The model that was exported. Default: the manifest's."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of prompts and images.")] = 0,
) -> None:
    """Compare an export with the oracle; exit with status 1 where they differ.

    Caches layer by layer, who stays at each cut, logits, and tokens that follow: on
    prompts drawn at random and at the limits of what the export takes.

    Example: [bold]vtprune verify llava-60[/bold]
    """
    from vtprune_fx.export.verify import verify

    with Console(stderr=True).status(f"Running {folder} and the oracle"):
        result = verify(folder, model, seed)
    Console().print(result.table())
    if not result.passed:
        raise typer.Exit(1)


class Precision(enum.StrEnum):
    """Types of an engine's weights."""

    fp16 = "fp16"
    bf16 = "bf16"
    fp32 = "fp32"

    @property
    def dtype(self) -> str:
        """What torch calls it."""
        return {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}[self]


class Via(enum.StrEnum):
    """Who makes a TensorRT network of a graph."""

    onnx = "onnx"
    torch_tensorrt = "torch-tensorrt"


@export_app.command("tensorrt")
def export_to_tensorrt(
    model: ModelArgument,
    output: Annotated[Path, typer.Option(help="New folder, or an earlier export.")],
    recipe: OptionalRecipe = None,
    batch: Annotated[
        str, typer.Option(help="Prompts at once: smallest:usual:largest, or one.")
    ] = "1:1:4",
    prompt: Annotated[
        str | None,
        typer.Option(
            help="Tokens of a prompt, visual ones included, as 600:700:1024. "
            "Default: 16, 128 and 448 more than the visual ones."
        ),
    ] = None,
    images: Annotated[str, typer.Option(help="Images of a prompt.")] = "1",
    new_tokens: Annotated[
        int, typer.Option(min=1, help="Tokens to generate at most.")
    ] = 512,
    precision: Annotated[Precision, typer.Option(help="Of weights.")] = Precision.fp16,
    compute_capability: Annotated[
        str | None,
        typer.Option(
            help="Of the GPU, as 8.9. Default: TensorRT for RTX builds for all from "
            "8.0 on, full TensorRT for the one at hand."
        ),
    ] = None,
    via: Annotated[
        Via,
        typer.Option(
            help="TensorRT's ONNX parser. Torch-TensorRT is refused, with the reason."
        ),
    ] = Via.onnx,
) -> None:
    """Build a prefill and a decode engine; for TensorRT for RTX that needs no GPU.

    Example: [bold]vtprune export tensorrt llava-hf/llava-1.5-7b-hf
    --recipe fitprune-llava-1.5-7b-60 --prompt 600:700:1024 --output llava-60[/bold]
    """
    import torch

    from vtprune_fx.export import Sizes, Span, write_tensorrt
    from vtprune_fx.export.folder import check_free
    from vtprune_fx.export.tensorrt_library import (
        compute_capability as check_capability,
    )
    from vtprune_fx.export.tensorrt_library import refuse_torch_tensorrt
    from vtprune_fx.inputs import open_checkpoint

    # What can be refused is refused before anything slow.
    if via is Via.torch_tensorrt:
        refuse_torch_tensorrt()
    sizes = Sizes(
        batch=Span.parse(batch, "--batch"),
        prompt=None if prompt is None else Span.parse(prompt, "--prompt"),
        images=Span.parse(images, "--images"),
        new_tokens=new_tokens,
    )
    check_capability(compute_capability)
    check_free(output)
    loaded = recipes_module.load_recipe(recipe) if recipe else None
    checkpoint = open_checkpoint(model, getattr(torch, precision.dtype))
    with Console(stderr=True).status(f"Building {model} (minutes for a deep model)"):
        report = write_tensorrt(*checkpoint, loaded, output, sizes, compute_capability)
    typer.echo(report)
    typer.echo(
        f"Wrote {output}. Try: vtprune generate {output} --image FILE --prompt TEXT"
    )


@export_app.command("triton")
def export_to_triton(
    folder: Annotated[Path, typer.Argument(help="An exported folder.")],
    output: Annotated[Path, typer.Option(help="Model repository, new or not.")],
    max_batch: Annotated[
        int,
        typer.Option(
            min=0,
            help="Prompts that Triton may join, of one image each. With 0, requests "
            "bring batches of their own.",
        ),
    ] = 4,
) -> None:
    """Write a model repository for NVIDIA Triton Inference Server.

    Example: [bold]vtprune export triton llava-60 --output models[/bold]
    """
    from vtprune_fx.export import write_triton

    for model in write_triton(folder, output, max_batch):
        typer.echo(f"Wrote {model}")


@app.command("generate")
def generate(
    model: Annotated[
        str, typer.Argument(help="An exported folder, a checkpoint folder or a hub id.")
    ],
    prompt: Annotated[str, typer.Option(help="What to ask.")],
    image: Annotated[Path | None, typer.Option(help="What it is about.")] = None,
    recipe: OptionalRecipe = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens at most.")] = 32,
    inner: Annotated[
        str, typer.Option(help="torch.compile backend for a checkpoint.")
    ] = "inductor",
) -> None:
    """Answer a question about an image, pruned.

    An exported folder runs on ONNX Runtime alone; a checkpoint through torch.compile.

    Example: [bold]vtprune generate llava-60 --image cat.jpg
    --prompt "What is it?"[/bold]
    """
    from vtprune_fx.answer import answer

    typer.echo(answer(model, prompt, image, recipe, max_new_tokens, inner))


class Backend(enum.StrEnum):
    """Where ``vtprune eval`` runs a model."""

    torch = "torch"
    compile = "compile"
    onnx = "onnx"


class Split(enum.StrEnum):
    """Which questions ``vtprune eval`` asks."""

    train = "train"
    validation = "validation"
    test = "test"


@app.command("eval")
def evaluate(
    model: Annotated[
        Path, typer.Argument(help="A checkpoint folder. Default: the reference model.")
    ] = CHECKPOINT,
    recipe: Annotated[
        list[str] | None,
        typer.Option(help="Shipped name or file; as often as you like."),
    ] = None,
    baselines: Annotated[
        bool, typer.Option(help="Drop as many random, evenly spaced, and best tokens.")
    ] = False,
    split: Annotated[Split, typer.Option(help="Which questions.")] = Split.test,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the questions.")] = 0,
    limit: Annotated[int, typer.Option(min=1, help="How many questions.")] = 500,
    backend: Annotated[
        Backend, typer.Option(help="Eager oracle, torch.compile, or ONNX Runtime.")
    ] = Backend.torch,
    output: Annotated[
        Path | None, typer.Option(help="JSON file for all results and answers.")
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(help="PNG file for accuracy against MACs; a CSV file beside it."),
    ] = None,
) -> None:
    """Ask questions about drawn pictures; print accuracy against cost.

    Example: [bold]vtprune eval --recipe fitprune-reference-55 --baselines[/bold]
    """
    from vtprune_fx import evaluate as evaluation
    from vtprune_fx.curve import draw_curve, require_plots
    from vtprune_fx.inputs import open_checkpoint, replace_file
    from vtprune_fx.reference.questions import draw_samples

    if plot is not None:
        require_plots()
    recipes = []
    for name in recipe or [REFERENCE]:
        loaded = recipes_module.load_recipe(name)
        recipes += [loaded, *loaded.baselines()] if baselines else [loaded]
    samples = list(draw_samples(split.value, seed, limit))
    result = evaluation.evaluate(
        *open_checkpoint(model), recipes, samples, backend.value
    )
    Console().print(*result.tables())
    if output is not None:
        asked = {"model": str(model), "split": split.value, "seed": seed}
        asked |= {"backend": backend.value}
        text = json.dumps(asked | result.fields(), indent=1) + "\n"
        replace_file(output, text.encode())
    if plot is not None:
        draw_curve(result, plot)


class Count(enum.StrEnum):
    """Whose MACs the budget of ``vtprune fit`` is a share of."""

    all = "all"
    visual = "visual"


class Target(enum.StrEnum):
    """Where ``vtprune fit`` measures time."""

    torch = "torch"
    onnx = "onnx"


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
        "prints as saved: 0.6. As often as you like. With --latency, share of the time."
    ),
]
ExactOption = Annotated[
    bool,
    typer.Option(
        "--exact", help="As the published code: recompute attention on what is left."
    ),
]
CountOption = Annotated[
    Count,
    typer.Option(help="MACs of all tokens, or of visual ones as the paper counts."),
]
MaxCutsOption = Annotated[
    int | None,
    typer.Option(min=1, help="Merge cuts until there are at most so many."),
]
LatencyOption = Annotated[
    Target | None,
    typer.Option(
        help="Budgets are shares of the time to the first token, measured here."
    ),
]
DeviceOption = Annotated[
    str | None, typer.Option(help="cpu or cuda. Default: cuda if there is one.")
]


@app.command("fit")
def fit(
    model: ModelArgument,
    data: DataOption,
    budget: BudgetOption,
    output: Annotated[Path, typer.Option(help="New folder, or an earlier fit's.")],
    limit: Annotated[int, typer.Option(min=1, help="Samples at most.")] = 64,
    exact: ExactOption = False,
    count: CountOption = Count.all,
    max_cuts: MaxCutsOption = None,
    latency: LatencyOption = None,
    statistics: Annotated[
        Path | None, typer.Option(help="Statistics of an earlier fit to use.")
    ] = None,
    device: DeviceOption = None,
    dtype: Annotated[Dtype, typer.Option(help="Type of weights.")] = Dtype.float32,
) -> None:
    """Find FitPrune recipes for a model: how many tokens each layer drops.

    From attention statistics of the unpruned model on a few prompts. They are kept in
    the folder: a run that is cut short goes on where it was, and further budgets take
    seconds. Under torchrun, processes share the samples.

    Example: [bold]vtprune fit llava-hf/llava-1.5-7b-hf --data photos
    --budget 0.6 --budget 0.5 --output llava-recipes[/bold]
    """
    from vtprune_fx.fitting import Options, Request, fit_request

    options = Options(
        budgets=tuple(dict.fromkeys(budget)),
        count=count.value,
        exact=exact,
        max_cuts=max_cuts,
        latency=None if latency is None else latency.value,
        statistics=statistics,
        command=shlex.join(["vtprune", *sys.argv[1:]]),
    )
    request = Request(model, data, limit, device, dtype.value)
    _show_fitted(output, fit_request(request, output, options))


def _show_fitted(output: Path, fitted: Sequence[Fitted]) -> None:
    if not fitted:
        return  # another process shows them
    for one in fitted:
        _draw(one.recipe)
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


@app.command("calibrate")
def calibrate(
    model: ModelArgument,
    recipe: RecipeOption,
    data: DataOption,
    output: Annotated[Path, typer.Option(help="Recipe file to write.")],
    limit: Annotated[int, typer.Option(min=1, help="Samples at most.")] = 64,
    device: DeviceOption = None,
    dtype: Annotated[Dtype, typer.Option(help="Type of weights.")] = Dtype.float32,
) -> None:
    """Fix the counts of a recipe whose counts follow the rank of attention.

    Each prompt is pruned by its own ranks. A layer of the new recipe keeps the mean of
    what stayed there, rounded.

    Example: [bold]vtprune calibrate llava-hf/llava-1.5-7b-hf --data photos
    --recipe sparsevlm-rank-llava-1.5-7b-64 --output rank-64.json[/bold]
    """
    import torch

    from vtprune_fx import rank_counts
    from vtprune_fx.calibration import open_calibration
    from vtprune_fx.inputs import open_checkpoint, replace_file
    from vtprune_fx.recipe import Provenance

    # What can be refused is refused before anything slow.
    loaded = recipes_module.load_recipe(recipe)
    rank_counts.check_adaptive(loaded, output)
    calibration = open_calibration(data, limit)
    opened, processor = open_checkpoint(model, getattr(torch, dtype.value))
    on = device or ("cuda" if torch.cuda.is_available() else "cpu")
    opened.to(torch.device(on))  # type: ignore[arg-type] # transformers' wrapper
    provenance = Provenance(
        source=shlex.join(["vtprune", *sys.argv[1:]]),
        model=model,
        note=f"The rank rule's mean over {len(calibration)} samples, rounded.",
    )
    static, counted = rank_counts.calibrate(
        opened, processor, loaded, calibration, provenance
    )
    replace_file(output, static.to_json().encode())
    Console().print(_counted_table(counted, len(calibration)))
    typer.echo(f"Wrote {output}. Try: vtprune cost --recipe {output}")


def _counted_table(counted: Sequence[Counted], samples: int) -> Table:
    table = Table(box=SIMPLE_HEAD, caption=f"Over {samples} samples.")
    titles = ("layer", "rank\nmin / median / max", "stay\nmin / median / max")
    for title in (*titles, "mean", "stay,\nfixed", "drop,\nfixed"):
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


@app.command("demo")
def demo(
    output: Annotated[Path, typer.Option(help="Where files go.")] = Path(
        "vtprune-demo"
    ),
    recipe: RecipeOption = REFERENCE,
    seed: Annotated[int, typer.Option(min=0, help="Which picture and question.")] = 0,
) -> None:
    """Ask the reference model a question, before and after pruning, on every runtime.

    A few minutes on two CPU cores, nearly all of it in the compilers.

    Example: [bold]vtprune demo --seed 7 --output vtprune-demo[/bold]
    """
    from vtprune_fx.demo import reference_task, run_demo

    loaded = recipes_module.load_recipe(recipe)
    run_demo(output, CHECKPOINT, loaded, reference_task(seed))
