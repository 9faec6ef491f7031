"""``vtprune eval``: how often a model is right, dense and pruned, and at what cost.

The questions are the reference model's (``vtprune_fx.reference``), drawn from a split
and a seed. An answer counts if it is the right one, word by word.
"""

from __future__ import annotations

import contextlib
import functools
import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from vtprune_fx import oracle
from vtprune_fx.errors import InputError
from vtprune_fx.evaluation.results import Evaluation, Result
from vtprune_fx.models.encoding import counted_positions, model_positions
from vtprune_fx.models.placeholders import is_visual
from vtprune_fx.models.prompts import Generates, batch_inputs
from vtprune_fx.recipes.counting import Cost, Geometry, cost
from vtprune_fx.recipes.schema import Recipe
from vtprune_fx.reference.questions import Sample
from vtprune_fx.timing import Target, running

BATCH = 32
"""Questions answered at once."""

NEW_TOKENS = 12
"""Tokens of an answer at most."""

Backend = Literal["torch", "compile", "onnx"]

Answerer = Callable[[dict[str, Tensor]], list[list[int]]]
"""Maps a processor's batch to the new ids of each sample."""


def evaluate(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    recipes: Sequence[Recipe],
    samples: Sequence[Sample],
    backend: Backend = "torch",
) -> Evaluation:
    """Ask all questions of the dense model and under each recipe.

    Args:
        model: An unmodified transformers model.
        processor: Its processor.
        recipes: Recipes to compare. Shares are turned to counts by the number of visual
            tokens in a prompt; prompts with the same number are answered together.
        samples: Pictures with one question each.
        backend: ``torch``: the eager oracle; ``compile``: ``torch.compile`` with
            inductor; ``onnx``: ONNX Runtime.

    Raises:
        InputError: The oracle cannot run the model.
        PlanError: The same, or a recipe does not fit the model.
    """
    results = []
    columns = ("{task.description}", BarColumn(), MofNCompleteColumn())
    console = Console(stderr=True)
    with Progress(*columns, TimeRemainingColumn(), console=console) as progress:
        for recipe in (recipes[0].keep_all(), *recipes):
            bar = progress.add_task(recipe.name, total=len(samples))
            moved = functools.partial(progress.update, bar)
            one = evaluate_one(model, processor, recipe, samples, backend, moved)
            results.append(one)
    questions = tuple(sample.questions[0] for sample in samples)
    return Evaluation(questions, tuple(results))


def evaluate_one(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    recipe: Recipe,
    samples: Sequence[Sample],
    backend: Backend = "torch",
    moved: Callable[..., None] = lambda completed: None,
) -> Result:
    """Ask all questions under one recipe.

    Args:
        model: As for ``evaluate``.
        processor: As for ``evaluate``.
        recipe: As for ``evaluate``.
        samples: As for ``evaluate``.
        backend: As for ``evaluate``.
        moved: Called with ``completed``, the number of questions answered so far.
    """
    asked = _Asked(model, processor, recipe)
    for group in _groups(samples):
        example = inputs_of(processor, [sample for _, sample in (group * 2)[:2]])
        bound = asked.bound(example)
        with _answerer(model, processor, bound, backend, example) as answer:
            for batch in _batches(group):
                asked.ask(batch, answer)
                moved(completed=len(asked.answers))
    return asked.result(samples)


