"""Exporting a pruned model to ONNX: a prefill graph and a decode graph.

Built on transformers' exporter; pruning slots in between its two steps, tracing and
conversion, by inheritance.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import warnings
from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import OutputKind, OutputSpec, TensorArgument
from torch.utils import _pytree as pytree
from transformers import Cache, PreTrainedModel, ProcessorMixin
from transformers.exporters import (
    DynamoExporter,
    ExportedComponent,
    ExportedModel,
    ExportFormat,
    ExportMetadata,
    OnnxConfig,
    OnnxExporter,
)

from vtprune_fx.capture.aten import (
    dynamic_shapes,
    example,
    images_as_one_sequence,
)
from vtprune_fx.errors import ExportError, InputError
from vtprune_fx.export.folder import check_free, write_export
from vtprune_fx.export.graph_forward import graph_forward
from vtprune_fx.export.graph_model import zero_cache
from vtprune_fx.export.graph_outputs import KEEP_SETS
from vtprune_fx.export.manifest import Precision, versions
from vtprune_fx.export.onnx_model import require_onnxruntime
from vtprune_fx.export.onnx_rank import define_rank, spell_rank
from vtprune_fx.export.quantize import Quantized, WeightOnly
from vtprune_fx.models.arguments import PAST
from vtprune_fx.models.encoding import prefill_inputs, takes_sizes
from vtprune_fx.models.placeholders import is_visual, tokens_per_image
from vtprune_fx.models.prompts import image_token
from vtprune_fx.models.ragged_attention import (
    ATTENTION,
    attention_implementation,
    check_decoder,
)
from vtprune_fx.passes import cut_nodes
from vtprune_fx.planning.report import PruneReport
from vtprune_fx.pruning import prune_program
from vtprune_fx.recipes.schema import Recipe

if TYPE_CHECKING:
    import onnx_ir

OPSET = 20
"""Runs everywhere. From opset 23 on, attention is one node."""

TOLERANCES: dict[Precision, float] = {
    "float32": 1e-4,
    "float16": 2e-2,
    "bfloat16": 1.6e-1,
}
"""How far a value may be from the oracle's, as a share of the largest.

