"""``vtprune export`` and ``vtprune verify``: pruned models for other runtimes."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from vtprune_fx.cli.options import Dtype, ModelArgument, OptionalRecipe
from vtprune_fx.recipes.loading import load_recipe


class Quantized(enum.StrEnum):
    """What ``vtprune export onnx`` rounds weight matrices to."""

    int8 = "int8"
    int4 = "int4"


class Opset(enum.StrEnum):
    """Versions of ONNX's operators that ``vtprune export onnx`` writes."""

    v20 = "20"
    v23 = "23"


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
    from vtprune_fx.models.loading import open_checkpoint

    # What can be refused is refused before anything slow.
    require_onnxruntime()
    check_free(output)
    loaded = load_recipe(recipe) if recipe else None
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
        "8.0 on, full TensorRT for the one at hand."
    ),
]


ViaOption = Annotated[
    Via,
    typer.Option(
        help="TensorRT's ONNX parser. Torch-TensorRT is refused, with the reason."
    ),
]


def export_to_tensorrt(
    model: ModelArgument,
    output: Annotated[Path, typer.Option(help="New folder, or an earlier export.")],
    recipe: OptionalRecipe = None,
    batch: BatchSpan = "1:1:4",
    prompt: PromptSpan = None,
    images: Annotated[str, typer.Option(help="Images of a prompt.")] = "1",
    new_tokens: Annotated[
        int, typer.Option(min=1, help="Tokens to generate at most.")
    ] = 512,
    precision: Annotated[Precision, typer.Option(help="Of weights.")] = Precision.fp16,
    compute_capability: CapabilityOption = None,
    via: ViaOption = Via.onnx,
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
    from vtprune_fx.models.loading import open_checkpoint

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
    loaded = load_recipe(recipe) if recipe else None
    checkpoint = open_checkpoint(model, getattr(torch, precision.dtype))
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
