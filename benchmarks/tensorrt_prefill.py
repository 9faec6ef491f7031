"""Prefill on TensorRT, for ``benchmarks.prefill --runtime tensorrt``. Needs a GPU."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.exporters import ExportedModel

from vtprune_fx.export.tensorrt_model import TensorRTRunner
from vtprune_fx.export.tensorrt_profile import EngineSizes, Span
from vtprune_fx.export.to_onnx import export_onnx
from vtprune_fx.export.to_tensorrt import build_engines, engines_of
from vtprune_fx.models.encoding import FEATURES, prefill_inputs
from vtprune_fx.recipes.schema import Recipe

NEW_TOKENS = 8
"""That the decode engine, which is not timed, has room for."""


def engine(
    model: PreTrainedModel, inputs: Mapping[str, Any], recipe: Recipe
) -> Callable[[], None]:
    """Build engines for prompts of one size.

    Returns:
        What runs a prompt, and returns when the GPU is done.

    Raises:
        ExportError: TensorRT does not take a graph, or there is no GPU to run on.
    """
    prefill = built(model, inputs, recipe).components["prefill"]
    run = TensorRTRunner.from_program(prefill.program, prefill.metadata)
    return functools.partial(_run, run, prefill_inputs(model, inputs))


def built(
    model: PreTrainedModel, inputs: Mapping[str, Any], recipe: Recipe
) -> ExportedModel:
    """Both engines, for the GPU that there is; without one, for an RTX 4090."""
    capability = None if torch.cuda.is_available() else "8.9"
    exported, _ = export_onnx(model, inputs, recipe)
    sizes = sizes_of(model, inputs)
    return engines_of(exported, build_engines(exported, sizes, capability), sizes)


def sizes_of(model: PreTrainedModel, inputs: Mapping[str, Any]) -> EngineSizes:
    """The sizes of these prompts, and no others."""
    ids, config = inputs["input_ids"], model.config
    batch, tokens = ids.shape
    # Of a prompt: pixels have a row for each image, features one for each visual token.
    rows = (
        int((ids == config.image_token_id).sum())
        if FEATURES in inputs
        else len(inputs["pixel_values"])
    )
    one, prompt, images = (Span(n, n, n) for n in (batch, tokens, rows // batch))
    return EngineSizes(one, prompt, images, NEW_TOKENS)


def _run(run: TensorRTRunner, given: dict[str, Any]) -> None:
    run(**given)
    torch.cuda.synchronize()