class _Asked:
    """Answers under one recipe so far, by the index of the question."""

    def __init__(
        self, model: PreTrainedModel, processor: ProcessorMixin, recipe: Recipe
    ) -> None:
        self.recipe, self.processor = recipe, processor
        self.geometry = Geometry.from_config(model.config)
        self.config = model.config
        self.answers: dict[int, str] = {}
        self.costs: dict[int, Cost] = {}

    def bound(self, inputs: dict[str, Tensor]) -> Recipe:
        """The recipe for prompts with as many visual tokens as these."""
        visual = is_visual(inputs["input_ids"], self.config).sum(dim=1)
        return self.recipe.bound(int(visual[0]))

    def ask(self, samples: Sequence[tuple[int, Sample]], answer: Answerer) -> None:
        """Answer a batch, and count the cost of each of its prompts."""
        inputs = inputs_of(self.processor, [sample for _, sample in samples])
        rows = zip(inputs["input_ids"], inputs["attention_mask"], strict=True)
        for (index, _), new, row in zip(samples, answer(inputs), rows, strict=True):
            text = self.processor.decode(new, skip_special_tokens=True)
            self.answers[index] = str(text).strip()
            self.costs[index] = self._cost(*row)

    def _cost(self, ids: Tensor, mask: Tensor) -> Cost:
        visual = int(is_visual(ids, self.config).sum())
        return cost(self.recipe, self.geometry, visual, int(mask.sum()) - visual)

    def result(self, samples: Sequence[Sample]) -> Result:
        """The result, once all are answered."""
        answers = tuple(self.answers[index] for index in range(len(samples)))
        pairs = zip(answers, samples, strict=True)
        works = [spent.total for spent in self.costs.values()]
        left = [statistics.mean(spent.after) for spent in self.costs.values()]
        dense = sum(work.dense_macs for work in works)
        return Result(
            recipe=self.recipe.name,
            method=_method(self.recipe),
            answers=answers,
            right=tuple(said == sample.questions[0].answer for said, sample in pairs),
            macs_saved=1 - sum(work.pruned_macs for work in works) / dense,
            visual_tokens=statistics.mean(left),
            cache_bytes=statistics.mean(work.pruned_cache_bytes for work in works),
        )


def _method(recipe: Recipe) -> str:
    """The recipe's method, or for a baseline its score."""
    return recipe.score if recipe.method == "baseline" else recipe.method


def _groups(samples: Sequence[Sample]) -> list[list[tuple[int, Sample]]]:
    """Samples with one picture and samples with two, numbered."""
    groups: dict[int, list[tuple[int, Sample]]] = {}
    for index, sample in enumerate(samples):
        groups.setdefault(len(sample.pictures), []).append((index, sample))
    return list(groups.values())


def _batches(
    group: Sequence[tuple[int, Sample]],
) -> Iterator[Sequence[tuple[int, Sample]]]:
    """Batches of one size, the last filled up with samples before it.

    A graph compiled for one size serves them all.
    """
    for start in range(0, len(group), BATCH):
        last = max(0, min(start, len(group) - BATCH))
        yield group[last : last + BATCH]


def inputs_of(
    processor: ProcessorMixin, samples: Sequence[Sample]
) -> dict[str, Tensor]:
    """The samples' first questions as one batch, padded on the left."""
    return batch_inputs(
        processor,
        [
            (
                sample.questions[0].text,
                [Image.fromarray(p.pixels) for p in sample.pictures],
            )
            for sample in samples
        ],
    )


@contextlib.contextmanager
def _answerer(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    recipe: Recipe,
    backend: Backend,
    example: dict[str, Tensor],
) -> Iterator[Answerer]:
    if backend == "torch":
        yield _oracle(model, processor, recipe)
        return
    target = _TARGETS[backend]
    with running(model, processor, recipe, target, example) as there:
        yield functools.partial(_generate, there)


_TARGETS: dict[Backend, Target] = {"compile": "torch", "onnx": "onnx"}


def _oracle(
    model: PreTrainedModel, processor: ProcessorMixin, recipe: Recipe
) -> Answerer:
    if not isinstance(model, PreTrainedModel):
        raise InputError(
            "--backend torch",
            expected="a model of transformers",
            found=f"a {type(model).__name__}",
            fix="Evaluate this model with --backend compile or onnx.",
        )
    tokenizer: PreTrainedTokenizerBase = processor.tokenizer

    def answer(inputs: dict[str, Tensor]) -> list[list[int]]:
        positions = model_positions(model, inputs)
        if positions is None:
            positions = counted_positions(inputs["attention_mask"])
        samples = oracle.split_batch(model, **inputs, position_ids=positions)
        ends = (tokenizer.eos_token_id,)
        return [oracle.generate(model, recipe, s, NEW_TOKENS, ends) for s in samples]

    return answer


def _generate(model: Generates, inputs: dict[str, Tensor]) -> list[list[int]]:
    ids = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
    new: list[list[int]] = ids[:, inputs["input_ids"].shape[1] :].tolist()
    return new
