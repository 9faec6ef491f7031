"""Exporting a pruned model to ONNX: a prefill graph and a decode graph.

Built on transformers' exporter; pruning slots in between its two steps, tracing and
conversion, by inheritance.
"""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Iterator, Mapping, MutableMapping
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch.export import Dim
from transformers import DynamicCache, PreTrainedModel, ProcessorMixin
from transformers.exporters import (
    DynamoExporter,
    ExportedComponent,
    ExportedModel,
    ExportFormat,
    ExportMetadata,
    OnnxConfig,
    OnnxExporter,
)

from vtprune_fx import capture
from vtprune_fx.capture import dynamic_shapes, images_as_one_sequence
from vtprune_fx.decoding import ragged_attention
from vtprune_fx.encoding import encoded, is_told_sizes
from vtprune_fx.errors import ExportError
from vtprune_fx.export.folder import check_free, written_at_once
from vtprune_fx.export.manifest import Manifest, hashes, versions
from vtprune_fx.export.onnx_model import require_onnxruntime
from vtprune_fx.inputs import image_token
from vtprune_fx.passes import prune_program
from vtprune_fx.recipe import Recipe
from vtprune_fx.report import PruneReport

OPSET = 20
"""Runs everywhere.

From opset 23 on attention is one node, whose scores nobody can read.
"""


class _Pruning(DynamoExporter):
    """Prunes what the exporter traced, ahead of the conversion."""

    recipe: Recipe | None = None
    report: PruneReport

    def export_program(
        self,
        model: PreTrainedModel,
        sample_inputs: MutableMapping[str, Any],
        config: Any,
    ) -> tuple[Any, ExportMetadata]:
        """As the base class, and pruned.

        Typed as widely as in ``HfExporter``: the ONNX exporter, which overrides this,
        takes a configuration of its own and returns an ONNX graph.
        """
        program, metadata = super().export_program(model, sample_inputs, config)
        pruned, self.report = prune_program(program, self.recipe)
        return pruned, metadata


class PrunedOnnxExporter(OnnxExporter, _Pruning):
    """transformers' ONNX exporter, pruning by a recipe.

    Args:
        recipe: What to cut, or None for the default that fits the model.
    """

    def __init__(self, recipe: Recipe | None) -> None:
        super().__init__()  # type: ignore[no-untyped-call] # not seen as transformers'
        self.recipe = recipe


def export_onnx(
    model: PreTrainedModel, inputs: Mapping[str, Any], recipe: Recipe | None
) -> tuple[ExportedModel, PruneReport]:
    """Export the graphs that generation needs.

    ``prefill`` takes what ``prefill_inputs`` gives, ids, mask, positions and pixels or
    features, and returns logits and a ragged cache; batch, prompt length and number of
    images are dynamic. ``decode`` takes one token and the cache, each layer's length a
    dimension of its own.

    Args:
        model: An unmodified transformers model.
        inputs: An example with an image, as the model's processor returns it.
        recipe: What to cut, or None for the default that fits the model.

    Raises:
        AnatomyError: The model has no visual tokens, or no decoder that can be pruned.
        PlanError: The recipe does not fit the model.
    """
    inputs = prefill_inputs(model, capture.example(inputs))
    # Behind cuts nearly every symbolic size is new: remembering fakes doubles the time.
    with torch._dynamo.config.patch(fake_tensor_cache_enabled=False), _quietly():
        exporter = PrunedOnnxExporter(recipe)
        with images_as_one_sequence(model):
            prefill = _export(exporter, model, inputs, dynamic_shapes(inputs))
        with ragged_attention(model):
            decode = _export(OnnxExporter(), model, *_decode_example(model, inputs))
    components = {"prefill": prefill, "decode": decode}
    exported = ExportedModel(
        components, ExportFormat.ONNX, model.config, model.generation_config
    )
    return exported, exporter.report


