"""``vtprune fit``: recipes for a model and budgets, from calibration prompts.

A folder holds what belongs together: the statistics, which later runs reuse, and a
recipe and a picture for each budget. Of several processes each takes batches of its
own, and all come to the same recipes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import re
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TimeRemainingColumn,
)
from torch import Tensor
from transformers import PreTrainedModel, ProcessorMixin

from vtprune_fx import processes
from vtprune_fx.calibration import Calibration
from vtprune_fx.coalesce import attention_kept, coalesced, mean_kept
from vtprune_fx.collect import PARTS, STATISTICS, collect, origin, own_batches
from vtprune_fx.cost import Geometry, Work, cost
from vtprune_fx.curve import require_plots
from vtprune_fx.errors import InputError
from vtprune_fx.exact import Trials
from vtprune_fx.fit import Found, Prompts, Trial, check_budget, search
from vtprune_fx.inputs import replace_file
from vtprune_fx.observe import observed
from vtprune_fx.recipe import Provenance, Recipe
from vtprune_fx.statistics import Counts, Statistics, load_statistics

SUMMARY = "fit.json"
"""In a folder: its recipes, and what they save."""

STEPS, EXACT_STEPS = 12, 7
"""Halvings of the interval of tolerances; the published search makes 7."""

Count = Literal["all", "visual"]
"""Which tokens' MACs a budget is a share of."""


@dataclass(frozen=True)
class Options:
    """What ``vtprune fit`` was asked for.

    Attributes:
        budgets: Shares of the decoder's prefill MACs to save.
        count: Of all tokens' MACs, or of the visual tokens' alone, as the paper counts.
        exact: Recompute attention on the pruned sequence, as the published code does.
        max_cuts: Merge neighbouring cuts until there are at most so many.
        statistics: A file to use instead of the folder's own.
        model: What the user calls the model.
        command: The command line.
    """

    budgets: Sequence[float]
    count: Count = "all"
    exact: bool = False
    max_cuts: int | None = None
    statistics: Path | None = None
    model: str = "model"
    command: str = "vtprune_fx.fitting"


@dataclass(frozen=True)
class Fitted:
    """A recipe that meets a budget.

    Attributes:
        recipe: The recipe.
        budget: What was asked for.
        tolerance: The share of its attention that a layer may lose, alpha.
        saved: Share of the prefill's MACs that it saves on the calibration prompts.
        saved_visual: The same over the visual tokens alone.
        kept: Share of the attention that it keeps (``coalesce.mean_kept``).
        kept_before: The same of the recipe before cuts were merged.
    """

    recipe: Recipe
    budget: float
    tolerance: float
    saved: float
    saved_visual: float
    kept: float
    kept_before: float


def fit_recipes(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    calibration: Calibration,
    folder: Path,
    options: Options,
) -> list[Fitted]:
    """Fit recipes, and write them to a folder with their statistics.

    Args:
        model: An unmodified transformers model.
        processor: Its processor.
        calibration: The prompts.
        folder: New, empty, or written by this before.
        options: What is wanted.

    Raises:
        InputError: A budget or a prompt is not usable, the folder holds something else,
            or statistics are broken or of something else.
        MissingDependencyError: matplotlib is not installed.
    """
    check_request(folder, options)
    processes.wait_for_all()  # or one would see what another writes
    job = _Job(model, processor, calibration, folder, options)
    fitted = job.fitted()
    if processes.rank() == 0:
        _write(folder, fitted)
    return fitted