float16 and bfloat16 round to 2^-11 and 2^-8. Some ten roundings a layer that add up
like a random walk are sqrt(10 * 32) = 18 units over 32 layers; the bounds are about 40.
float32 rounds to 2^-24, and its bound is for the order of sums.
"""


@dataclass(frozen=True)
class OnnxOptions:
    """What an export may look like.

    Attributes:
        opset: Version of the ONNX operators.
        quantize: What all weight matrices are rounded to, in blocks of 32.
        batch: The one number of samples that the graphs take; any if left out.
        prompt: The one length of prompts with images; any if left out.
        keep_sets: Whether the prefill returns its keep sets, as ``keep_sets.LAYER``.
    """

    opset: int = OPSET
    quantize: Quantized | None = None
    batch: int | None = None
    prompt: int | None = None
    keep_sets: bool = False


class _Pruning(DynamoExporter):
    """Prunes the traced program, before the conversion.

    The program returns its keep sets too, after the model's outputs.
    """

    recipe: Recipe | None = None
    report: PruneReport

    def export_program(
        self,
        model: PreTrainedModel,
        sample_inputs: MutableMapping[str, Tensor | Cache],
        config: Any,
    ) -> tuple[Any, ExportMetadata]:
        """As the base class, and pruned.

        Typed as widely as in ``HfExporter``: the ONNX exporter, which overrides this,
        takes another class of configuration and returns an ONNX graph.
        """
        program, metadata = super().export_program(model, sample_inputs, config)
        pruned, self.report = prune_program(program, self.recipe)
        _return_keep_sets(pruned, self.report)
        spell_rank(pruned.graph_module)
        return pruned, metadata


def _return_keep_sets(program: ExportedProgram, report: PruneReport) -> None:
    """Let a program return its keep sets too: in graph, signature and structure."""
    found = cut_nodes(program.graph)
    keep_sets = [found[cut.attention.layer].keep for cut in report.plan.cuts]
    [output] = program.graph.find_nodes(op="output")
    output.args = ((*output.args[0], *keep_sets),)
    program.graph_module.recompile()
    program.graph_signature.output_specs.extend(
        OutputSpec(OutputKind.USER_OUTPUT, TensorArgument(node.name), None)
        for node in keep_sets
    )
    signature = program.module_call_graph[0].signature
    assert signature is not None, "the first entry describes the program itself"
    spec = signature.out_spec
    outputs = pytree.tree_unflatten(range(spec.num_leaves), spec)
    named = dict(outputs) | {node.name: None for node in keep_sets}
    signature.out_spec = pytree.tree_structure(named)


class PrunedOnnxExporter(OnnxExporter, _Pruning):
    """transformers' ONNX exporter, pruning by a recipe.

    Each cut's keep set is a value called ``keep_sets.LAYER``.

    Args:
        recipe: What to cut, or None for the default that fits the model.
        show: Whether keep sets are outputs, before the model's: a runner counts those
            from the last one.
    """

    def __init__(self, recipe: Recipe | None, show: bool = False) -> None:
        super().__init__()  # type: ignore[no-untyped-call] # not seen as transformers'
        self.recipe, self._show = recipe, show

    def export_program(
        self,
        model: PreTrainedModel,
        sample_inputs: MutableMapping[str, Tensor | Cache],
        config: Any,
    ) -> tuple[Any, ExportMetadata]:
        """As the base class, with keep sets in their place and functions defined."""
        graph, metadata = super().export_program(model, sample_inputs, config)
        cuts = self.report.plan.cuts
        outputs = graph.graph.outputs
        first = len(outputs) - len(cuts)
        keep_sets = [outputs.pop(first) for _ in cuts]
        for cut, value in zip(cuts, keep_sets, strict=True):
            value.name = f"{KEEP_SETS}{cut.attention.layer}"
        if self._show:
            outputs[:0] = keep_sets
        define_rank(graph)
        return graph, metadata


def export_onnx(
    model: PreTrainedModel,
    inputs: Mapping[str, object],
    recipe: Recipe | None,
    options: OnnxOptions = OnnxOptions(),
) -> tuple[ExportedModel, PruneReport]:
    """Export the graphs that generation needs.

    ``prefill`` takes what ``prefill_inputs`` gives, ids, mask, positions and pixels or
    features, and returns logits and a ragged cache; batch, prompt length and number of
    images are dynamic. ``decode`` takes any number of new tokens and the cache, with
    a separate dimension for each layer's length: it serves steps, further turns, and on
    an empty cache prompts without images.

    Args:
        model: An unmodified transformers model, in the precision of the export.
        inputs: An example with an image, as the model's processor returns it.
        recipe: What to cut, or None for the default that fits the model.
        options: What the graphs look like.

    Raises:
        InputError: Prompts are to be shorter than the example's image, or
            ``ragged_attention.check_decoder`` refuses the decoder.
        AnatomyError: The model has no visual tokens, or no decoder that can be pruned.
        PlanError: The recipe does not fit the model.
    """
    check_decoder(model.config.get_text_config())
    prompts = example(inputs)
    if options.prompt is not None:
        visual = is_visual(prompts["input_ids"], model.config).sum(dim=1)
        _check_prompt(options.prompt, int(visual.max()))
    ready = prefill_inputs(model, prompts)
    # After cuts nearly every symbolic size is new: remembering fakes doubles the time.
    with torch._dynamo.config.patch(fake_tensor_cache_enabled=False), _quietly():
        exporter = PrunedOnnxExporter(recipe, options.keep_sets)
        with images_as_one_sequence(model):
            shapes = dynamic_shapes(ready)
            prefill = _export(exporter, model, ready, shapes, options)
        with attention_implementation(model, ATTENTION):
            step, shapes = _decode_example(model, *ready["input_ids"].shape)
            decode = _export(OnnxExporter(), model, step, shapes, options)
    _fix_sizes(prefill.program.graph, options.batch, options.prompt)
    _fix_sizes(decode.program.graph, options.batch, None)
    components = {"prefill": prefill, "decode": decode}
    exported = ExportedModel(
        components, ExportFormat.ONNX, model.config, model.generation_config
    )
    return exported, exporter.report


def _check_prompt(prompt: int, visual: int) -> None:
    least = visual + 2
    if prompt < least:
        raise InputError(
            "--prompt",
            expected=f"at least {least}: {visual} visual tokens and two of text",
            found=str(prompt),
            fix="Omit it, or make it as long as the longest prompt.",
        )


_CHATTY = ("torch.onnx", "transformers.exporters.utils", "onnx_ir")
"""Loggers of the exporters: operators of packages that are not installed, versions that
differ from the last that transformers tested. What matters is an exception."""


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Errors only from the exporters' loggers, and their progress on standard error."""
    loggers = [logging.getLogger(name) for name in _CHATTY]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(sys.stderr), warnings.catch_warnings():
            # torch.export (torch 2.13) still makes the old leaf check itself.
            warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)`")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def write_onnx(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    recipe: Recipe | None,
    folder: Path,
    example: Mapping[str, object] | None = None,
    options: OnnxOptions = OnnxOptions(),
) -> PruneReport:
    """Export a model with its processor into a folder that ``load`` can run.

    Args:
        model: An unmodified transformers model, in the precision of the export.
        processor: Its processor.
        recipe: What to cut, or None for the default that fits the model.
        folder: New, empty, or an earlier export, which is replaced at the end.
        example: Two prompts to trace with, as the processor returns them; about a blank
            image each if left out. Prompts with fewer images may then be refused.
        options: What the graphs look like.

    Raises:
        InputError: The folder holds something else, or prompts are to be too short.
        ExportError: The model's weights are of a type that is not exported, or its
            encoders take image sizes, so that features depend on values.
        MissingDependencyError: The packages that write ONNX are not installed.
        AnatomyError: The model has no visual tokens, or no decoder that can be pruned.
        PlanError: The recipe does not fit the model.
    """
    require_onnxruntime()
    check_free(folder)
    _precision(model)
    inputs = example_prompts(processor) if example is None else example
    check_encoders(model, inputs)
    exported, report = export_onnx(model, inputs, recipe, options)
    fields = manifest_fields(model, report, inputs) | asdict(options)
    write_export(
        folder, exported, processor, target="onnx", packages=versions(), **fields
    )
    return report


def check_encoders(model: PreTrainedModel, inputs: Mapping[str, object]) -> None:
    """Check that a folder can hold a model's encoders.

    Raises:
        ExportError: They take image sizes, so that features depend on values.
    """
    if takes_sizes(model, inputs):
        raise ExportError(
            f"model {type(model).__name__}",
            expected="encoders that see pixels alone, to write as a graph",
            found="encoders that take image sizes",
            fix="Run it with vtprune_fx.compile, or take the graphs that "
            "vtprune_fx.export.export_onnx returns, which start with features.",
        )


def manifest_fields(
    model: PreTrainedModel, report: PruneReport, inputs: Mapping[str, object]
) -> dict[str, Any]:
    """Fields of a manifest that describe the model and its cuts.

    Args:
        model: What was exported.
        report: What was cut.
        inputs: The prompts that were traced, as the processor returned them.

    Raises:
        ExportError: The model's weights are of a type that is not exported.
    """
    precision = _precision(model)
    return {
        "source": _source(model),
        "recipe": report.plan.recipe,
        "visual_tokens": report.plan.visual_tokens,
        "per_image": tokens_per_image(inputs, model.config),
        "tokens_per_layer": report.visual_tokens,
        "image_token_id": model.config.image_token_id,
        "precision": precision,
        "tolerance": TOLERANCES[precision],
    }


def _precision(model: PreTrainedModel) -> Precision:
    for precision in TOLERANCES:
        if model.dtype == getattr(torch, precision):
            return precision
    raise ExportError(
        type(model).__name__,
        expected=f"weights of type {' or '.join(TOLERANCES)}",
        found=str(model.dtype),
        fix="Load the model in one of these.",
    )


def _source(model: PreTrainedModel) -> str:
    """Where a model came from: a folder by its full path, or a hub id."""
    name = str(model.name_or_path)
    return str(Path(name).resolve()) if name and Path(name).is_dir() else name


def example_prompts(processor: ProcessorMixin) -> dict[str, Tensor]:
    """Two prompts with a blank image each, to trace with: only shapes matter."""
    blank = Image.new("RGB", (64, 64))
    prompts = [f"{image_token(processor)} Describe the picture."] * 2
    inputs = processor(images=[blank, blank], text=prompts, return_tensors="pt")
    return dict(inputs)


def _export(
    exporter: OnnxExporter,
    model: PreTrainedModel,
    inputs: Mapping[str, Tensor | Cache],
    shapes: Mapping[str, object],
    options: OnnxOptions,
) -> ExportedComponent:
    config = OnnxConfig(
        dynamic_shapes=dict(shapes),
        opset_version=options.opset,
        optimize=False,
        quantizer=None if options.quantize is None else WeightOnly(options.quantize),
        # How grouped heads are repeated depends on strides, which would be guards.
        prefer_deferred_runtime_asserts_over_guards=PAST in inputs,
    )
    with graph_forward(model):
        program = exporter.export_program(model, dict(inputs), config)
    return ExportedComponent(*program)


def _fix_sizes(graph: onnx_ir.Graph, batch: int | None, prompt: int | None) -> None:
    """Make numbers of symbols, in all shapes of an ONNX graph."""
    [ids] = [value for value in graph.inputs if value.name == "input_ids"]
    assert ids.shape is not None
    sizes = zip(ids.shape, (batch, prompt), strict=True)
    known = {
        str(symbol.value): size
        for symbol, size in sizes
        if size is not None and not isinstance(symbol, int)
    }
    if not known:
        return
    made = (value for node in graph.all_nodes() for value in node.outputs)
    for value in (*graph.inputs, *made):
        if value.shape is not None:
            value.shape = value.shape.evaluate(known)


_NEW = 3
"""New tokens in the example of a decode graph: a number that is not another size's."""


def _decode_example(
    model: PreTrainedModel, samples: int, prompt: int
) -> tuple[dict[str, Tensor | Cache], dict[str, object]]:
    """New tokens on a ragged cache of prompts, and which of the dimensions vary."""
    layers = model.config.get_text_config().num_hidden_layers
    # Only the first layer's cache is as long as the mask: in any graph it is.
    cache = zero_cache(model, [prompt, *[prompt - 1] * (layers - 1)], samples)
    # The cache and the new tokens are two at least, or tracing takes them for one.
    batch, new, total = Dim("batch"), Dim("new"), Dim("total", min=4)
    lengths = [Dim(f"cached_{layer}") for layer in range(layers)]
    tokens = torch.zeros(samples, _NEW, dtype=torch.long, device=model.device)
    mask = torch.ones(samples, prompt + _NEW, dtype=torch.long, device=model.device)
    return (
        {
            "input_ids": tokens,
            "attention_mask": mask,
            "position_ids": tokens + prompt,
            PAST: cache,
        },
        {
            "input_ids": {0: batch, 1: new},
            "attention_mask": {0: batch, 1: total},
            "position_ids": {0: batch, 1: new},
            PAST: [
                {0: batch, 2: length} for length in lengths for _ in ("keys", "values")
            ],
        },
    )