def prefill_inputs(model: PreTrainedModel, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """What an exported prefill graph takes, made of what a processor returned.

    Positions, and where a model's encoders are told sizes the features that they give
    (``encoding.encoded``).
    """
    with torch.no_grad():
        ready = encoded(model, inputs)
    if ready.get("position_ids") is None:
        ready["position_ids"] = (ready["attention_mask"].cumsum(1) - 1).clamp(min=0)
    return ready


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
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def write_onnx(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    recipe: Recipe | None,
    folder: Path,
    example: Mapping[str, Any] | None = None,
) -> PruneReport:
    """Export a model with its processor into a folder that ``load`` can run.

    Args:
        model: An unmodified transformers model.
        processor: Its processor.
        recipe: What to cut, or None for the default that fits the model.
        folder: New, empty, or an earlier export, which is replaced at the end.
        example: Two prompts to trace with, as the processor returns them; about a blank
            image each if left out. Prompts with fewer images may then be refused.

    Raises:
        InputError: The folder holds something else.
        ExportError: The model's encoders are told sizes, so that features depend on
            values.
        MissingDependencyError: The packages that write ONNX are not installed.
        AnatomyError: The model has no visual tokens, or no decoder that can be pruned.
        PlanError: The recipe does not fit the model.
    """
    require_onnxruntime()
    check_free(folder)
    inputs = example_prompts(processor) if example is None else example
    if is_told_sizes(model, inputs):
        raise ExportError(
            f"model {type(model).__name__}",
            expected="encoders that see pixels alone, to write as a graph",
            found="encoders that are told sizes of images",
            fix="Run it with vtprune_fx.compile, or take the graphs that "
            "vtprune_fx.export.export_onnx returns, which start with features.",
        )
    exported, report = export_onnx(model, inputs, recipe)
    assert report.plan is not None, "an exporter that does not prune raises"
    with written_at_once(folder) as scratch:
        exported.save_pretrained(scratch)
        processor.save_pretrained(scratch)
        Manifest(
            target="onnx",
            recipe=report.plan.recipe,
            visual_tokens=report.plan.visual_tokens,
            tokens_per_layer=report.visual_tokens,
            image_token_id=model.config.image_token_id,
            packages=versions(),
            files=hashes(scratch),
        ).write(scratch)
    return report


def example_prompts(processor: ProcessorMixin) -> dict[str, Any]:
    """Two prompts with a blank image each, to trace with: only shapes matter."""
    blank = Image.new("RGB", (64, 64))
    prompts = [f"{image_token(processor)} Describe the picture."] * 2
    inputs = processor(images=[blank, blank], text=prompts, return_tensors="pt")
    return dict(inputs)


def _export(
    exporter: OnnxExporter,
    model: PreTrainedModel,
    inputs: Mapping[str, Any],
    shapes: dict[str, Any],
) -> ExportedComponent:
    config = OnnxConfig(
        dynamic_shapes=shapes,
        opset_version=OPSET,
        optimize=False,
        # How grouped heads are repeated depends on strides, which would be guards.
        prefer_deferred_runtime_asserts_over_guards="past_key_values" in inputs,
    )
    return ExportedComponent(*exporter.export_program(model, dict(inputs), config))


def _decode_example(
    model: PreTrainedModel, inputs: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """One new token on a ragged cache, and which of its dimensions vary."""
    text = model.config.get_text_config()
    width = (
        getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    )
    samples, prompt = inputs["input_ids"].shape
    cache = DynamicCache()
    for layer in range(text.num_hidden_layers):
        # Only the first layer is as long as the mask: it stays so, the others vary.
        length = prompt - min(layer, 1)
        shape = (samples, text.num_key_value_heads, length, width)
        keys, values = torch.zeros(2, *shape, dtype=model.dtype, device=model.device)
        cache.update(keys, values, layer)
    batch, past = Dim("batch"), Dim("past", min=3)
    lengths = [Dim(f"cached_{layer}") for layer in range(text.num_hidden_layers)]
    token = torch.zeros(samples, 1, dtype=torch.long, device=model.device)
    mask = torch.ones(samples, prompt + 1, dtype=torch.long, device=model.device)
    return (
        {
            "input_ids": token,
            "attention_mask": mask,
            "position_ids": token + prompt,
            "past_key_values": cache,
        },
        {
            "input_ids": {0: batch},
            "attention_mask": {0: batch, 1: past},
            "position_ids": {0: batch},
            "past_key_values": [
                {0: batch, 2: length} for length in lengths for _ in ("keys", "values")
            ],
        },
    )
