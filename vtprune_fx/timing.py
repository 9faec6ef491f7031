"""A model on a runtime, and how long prompts take to the first token there.

Dense and pruned are timed in turn: machines are shared and noisy, and two medians say
something about each other where both come from rounds in which one run followed the
other.
"""

from __future__ import annotations

import contextlib
import copy
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
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

ROUNDS = 7
"""Timed runs of each, after one that is not counted."""


def first_token_seconds(
    models: Mapping[str, Any], inputs: dict[str, Tensor], rounds: int = ROUNDS
) -> dict[str, list[float]]:
    """Seconds to the first token of each model, all in turn in every round.

    Vision tower included.

    Args:
        models: What has ``generate``, by name.
        inputs: Its arguments.
        rounds: How often.
    """
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(rounds):
        for name, model in models.items():
            start = time.perf_counter()
            model.generate(**inputs, max_new_tokens=1, do_sample=False)
            seconds[name].append(time.perf_counter() - start)
    return seconds


Stopwatch = Callable[[Recipe], float]
"""A recipe in, the share of the dense model's time that it saves out; medians.

Below 0 where it is slower.
"""


@contextlib.contextmanager
def stopwatch(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    inputs: dict[str, Tensor],
    dense: Recipe,
    target: Target,
) -> Iterator[Stopwatch]:
    """Measure recipes on a target.

    Args:
        model: An unmodified transformers model. Copies of it run; its weights are
            shared.
        processor: Its processor.
        inputs: One prompt, as the processor gives it.
        dense: A recipe for the model without cuts.
        target: Where.
    """
    # Each gets a copy: dense and pruned are there at once.
    weights = {id(parameter): parameter for parameter in model.parameters()}
    dense_model, ours = (copy.deepcopy(model, dict(weights)) for _ in range(2))
    with running(dense_model, processor, dense, target, inputs) as timed:

        def saved(recipe: Recipe) -> float:
            with running(ours, processor, recipe, target, inputs) as pruned_model:
                models = {"dense": timed, "pruned": pruned_model}
                first_token_seconds(models, inputs, 1)
                seconds = first_token_seconds(models, inputs)
            before, after = (statistics.median(seconds[name]) for name in models)
            return 1 - after / before

        yield saved


@contextlib.contextmanager
def running(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    recipe: Recipe,
    target: Target,
    example: dict[str, Tensor],
) -> Iterator[Any]:
    """A model as a recipe prunes it, on a runtime.

    Several recipes may run one after the other, and other models side by side.

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
