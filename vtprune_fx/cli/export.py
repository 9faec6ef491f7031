"""``vtprune export`` and ``vtprune verify``: pruned models for other runtimes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

from vtprune_fx.cli.options import (
    LARGEST_SEED,
    DtypeOption,
    ModelArgument,
    OptionalRecipe,
)
from vtprune_fx.recipes.loading import load_recipe

OutputOption = Annotated[Path, typer.Option(help="New folder, or an earlier export.")]


QuantizeOption = Annotated[
    Literal["int8", "int4"] | None,
    typer.Option(help="Round weight matrices, in blocks of 32."),
]


KeepSetsOption = Annotated[
    bool,
    typer.Option("--keep-sets", help="Make the tokens kept at each cut outputs."),
]


def export_to_onnx(
    model: ModelArgument,
    output: OutputOption,
    recipe: OptionalRecipe = None,
    dtype: DtypeOption = "float32",
    quantize: QuantizeOption = None,
    opset: Annotated[
        Literal["20", "23"],
        typer.Option(help="Version of ONNX; in 23 attention is one operator."),
    ] = "20",
    batch: Annotated[
        int | None, typer.Option(min=1, help="Fix the number of samples.")
    ] = None,
    prompt: Annotated[
        int | None, typer.Option(min=3, help="Fix the length of prompts with images.")
    ] = None,
    keep_sets: KeepSetsOption = False,
) -> None:
    """Export a pruned model to ONNX: prefill and decode graphs, processor, manifest.

    Example: [bold]vtprune export onnx llava-hf/llava-1.5-7b-hf
    --recipe fitprune-llava-1.5-7b-60 --output llava-60[/bold]
    """
    import torch

    from vtprune_fx.export import OnnxOptions, require_onnxruntime, write_onnx
    from vtprune_fx.export.folder import check_free
    from vtprune_fx.models.loading import open_checkpoint

    # Cheap checks first: loading a model takes minutes.
    require_onnxruntime()
    check_free(output)
    loaded = load_recipe(recipe) if recipe else None
    options = OnnxOptions(
        opset=int(opset),
        quantize=quantize,
        batch=batch,
        prompt=prompt,
        keep_sets=keep_sets,
    )
    with Console(stderr=True).status(f"Exporting {model} (minutes for a deep model)"):
        parts = open_checkpoint(model, getattr(torch, dtype))
        report = write_onnx(*parts, loaded, output, options=options)
    typer.echo(report)
    typer.echo(
        f"Wrote {output}. Try: vtprune generate {output} --image FILE --prompt TEXT"
    )


def verify_export(
    folder: Annotated[Path, typer.Argument(help="An exported folder.")],
    model: Annotated[
        str | None,
        typer.Option(
            help="The exported model. Default: the one that the manifest names."
        ),
    ] = None,
    seed: Annotated[
        int, typer.Option(min=0, max=LARGEST_SEED, help="Seed of prompts and images.")
    ] = 0,
) -> None:
    """Compare an export with the oracle; exit with status 1 where they differ.

    Compares each layer's cache, the tokens kept at each cut, logits, and the next
    tokens, on random prompts and on the shortest and longest that the export takes.

    Example: [bold]vtprune verify llava-60[/bold]
    """
    from vtprune_fx.export.verify import verify

    with Console(stderr=True).status(f"Running {folder} and the oracle"):
        result = verify(folder, model, seed)
    Console().print(result.table())
    if not result.passed:
        raise typer.Exit(1)


BatchSpan = Annotated[
    str, typer.Option(help="Prompts at once: smallest:usual:largest, or one.")
]


PromptSpan = Annotated[
    str | None,
    typer.Option(
        help="Tokens of a prompt, visual ones included, as 600:700:1024. "
        "Default: 16, 128 and 448 more than the visual ones."
    ),
]


CapabilityOption = Annotated[
    str | None,
    typer.Option(
        help="Of the GPU, as 8.9. Default: TensorRT for RTX builds for all from "
        "8.0 on, full TensorRT for this machine's."
    ),
]


def export_to_tensorrt(
    model: ModelArgument,
    output: OutputOption,
    recipe: OptionalRecipe = None,
    batch: BatchSpan = "1:1:4",
    prompt: PromptSpan = None,
    images: Annotated[str, typer.Option(help="Images of a prompt.")] = "1",
    new_tokens: Annotated[
        int, typer.Option(min=1, help="Most tokens to generate.")
    ] = 512,
    dtype: DtypeOption = "float16",
    compute_capability: CapabilityOption = None,
) -> None:
    """Export a pruned model to TensorRT; for TensorRT for RTX that needs no GPU.

    Example: [bold]vtprune export tensorrt llava-hf/llava-1.5-7b-hf
    --recipe fitprune-llava-1.5-7b-60 --prompt 600:700:1024 --output llava-60[/bold]
    """
    import torch

    from vtprune_fx.export import EngineSizes, Span, write_tensorrt
    from vtprune_fx.export.folder import check_free
    from vtprune_fx.export.tensorrt_library import (
        compute_capability as check_capability,
    )
    from vtprune_fx.models.loading import open_checkpoint

    # Cheap checks first: loading a model takes minutes.
    sizes = EngineSizes(
        batch=Span.parse(batch, "--batch"),
        prompt=None if prompt is None else Span.parse(prompt, "--prompt"),
        images=Span.parse(images, "--images"),
        new_tokens=new_tokens,
    )
    check_capability(compute_capability)
    check_free(output)
    loaded = load_recipe(recipe) if recipe else None
    checkpoint = open_checkpoint(model, getattr(torch, dtype))
    with Console(stderr=True).status(f"Building {model} (minutes for a deep model)"):
        report = write_tensorrt(*checkpoint, loaded, output, sizes, compute_capability)
    typer.echo(report)
    typer.echo(
        f"Wrote {output}. Try: vtprune generate {output} --image FILE --prompt TEXT"
    )


def export_to_triton(
    folder: Annotated[Path, typer.Argument(help="An exported folder.")],
    output: Annotated[Path, typer.Option(help="Model repository, new or not.")],
    max_batch: Annotated[
        int,
        typer.Option(
            min=0,
            help="Prompts of one image each that Triton may join. With 0, none: "
            "a request is a batch.",
        ),
    ] = 4,
) -> None:
    """Write a model repository for NVIDIA Triton Inference Server.

    Example: [bold]vtprune export triton llava-60 --output models[/bold]
    """
    from vtprune_fx.export import write_triton

    for model in write_triton(folder, output, max_batch):
        typer.echo(f"Wrote {model}")
