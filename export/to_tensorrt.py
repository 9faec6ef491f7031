"""Exporting a pruned model to TensorRT: a prefill engine and a decode engine.

The graphs are those of ``to_onnx``. TensorRT's parser wants axes and the like as
constants, so they are folded first; weights keep the model's type, since networks are
strongly typed. The parsed network must have the graph's sizes at the smallest, usual
and largest inputs.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor
from transformers import PreTrainedModel, ProcessorMixin
from transformers.exporters import ExportedComponent, ExportedModel

from vtprune_fx.errors import ExportError
from vtprune_fx.export import tensorrt_parse
from vtprune_fx.export.folder import check_free, write_export
from vtprune_fx.export.manifest import versions
from vtprune_fx.export.tensorrt_library import (
    compute_capability,
    log,
    new_builder,
    version,
)
from vtprune_fx.export.tensorrt_model import FORMAT, OUTPUTS
from vtprune_fx.export.tensorrt_profile import (
    EngineSizes,
    Point,
    cache_lengths,
    decode_points,
    prefill_points,
    shape_at,
)
from vtprune_fx.export.to_onnx import (
    check_encoders,
    example_prompts,
    export_onnx,
    manifest_fields,
)
from vtprune_fx.optional import optional
from vtprune_fx.planning.report import PruneReport
from vtprune_fx.recipes.schema import Recipe

if TYPE_CHECKING:
    import onnx_ir

    from vtprune_fx.export.tensorrt_types import Builder, Network

Shapes = dict[str, list[tuple[int, ...]]]
"""For each input or output, its shape at each point."""


@dataclass(frozen=True)
class Built:
    """One engine, and how it was built.

    Attributes:
        plan: The serialised engine.
        seconds: Parsing and building took.
        layers: Of the network that it was built from.
        inputs: What it takes: smallest, usual, largest.
        outputs: What it gives, in the order of the graph.
        types: Type of each, as ONNX names it.
    """

    plan: bytes = field(repr=False)
    seconds: float
    layers: int
    inputs: Shapes
    outputs: Shapes
    types: Mapping[str, str]

    def record(self) -> dict[str, object]:
        """Inputs and outputs, which a runner cannot query without a GPU."""
        return {
            kind: {
                name: {"type": self.types[name], "shapes": shapes[name]}
                for name in shapes
            }
            for kind, shapes in (("inputs", self.inputs), (OUTPUTS, self.outputs))
        }


@dataclass(frozen=True)
class EngineReport:
    """What was pruned, and the engines that were built."""

    pruned: PruneReport
    engines: Mapping[str, Built]

    def __str__(self) -> str:
        [(name, number)] = version().items()
        lines = [str(self.pruned)]
        for engine, built in self.engines.items():
            lines.append(
                f"{engine}: {len(built.plan) / 2**20:.1f} MiB, built in "
                f"{built.seconds:.1f} s by {name} {number}, {built.layers} layers"
            )
            for tensor, shapes in built.inputs.items():
                ranges = " : ".join("x".join(map(str, shape)) for shape in shapes)
                lines.append(f"  {tensor}  {ranges}")
        return "\n".join(lines)


def write_tensorrt(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    recipe: Recipe | None,
    folder: Path,
    sizes: EngineSizes,
    capability: str | None = None,
) -> EngineReport:
    """Export a model with its processor as engines that ``load`` can run.

    Args:
        model: An unmodified transformers model, in the precision to run in.
        processor: Its processor.
        recipe: What to cut, or None for the default that fits the model.
        folder: New, empty, or an earlier export, which is replaced at the end.
        sizes: What the engines shall take.
        capability: Compute capability of the GPU, as ``8.9``. Left out, TensorRT for
            RTX builds for every GPU from 8.0 on, full TensorRT for the one at hand.

    Raises:
        InputError: The folder holds something else, or no engine can be built for
            these sizes or this GPU.
        MissingDependencyError: TensorRT, or the packages that write ONNX, are missing.
        AnatomyError: The model has no visual tokens, or no decoder that can be pruned.
        PlanError: The recipe does not fit the model.
        ExportError: TensorRT does not take the graphs, counts depend on the prompt, or
            the model's encoders take image sizes, so that features depend on values.
    """
    for package in ("onnx", "onnxscript"):
        optional(package, package, "exporting to TensorRT", FORMAT)
    compute_capability(capability)
    _check_counts(recipe)
    check_free(folder)
    inputs = _in_precision(example_prompts(processor), model)
    check_encoders(model, inputs)
    exported, report = export_onnx(model, inputs, recipe)
    sizes = sizes.for_prompts(report.plan.visual_tokens, report.plan.dropped)
    engines = build_engines(exported, sizes, capability)
    write_export(
        folder,
        engines_of(exported, engines, sizes),
        processor,
        target=FORMAT,
        packages=versions() | version(),
        **manifest_fields(model, report, inputs),
    )
    return EngineReport(report, engines)


def build_engines(
    exported: ExportedModel, sizes: EngineSizes, capability: str | None = None
) -> dict[str, Built]:
    """Build what ``export_onnx`` exported.

    Args:
        exported: Its graphs; constants in them are folded.
        sizes: With a prompt.
        capability: As in ``write_tensorrt``.

    Raises:
        ExportError: TensorRT does not take a graph, or makes other sizes of it.
    """
    graphs = {name: part.program for name, part in exported.components.items()}
    points = {"prefill": prefill_points(graphs["prefill"].graph, sizes)}
    filled = cache_lengths(graphs["prefill"].graph, points["prefill"])
    points["decode"] = decode_points(graphs["decode"].graph, sizes, filled)
    return {
        name: build(name, graphs[name], points[name], capability) for name in points
    }


def build(
    name: str,
    model: onnx_ir.Model,
    points: list[Point],
    capability: str | None = None,
) -> Built:
    """Build one engine.

    Args:
        name: What errors call it.
        model: Its graph; constants in it are folded.
        points: Smallest, usual, largest sizes.
        capability: As in ``write_tensorrt``.

    Raises:
        ExportError: TensorRT does not take the graph, or makes other sizes of it.
    """
    start = time.perf_counter()
    fold_constants(model)
    inputs, outputs = (
        {str(value.name): [shape_at(value, p) for p in points] for value in values}
        for values in (model.graph.inputs, model.graph.outputs)
    )
    log().errors.clear()
    builder = new_builder()
    parsed = tensorrt_parse.parse(builder, model, name)
    check_shapes(name, parsed.network, inputs, outputs)
    plan = _build(name, builder, parsed.network, inputs, capability)
    seconds = time.perf_counter() - start
    values = (*model.graph.inputs, *model.graph.outputs)
    types = {str(value.name): value.dtype.name for value in values if value.dtype}
    return Built(plan, seconds, parsed.network.num_layers, inputs, outputs, types)


def fold_constants(model: onnx_ir.Model) -> None:
    """Compute what depends on constants alone.

    The parser wants axes and the like as constants; torch.onnx computes some.
    """
    from onnxscript import optimizer  # noqa: PLC0415 - an optional package

    optimizer.fold_constants(model, onnx_shape_inference=True)
    optimizer.remove_unused_nodes(model)


def check_shapes(name: str, network: Network, inputs: Shapes, outputs: Shapes) -> None:
    """Check that a network has the sizes that its graph has, at every point.

    Raises:
        ExportError: It has others.
    """
    takes = [network.get_input(i) for i in range(network.num_inputs)]
    gives = [network.get_output(i) for i in range(network.num_outputs)]
    dynamic = [tuple(tensor.shape) for tensor in takes]
    for point in range(3):
        for tensor in takes:
            tensor.shape = inputs[tensor.name][point]
        for tensor in gives:
            expected = outputs[tensor.name][point]
            if tuple(tensor.shape) != expected:
                raise ExportError(
                    f"engine {name}, output {tensor.name}",
                    expected=f"the graph's shape {expected}",
                    found=f"{tuple(tensor.shape)} in the network that was parsed",
                    fix="Report the model and the version of TensorRT.",
                )
    for tensor, shape in zip(takes, dynamic, strict=True):
        tensor.shape = shape


def _build(
    name: str,
    builder: Builder,
    network: Network,
    inputs: Shapes,
    capability: str | None,
) -> bytes:
    config = builder.create_builder_config()
    profile = builder.create_optimization_profile()
    for tensor, shapes in inputs.items():
        least, usual, most = shapes
        profile.set_shape(tensor, least, usual, most)
    config.add_optimization_profile(profile)
    if (target := compute_capability(capability)) is not None:
        config.num_compute_capabilities = 1
        config.set_compute_capability(target, 0)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise ExportError(
            f"engine {name}",
            expected="TensorRT to build it",
            found=log().errors[0] if log().errors else "no engine, and no reason given",
            fix="Name a smaller --batch or --prompt, or run the model on ONNX Runtime.",
        )
    return bytes(plan)


def _check_counts(recipe: Recipe | None) -> None:
    """Refuse recipes whose counts depend on what a prompt holds.

    Raises:
        ExportError: It is one of these.
    """
    if recipe is not None and recipe.adaptive:
        raise ExportError(
            f"recipe {recipe.name}",
            expected="the same number of tokens dropped from every prompt: an "
            "engine's sizes follow from its inputs' sizes",
            found="numbers that depend on the prompt",
            fix="Fix the counts with `vtprune calibrate`, or run the model with torch.",
        )


def _in_precision(
    inputs: Mapping[str, Tensor], model: PreTrainedModel
) -> dict[str, Tensor]:
    """Inputs with pixels in the type of the model's weights."""
    return {
        name: value.to(model.dtype) if value.is_floating_point() else value
        for name, value in inputs.items()
    }


def engines_of(
    exported: ExportedModel, engines: Mapping[str, Built], sizes: EngineSizes
) -> ExportedModel:
    """The engines in place of the graphs, with their other metadata."""
    components = {}
    for name, built in engines.items():
        metadata = exported.components[name].metadata
        metadata.export_config = sizes.fields() | built.record()
        components[name] = ExportedComponent(built.plan, metadata)
    return ExportedModel(
        components, FORMAT, exported.config, exported.generation_config
    )
