"""``vtprune eval``: how often a model is right, dense and pruned, and at what cost.

The questions are the reference model's (``vtprune_fx.reference``), drawn from a split
and a seed. An answer counts if it is the right one, word by word.
"""

from __future__ import annotations

import contextlib
import functools
import math
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn
from rich.table import Table
from torch import Tensor
from transformers import LlavaForConditionalGeneration, PreTrainedModel, ProcessorMixin

from vtprune_fx import oracle
from vtprune_fx.cost import Cost, Geometry, cost
from vtprune_fx.errors import InputError
from vtprune_fx.export import load, write_onnx
from vtprune_fx.generation import pruned
from vtprune_fx.recipe import Recipe
from vtprune_fx.reference.questions import Question, Sample, draw_samples

BATCH = 32
"""Questions answered at once."""

NEW_TOKENS = 12
"""Tokens of an answer at most."""

Backend = Literal["torch", "compile", "onnx"]

Answerer = Callable[[dict[str, Tensor]], list[list[int]]]
"""A processor's batch in, the new ids of each sample out."""


@dataclass(frozen=True)
class Result:
    """What one recipe did to all questions.

    Attributes:
        recipe: Its name; ``dense`` where nothing is pruned.
        score: What chose the tokens.
        answers: One a question.
        right: Which of them are.
        macs_saved: Share of the language model's prefill, over all questions.
        visual_tokens: Left after a layer, mean over layers and questions.
        cache_bytes: KV cache of a prompt, mean over questions.
    """

    recipe: str
    score: str
    answers: tuple[str, ...]
    right: tuple[bool, ...]
    macs_saved: float
    visual_tokens: float
    cache_bytes: float

    @property
    def accuracy(self) -> float:
        """Share of the questions that were answered right."""
        return sum(self.right) / len(self.right)

    @property
    def interval(self) -> tuple[float, float]:
        """The accuracy's 95 % interval."""
        return wilson(sum(self.right), len(self.right))


@dataclass(frozen=True)
class Evaluation:
    """Questions, and what every recipe answered.

    Attributes:
        questions: In the order in which they were drawn.
        results: The dense model's first.
    """

    questions: tuple[Question, ...]
    results: tuple[Result, ...]

    @property
    def kinds(self) -> list[str]:
        """Kinds of questions, in alphabetical order."""
        return sorted({question.kind for question in self.questions})

    def accuracy_of(self, result: Result, kind: str) -> float:
        """Share of one kind's questions that were answered right."""
        pairs = zip(self.questions, result.right, strict=True)
        right = [r for question, r in pairs if question.kind == kind]
        return sum(right) / len(right)

    def tables(self) -> tuple[Table, Table]:
        """Accuracy and cost of each recipe, and accuracy by kind."""
        costs = Table(box=SIMPLE_HEAD, caption="Intervals are of 95 %.")
        titles = ("accuracy", "interval", "change", "MACs\nsaved", "visual\ntokens")
        kinds = Table(box=SIMPLE_HEAD, caption=f"{len(self.questions)} questions")
        for table, more in ((costs, (*titles, "KV\nKiB")), (kinds, self.kinds)):
            table.add_column("recipe", overflow="fold")
            for title in more:
                table.add_column(title, justify="right", no_wrap=True)
        for result in self.results:
            low, high = result.interval
            change, spread = paired(self.results[0].right, result.right)
            costs.add_row(
                result.recipe,
                f"{100 * result.accuracy:.2f}",
                f"{100 * low:.1f}-{100 * high:.1f}",
                f"{100 * change:+.2f}±{100 * spread:.2f}",
                f"{100 * result.macs_saved:.1f}%",
                f"{result.visual_tokens:.1f}",
                f"{result.cache_bytes / 1024:.0f}",
            )
            shares = (self.accuracy_of(result, kind) for kind in self.kinds)
            kinds.add_row(result.recipe, *(f"{100 * share:.1f}" for share in shares))
        return costs, kinds

    def fields(self) -> dict[str, Any]:
        """Everything as plain data, answers included."""
        return {
            "results": [self._fields_of(result) for result in self.results],
            "questions": [
                {
                    "kind": question.kind,
                    "question": question.text,
                    "answer": question.answer,
                    "answers": {r.recipe: r.answers[i] for r in self.results},
                }
                for i, question in enumerate(self.questions)
            ],
        }

    def _fields_of(self, result: Result) -> dict[str, Any]:
        change, spread = paired(self.results[0].right, result.right)
        return {
            "recipe": result.recipe,
            "accuracy": result.accuracy,
            "accuracy_interval": result.interval,
            "change": change,
            "change_interval": (change - spread, change + spread),
            "by_kind": {kind: self.accuracy_of(result, kind) for kind in self.kinds},
            "macs_saved": result.macs_saved,
            "visual_tokens": result.visual_tokens,
            "cache_bytes": result.cache_bytes,
        }