class _Job:
    """One call of ``fit_recipes``; its arguments are."""

    def __init__(
        self,
        model: PreTrainedModel,
        processor: ProcessorMixin,
        calibration: Calibration,
        folder: Path,
        options: Options,
    ) -> None:
        self.model, self.processor, self.calibration = model, processor, calibration
        self.folder, self.options = folder, options
        self.geometry = Geometry.from_config(model.config)

    def fitted(self) -> list[Fitted]:
        """A recipe for each budget."""
        statistics = self._statistics()
        text = statistics.text
        if self.options.count == "visual":
            text = torch.zeros_like(text)
        prompts = Prompts(statistics.visual, text)
        found = self._searched(statistics, prompts)
        return [
            self._made(budget, found[budget], statistics, prompts)
            for budget in self.options.budgets
        ]

    def _statistics(self) -> Statistics:
        if self.options.statistics is not None:
            source = origin(self.model, self.calibration)
            return load_statistics(self.options.statistics, source)
        samples = len(self.calibration)
        with _bar("statistics", samples) as (progress, task):
            return collect(
                self.model,
                self.processor,
                self.calibration,
                self.folder,
                lambda done: progress.update(task, completed=done),
            )

    def _searched(self, statistics: Statistics, prompts: Prompts) -> dict[float, Found]:
        budgets, counts = self.options.budgets, Counts(statistics)

        def estimated(wanted: Sequence[float]) -> dict[float, Found]:
            return search(counts, self.geometry, prompts, wanted, STEPS)

        if not self.options.exact:
            return estimated(budgets)
        with self._trials(statistics) as trials:
            return search(
                trials,
                self.geometry,
                prompts,
                budgets,
                EXACT_STEPS,
                estimate=lambda saved: estimated([saved])[saved].tolerance,
            )

    @contextlib.contextmanager
    def _trials(self, statistics: Statistics) -> Iterator[Trial]:
        """Trials on all processes' samples, each of which runs its own."""
        own = own_batches(self.calibration)
        cross, received = (
            s.double().sum(dim=2) for s in (statistics.cross, statistics.own)
        )
        with (
            tempfile.TemporaryDirectory() as scratch,
            observed(self.model),
            _bar("exact", None) as (progress, task),
        ):
            trials = Trials(self.model, Path(scratch))
            for samples in own:
                device = self.model.device
                inputs = self.calibration.inputs(self.processor, samples, device)
                rows = slice(samples.start, samples.stop)
                trials.add(inputs, cross[rows], received[rows])
            mine = [index for samples in own for index in samples]

            def of_all(tolerance: float) -> Iterator[Tensor]:
                progress.update(task, description=f"trial at alpha {tolerance:.4f}")
                for counts in trials(tolerance):
                    everybody = torch.zeros(len(self.calibration), dtype=torch.int64)
                    everybody[mine] = counts
                    yield processes.sum_of_all(everybody)
                    progress.advance(task)

            yield of_all

    def _made(
        self, budget: float, found: Found, statistics: Statistics, prompts: Prompts
    ) -> Fitted:
        kept = attention_kept(statistics, prompts.usual)
        drops, most = found.drops, self.options.max_cuts
        if most is not None:
            drops = coalesced(drops, most, kept, self.geometry, prompts, budget)
        recipe = dataclasses.replace(found, drops=drops).recipe(
            self._name(budget),
            self.geometry.layers,
            prompts.usual,
            Provenance(source=""),
        )
        works = [
            cost(recipe, self.geometry, visual, text)
            for visual, text in zip(
                statistics.visual.tolist(), statistics.text.tolist(), strict=True
            )
        ]
        fitted = Fitted(
            recipe,
            budget,
            found.tolerance,
            _saved([work.total for work in works]),
            _saved([work.visual for work in works]),
            mean_kept(kept, drops),
            mean_kept(kept, found.drops),
        )
        provenance = Provenance(
            source=self.options.command,
            model=self.options.model,
            note=self._note(fitted),
        )
        told = recipe.model_copy(update={"provenance": provenance})
        return dataclasses.replace(fitted, recipe=told)

    def _name(self, budget: float) -> str:
        """``fitprune-MODEL-60``, and what is unusual about it."""
        model = re.sub(r"[^a-z0-9.]+", "-", Path(self.options.model).name.lower())
        parts = ["fitprune", model.strip("-."), f"{100 * budget:g}"]
        parts += ["visual"] * (self.options.count == "visual")
        parts += ["exact"] * self.options.exact
        if self.options.max_cuts is not None:
            parts.append(f"{self.options.max_cuts}-cuts")
        return "-".join(filter(None, parts))

    def _note(self, fitted: Fitted) -> str:
        data = self.calibration
        mode = "exact search" if self.options.exact else "from statistics"
        note = (
            f"Alpha {fitted.tolerance:.4f}, {mode}; budget {fitted.budget:.1%} of the "
            f"prefill MACs of {self.options.count} tokens, reached {fitted.saved:.1%} "
            f"of all and {fitted.saved_visual:.1%} of the visual tokens'; "
            f"{len(data)} samples of {data.name}."
        )
        if fitted.kept != fitted.kept_before:
            note += (
                f" Cuts merged: {fitted.kept:.1%} of the attention kept instead of "
                f"{fitted.kept_before:.1%}."
            )
        return note


