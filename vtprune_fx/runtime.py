"""A pruned model on one of the runtimes, for as long as something is measured there."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch._dynamo import config as dynamo_config
from transformers import PreTrainedModel, ProcessorMixin

from vtprune_fx.export import load, write_onnx
from vtprune_fx.generation.compile import pruned
from vtprune_fx.recipes.schema import Recipe

Target = Literal["torch", "onnx"]
"""``torch.compile`` with inductor, or ONNX Runtime."""


@contextlib.contextmanager
def running(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    recipe: Recipe,
    target: Target,
    example: dict[str, Tensor],
) -> Iterator[Any]:
    """A model as a recipe prunes it, on a runtime.

    Several recipes may run one after the other, and models of their own side by side.

    Args:
        model: An unmodified transformers model.
        processor: Its processor.
        recipe: What to cut.
        target: Where to run.
        example: A batch as the processor gives it, of two prompts or of one.

    Yields:
        What has transformers' ``generate``.
    """
    if target == "torch":
        # Graphs of other recipes count as recompilations of the same function, of which
        # torch allows eight. They are none, and have only the bound on all of them.
        most = dynamo_config.accumulated_recompile_limit
        with dynamo_config.patch(recompile_limit=most), pruned(model, recipe) as ours:
            yield ours
        return
    if len(example["input_ids"]) == 1:
        example = {name: torch.cat([value] * 2) for name, value in example.items()}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "onnx"
        write_onnx(model, processor, recipe, folder, example)
        yield load(folder)