def wilson(right: int, total: int) -> tuple[float, float]:
    """The 95 % interval of a share (Wilson 1927, the score interval)."""
    z, share = 1.96, right / total
    middle = share + z * z / (2 * total)
    spread = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    whole = 1 + z * z / total
    return (middle - spread) / whole, (middle + spread) / whole


def paired(before: Sequence[bool], after: Sequence[bool]) -> tuple[float, float]:
    """How a share changed between two answers to the same questions.

    Returns:
        The change, and half the width of its 95 % interval (normal, of the differences
        question by question: both models see the same hard questions).
    """
    total = len(before)
    differences = [int(b) - int(a) for a, b in zip(before, after, strict=True)]
    change = sum(differences) / total
    squares = sum((difference - change) ** 2 for difference in differences)
    return change, 1.96 * math.sqrt(squares) / total


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
        recipes: What to cut. Shares are turned to counts by the number of visual tokens
            that a prompt has; prompts with as many are answered together.
        samples: Pictures with one question each.
        backend: ``torch``: the eager oracle; ``compile``: ``torch.compile`` with
            inductor; ``onnx``: ONNX Runtime.

    Raises:
        InputError: The oracle does not know the model.
        PlanError: A recipe does not fit the model.
    """
    results = []
    columns = ("{task.description}", BarColumn(), MofNCompleteColumn())
    console = Console(stderr=True)
    with Progress(*columns, TimeRemainingColumn(), console=console) as progress:
        for recipe in (recipes[0].keep_all(), *recipes):
            bar = progress.add_task(recipe.name, total=len(samples))
            asked = _Asked(model, processor, recipe)
            for group in _groups(samples):
                example = inputs_of(processor, [sample for _, sample in group[:2]])
                bound = asked.bound(example)
                with _ANSWERERS[backend](model, processor, bound, example) as answer:
                    for batch in _batches(group):
                        asked.ask(batch, answer)
                        progress.update(bar, completed=len(asked.answers))
            results.append(asked.result(samples))
    questions = tuple(sample.questions[0] for sample in samples)
    return Evaluation(questions, tuple(results))


class _Asked:
    """The questions that one recipe has answered so far, by their index."""

    def __init__(
        self, model: PreTrainedModel, processor: ProcessorMixin, recipe: Recipe
    ) -> None:
        self.recipe, self.processor = recipe, processor
        self.geometry = Geometry.from_config(model.config)
        self.image_token: int = model.config.image_token_id
        self.answers: dict[int, str] = {}
        self.costs: dict[int, Cost] = {}

    def bound(self, inputs: dict[str, Tensor]) -> Recipe:
        """The recipe for prompts with as many visual tokens as these."""
        visual = (inputs["input_ids"] == self.image_token).sum(dim=1)
        return self.recipe.bound(int(visual[0]))

    def ask(self, samples: Sequence[tuple[int, Sample]], answer: Answerer) -> None:
        """Answer a batch, and count what each of its prompts costs."""
        inputs = inputs_of(self.processor, [sample for _, sample in samples])
        rows = zip(inputs["input_ids"], inputs["attention_mask"], strict=True)
        for (index, _), new, row in zip(samples, answer(inputs), rows, strict=True):
            text: Any = self.processor.decode(new, skip_special_tokens=True)
            self.answers[index] = text.strip()
            self.costs[index] = self._cost(*row)

    def _cost(self, ids: Tensor, mask: Tensor) -> Cost:
        visual = int((ids == self.image_token).sum())
        return cost(self.recipe, self.geometry, visual, int(mask.sum()) - visual)

    def result(self, samples: Sequence[Sample]) -> Result:
        """What it comes to, once all are answered."""
        answers = tuple(self.answers[index] for index in range(len(samples)))
        pairs = zip(answers, samples, strict=True)
        works = [spent.total for spent in self.costs.values()]
        left = [statistics.mean(spent.after) for spent in self.costs.values()]
        dense = sum(work.dense_macs for work in works)
        return Result(
            recipe=self.recipe.name,
            score=self.recipe.score,
            answers=answers,
            right=tuple(said == sample.questions[0].answer for said, sample in pairs),
            macs_saved=1 - sum(work.pruned_macs for work in works) / dense,
            visual_tokens=statistics.mean(left),
            cache_bytes=statistics.mean(work.pruned_cache_bytes for work in works),
        )


def _groups(samples: Sequence[Sample]) -> list[list[tuple[int, Sample]]]:
    """Samples with one picture and samples with two, numbered."""
    groups: dict[int, list[tuple[int, Sample]]] = {}
    for index, sample in enumerate(samples):
        groups.setdefault(len(sample.pictures), []).append((index, sample))
    return list(groups.values())


def _batches(
    group: Sequence[tuple[int, Sample]],
) -> Iterator[Sequence[tuple[int, Sample]]]:
    """Batches of one size, the last filled up from the ones ahead of it.

    A graph compiled for one size serves them all.
    """
    for start in range(0, len(group), BATCH):
        last = max(0, min(start, len(group) - BATCH))
        yield group[last : last + BATCH]


def inputs_of(
    processor: ProcessorMixin, samples: Sequence[Sample]
) -> dict[str, Tensor]:
    """The samples' first questions as one batch, padded on the left."""
    texts = []
    for sample in samples:
        content = [{"type": "image"} for _ in sample.pictures]
        text = {"type": "text", "text": sample.questions[0].text}
        turn: Any = {"role": "user", "content": [*content, text]}
        texts.append(processor.apply_chat_template([turn], add_generation_prompt=True))
    images = [Image.fromarray(p.pixels) for sample in samples for p in sample.pictures]
    inputs = processor(images=images, text=texts, return_tensors="pt", padding=True)
    return {name: inputs[name] for name in inputs}