def _saved(works: Sequence[Work]) -> float:
    spent = sum(work.pruned_macs for work in works)
    return 1 - spent / sum(work.dense_macs for work in works)


@contextlib.contextmanager
def _bar(what: str, total: int | None) -> Iterator[tuple[Progress, TaskID]]:
    """A progress bar, of the first process alone."""
    columns = ("{task.description}", BarColumn(), MofNCompleteColumn())
    console = Console(stderr=True)
    shown = processes.rank() == 0
    with Progress(
        *columns, TimeRemainingColumn(), console=console, disable=not shown
    ) as progress:
        yield progress, progress.add_task(what, total=total)


def check_request(folder: Path, options: Options) -> None:
    """Refuse what can be refused without a model.

    Raises:
        InputError: A budget is no share, or the folder is a file or holds anything
            which ``fit_recipes`` did not write.
        MissingDependencyError: matplotlib is not installed.
    """
    for budget in options.budgets:
        check_budget(budget)
    require_plots()
    _check_folder(folder)


def _check_folder(folder: Path) -> None:
    if not folder.exists():
        return
    found: str | None = "a file"
    if folder.is_dir():
        entries = {path.name for path in folder.iterdir()}
        ours = {STATISTICS, PARTS, SUMMARY, *_listed(folder)}
        found = next(iter(sorted(entries - ours)), None)
    if found is not None:
        raise InputError(
            f"output folder {folder}",
            expected="a new or empty folder, or one that `vtprune fit` wrote",
            found=found,
            fix="Choose another folder. Nothing was changed.",
        )


def _listed(folder: Path) -> list[str]:
    """Files of the recipes that the folder's summary tells of."""
    return [f"{name}.{end}" for name in _read(folder) for end in ("json", "png")]


def _read(folder: Path) -> dict[str, dict[str, Any]]:
    """What the folder's summary tells, by the name of the recipe."""
    file = folder / SUMMARY
    if not file.exists():
        return {}
    try:
        told = json.loads(file.read_text(encoding="utf-8"))["recipes"]
        return {str(fields["recipe"]): dict(fields) for fields in told}
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise InputError(
            f"file {file}",
            expected="what `vtprune fit` wrote",
            found=f"{type(error).__name__}: {error}",
            fix="Choose another folder. Nothing was changed.",
        ) from error


def _write(folder: Path, fitted: Sequence[Fitted]) -> None:
    """Add recipes and pictures to the folder; those of other names stay."""
    told = _read(folder)
    for one in fitted:
        told[one.recipe.name] = dataclasses.asdict(one) | {"recipe": one.recipe.name}
    summary = json.dumps({"recipes": list(told.values())}, indent=1) + "\n"
    replace_file(folder / SUMMARY, summary.encode())
    for one in fitted:
        text = one.recipe.to_json()
        replace_file(folder / f"{one.recipe.name}.json", text.encode())
        replace_file(folder / f"{one.recipe.name}.png", draw_recipe(one.recipe))


def draw_recipe(recipe: Recipe) -> bytes:
    """A PNG picture of the visual tokens in and behind each layer of a model.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    left = recipe.tokens_per_layer(recipe.visual_tokens, recipe.layers)
    figure = require_plots().Figure(figsize=(8, 4), layout="constrained")
    axes = figure.add_subplot()
    axes.bar(range(recipe.layers), [recipe.visual_tokens, *left[:-1]], color="#d0d7e2")
    axes.bar(range(recipe.layers), left, color="#3b6ea5")
    axes.set_xlabel("decoder layer")
    axes.set_ylabel("visual tokens")
    axes.set_title(recipe.name)
    axes.legend(["enter the layer", "left behind its cut"])
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=120)
    return png.getvalue()
