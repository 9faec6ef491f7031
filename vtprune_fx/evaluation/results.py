"""Accuracy and cost of a model, dense and pruned: results, intervals, tables."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from rich.box import SIMPLE_HEAD
from rich.table import Table

from vtprune_fx.reference.questions import Question


@dataclass(frozen=True)
class Result:
    """Answers and costs of all questions under one recipe.

    Attributes:
        recipe: Its name; ``dense`` where nothing is pruned.
        method: The recipe's method, or for a baseline its score.
        answers: One for each question.
        right: Which of them are right.
        macs_saved: Share of the language model's prefill, over all questions.
        visual_tokens: Kept after a layer, mean over layers and questions.
        cache_bytes: KV cache of a prompt, mean over questions.
    """

    recipe: str
    method: str
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
    """Questions, and the answers under every recipe.

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
        costs, kinds = (
            # Narrow enough for 80 columns.
            Table(box=SIMPLE_HEAD, caption=caption, padding=0)
            for caption in (
                "Intervals are of 95 %.",
                f"{len(self.questions)} questions",
            )
        )
        titles = ("accuracy", "interval", "change", "MACs\nsaved", "visual\ntokens")
        for table, more in ((costs, (*titles, "KV\nKiB")), (kinds, self.kinds)):
            table.add_column("recipe", overflow="fold")
            for title in more:
                table.add_column(title, justify="right", no_wrap=True)
        for result in self.results:
            low, high = result.interval
            change, spread = paired(self.results[0].right, result.right)
            label = self._label(result)
            costs.add_row(
                label,
                f"{100 * result.accuracy:.2f}",
                f"{100 * low:.1f}-{100 * high:.1f}",
                f"{100 * change:+.2f}±{100 * spread:.2f}",
                f"{100 * result.macs_saved:.1f}%",
                f"{result.visual_tokens:.1f}",
                f"{result.cache_bytes / 1024:.0f}",
            )
            shares = (self.accuracy_of(result, kind) for kind in self.kinds)
            kinds.add_row(label, *(f"{100 * share:.1f}" for share in shares))
        return costs, kinds

    def _label(self, result: Result) -> str:
        """The recipe's name, or a baseline's method, indented under its recipe."""
        for other in self.results:
            if result.recipe == f"{other.recipe}-{result.method}":
                return f"  {result.method}"
        return result.recipe

    def fields(self) -> dict[str, object]:
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

    def _fields_of(self, result: Result) -> dict[str, object]:
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
    scale = 1 + z * z / total
    return (middle - spread) / scale, (middle + spread) / scale


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