@contextlib.contextmanager
def _with_oracle(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    recipe: Recipe,
    _: dict[str, Tensor],
) -> Iterator[Answerer]:
    if not isinstance(model, LlavaForConditionalGeneration):
        raise InputError(
            "--backend torch",
            expected="a LLaVA, the one model that the oracle knows",
            found=f"a {type(model).__name__}",
            fix="Evaluate this model with --backend compile or onnx.",
        )
    tokenizer: Any = processor.tokenizer

    def answer(inputs: dict[str, Tensor]) -> list[list[int]]:
        mask = inputs["attention_mask"]
        samples = oracle.split_batch(
            model, **inputs, position_ids=(mask.cumsum(1) - 1).clamp(min=0)
        )
        ends = (tokenizer.eos_token_id,)
        return [oracle.generate(model, recipe, s, NEW_TOKENS, ends) for s in samples]

    yield answer


@contextlib.contextmanager
def _with_compile(
    model: PreTrainedModel, _: ProcessorMixin, recipe: Recipe, __: dict[str, Tensor]
) -> Iterator[Answerer]:
    torch.compiler.reset()  # or the graphs of earlier recipes count as recompilations
    with pruned(model, recipe) as compiled:
        yield functools.partial(_generate, compiled)


@contextlib.contextmanager
def _with_onnx(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    recipe: Recipe,
    example: dict[str, Tensor],
) -> Iterator[Answerer]:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "onnx"
        write_onnx(model, processor, recipe, folder, example)
        yield functools.partial(_generate, load(folder))


_ANSWERERS = {"torch": _with_oracle, "compile": _with_compile, "onnx": _with_onnx}


def _generate(model: Any, inputs: dict[str, Tensor]) -> list[list[int]]:
    ids = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
    new: list[list[int]] = ids[:, inputs["input_ids"].shape[1] :].tolist()
    return new


def draw(split: str, seed: int, limit: int) -> list[Sample]:
    """The questions of a split and a seed, the first ``limit`` of them."""
    return list(draw_samples(split, seed, limit))
