"""How long prompts take to the first token: dense and pruned, timed in turn.

Machines are shared and noisy. Two medians say something about each other where both
come from rounds in which one run followed the other.
"""

from __future__ import annotations

import contextlib
import copy
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, ProcessorMixin

from vtprune_fx.recipes.schema import Recipe
from vtprune_fx.runtime import Target, running

ROUNDS = 7
"""Timed runs of each, behind one that is not counted."""


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
    # Each gets a copy of its own: dense and pruned are there at once.
    weights = {id(parameter): parameter for parameter in model.parameters()}
    whole, ours = (copy.deepcopy(model, dict(weights)) for _ in range(2))
    with running(whole, processor, dense, target, inputs) as timed:

        def saved(recipe: Recipe) -> float:
            with running(ours, processor, recipe, target, inputs) as pruned_model:
                models = {"dense": timed, "pruned": pruned_model}
                first_token_seconds(models, inputs, 1)
                seconds = first_token_seconds(models, inputs)
            before, after = (statistics.median(seconds[name]) for name in models)
            return 1 - after / before

        yield saved
