"""Accuracy against saved MACs, as a picture and as numbers."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vtprune_fx.errors import InputError
from vtprune_fx.files import MARK, check_output, replace_file
from vtprune_fx.plots import require_plots

if TYPE_CHECKING:
    from vtprune_fx.evaluation.results import Evaluation, Result

_MARKERS = {"fitprune": "o", "random": "s", "uniform": "^", "inverted": "v"}


_HEADS = ("recipe", "method", "questions", "accuracy", "low", "high", "macs_saved")
"""First columns of the numbers, by which a file of ours is known again."""


def check_curve(file: Path) -> None:
    """Check that ``draw_curve`` can write its two files, and replaces none of others.

    Args:
        file: The PNG file to write.

    Raises:
        InputError: One of them cannot be written, or is not one that it wrote.
        MissingDependencyError: matplotlib is not installed.
    """
    require_plots()
    numbers = _numbers(file)
    if numbers == file:
        raise InputError(
            f"output file {str(file)!r}",
            expected="a name that ends in .png",
            found="that of the file with the numbers",
            fix="Choose another name. Nothing was changed.",
        )
    check_output(file, "file", mark=MARK)
    check_output(numbers, "file", mark=",".join(_HEADS).encode())


def _numbers(file: Path) -> Path:
    return file.parent / f"{file.stem}.csv"


def draw_curve(evaluation: Evaluation, file: Path) -> Path:
    """Write the picture of an evaluation, and its numbers beside it.

    One line a method, from the dense model on, with 95 % intervals.

    Args:
        evaluation: At best several recipes a method.
        file: The PNG file to write; the CSV file has its name.

    Returns:
        The CSV file.

    Raises:
        InputError: A file cannot be written.
        MissingDependencyError: matplotlib is not installed.
    """
    png = io.BytesIO()
    _figure(evaluation).savefig(
        png, format="png", dpi=120, metadata={"Software": MARK.decode()}
    )
    numbers = _numbers(file)
    replace_file(numbers, _csv(evaluation).encode())
    replace_file(file, png.getvalue())
    return numbers


def _figure(evaluation: Evaluation) -> Any:
    figure = require_plots().Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    dense = evaluation.results[0]
    for method, results in _series(evaluation).items():
        line = sorted([dense, *results], key=lambda result: result.macs_saved)
        saved = [100 * result.macs_saved for result in line]
        accuracy = [100 * result.accuracy for result in line]
        spreads = [[100 * part for part in _spread(result)] for result in line]
        axes.errorbar(
            saved,
            accuracy,
            yerr=list(zip(*spreads, strict=True)),
            label=method,
            marker=_MARKERS.get(method, "D"),
            capsize=2,
        )
    axes.axhline(100 * dense.accuracy, color="grey", linewidth=0.8, linestyle=":")
    axes.set_xlabel("language model's prefill MACs saved, %")
    axes.set_ylabel("questions answered right, %")
    axes.set_title(f"{len(evaluation.questions)} questions, 95 % intervals")
    axes.grid(alpha=0.3)
    axes.legend(title="tokens chosen by")
    return figure


def _series(evaluation: Evaluation) -> dict[str, list[Result]]:
    series: dict[str, list[Result]] = {}
    for result in evaluation.results[1:]:
        series.setdefault(result.method, []).append(result)
    return series


def _spread(result: Result) -> tuple[float, float]:
    low, high = result.interval
    return result.accuracy - low, high - result.accuracy


def _csv(evaluation: Evaluation) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow((*_HEADS, "visual_tokens", "cache_bytes", *evaluation.kinds))
    for result in evaluation.results:
        shares = (result.accuracy, *result.interval, result.macs_saved)
        kinds = (evaluation.accuracy_of(result, kind) for kind in evaluation.kinds)
        writer.writerow(
            (
                result.recipe,
                result.method,
                len(result.right),
                *(f"{share:.4f}" for share in shares),
                f"{result.visual_tokens:.2f}",
                round(result.cache_bytes),
                *(f"{share:.4f}" for share in kinds),
            )
        )
    return text.getvalue()
