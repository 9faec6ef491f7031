"""``vtprune fit``: recipes for a model and budgets, from calibration prompts.

A folder holds what belongs together: the statistics, which later runs reuse, and a
recipe and a picture for each budget. Of several processes each takes some of the
batches, and all find the same recipes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

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

from vtprune_fx.errors import InputError, first_sentence
from vtprune_fx.export import require_onnxruntime
from vtprune_fx.fitting import distributed
from vtprune_fx.fitting.attention_statistics import (
    Counts,
    Statistics,
    load_statistics,
    observe,
)
from vtprune_fx.fitting.by_latency import enough_time
from vtprune_fx.fitting.calibration import Calibration, open_calibration
from vtprune_fx.fitting.coalesce import attention_kept, coalesced, mean_kept
from vtprune_fx.fitting.collect import batches_here, collect, origin
from vtprune_fx.fitting.exact import Trials
from vtprune_fx.fitting.naming import named
from vtprune_fx.fitting.observe import observed
from vtprune_fx.fitting.options import Fitted, Options, Request
from vtprune_fx.fitting.output import check_folder, write_fitted
from vtprune_fx.fitting.search import (
    Account,
    Found,
    Prompts,
    Trial,
    check_budget,
    search,
)
from vtprune_fx.models.loading import open_checkpoint
from vtprune_fx.plots import require_plots
from vtprune_fx.recipes.counting import Geometry, Work, cost
from vtprune_fx.recipes.default import default_recipe
from vtprune_fx.recipes.schema import Provenance
from vtprune_fx.timing import Stopwatch, stopwatch

STEPS, EXACT_STEPS = 12, 7
"""Halvings of the interval of tolerances; the published search makes 7."""


FEW_CUTS = (None, 6, 3)
"""The most cuts to try where time is measured: each costs a score and a gather."""


def fit_request(request: Request, folder: Path, options: Options) -> list[Fitted]:
    """Open a model and its calibration prompts, and fit recipes.

    Arguments are checked before anything slow.

    Args:
        request: What to open.
        folder: As for ``fit_recipes``.
        options: As for ``fit_recipes``.

    Returns:
        The recipes; nothing in all processes but the first.

    Raises:
        VtpruneError: As for ``fit_recipes``, or something that was named is not there.
    """
    check_request(folder, options)
    device = _device(request.device)
    calibration = open_calibration(request.data, request.limit)
    dtype = getattr(torch, request.dtype)
    model, processor = open_checkpoint(request.model, dtype)
    options = dataclasses.replace(options, model=request.model)
    model.to(device)  # type: ignore[arg-type] # transformers' wrapper
    with distributed.joined():
        fitted = fit_recipes(model, processor, calibration, folder, options)
        return [] if distributed.rank() else fitted


def _device(name: str | None) -> torch.device:
    """A device that is there."""
    named = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=named).device
    except (RuntimeError, AssertionError) as error:  # unknown; torch built without it
        raise InputError(
            f"device {named!r}",
            expected="a device of torch that this machine has",
            found=first_sentence(error),
            fix="Name cpu, or omit it.",
        ) from error


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
        options: Options of the fit.

    Raises:
        InputError: A budget or a prompt is not usable, the folder holds something else,
            or statistics are broken or of something else.
        MissingDependencyError: matplotlib is not installed.
    """
    check_request(folder, options)
    distributed.wait_for_all()  # or one would see what another writes
    job = _Job(model, processor, calibration, folder, options)
    fitted = job.fitted()
    if distributed.rank() == 0:
        write_fitted(folder, fitted)
    return fitted


class _Job:
    """State of one ``fit_recipes`` call."""

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
        self.trials: Trials | None = None

    def fitted(self) -> list[Fitted]:
        """A recipe for each budget."""
        with tempfile.TemporaryDirectory() as scratch:
            if self.options.exact:
                self.trials = Trials(self.model, Path(scratch))
            return self._fitted(self._statistics())

    def _fitted(self, statistics: Statistics) -> list[Fitted]:
        text = statistics.text
        if self.options.count == "visual":
            text = torch.zeros_like(text)
        prompts = Prompts(statistics.visual, text)
        made = self._measured if self.options.latency else self._counted
        return [self._named(one) for one in made(statistics, prompts)]

    def _named(self, fitted: Fitted) -> Fitted:
        return named(fitted, self.options, self.calibration)

    def _counted(self, statistics: Statistics, prompts: Prompts) -> list[Fitted]:
        """Recipes that save shares of the MACs."""
        found = self._searched(statistics, prompts)
        most = self.options.max_cuts
        return [
            self._made(budget, found[budget], statistics, prompts, most)
            for budget in self.options.budgets
        ]

    def _measured(self, statistics: Statistics, prompts: Prompts) -> list[Fitted]:
        """Recipes that save shares of the time."""
        counts, most = Counts(statistics), self.options.max_cuts
        reach = Account(self.geometry, prompts).at_most()
        with self._stopwatch(prompts) as saved, _bar("timed", None) as (bar, task):

            def timed(share: float, cuts: int | None) -> Fitted:
                share = min(share, reach)
                found = search(counts, self.geometry, prompts, [share], STEPS)[share]
                one = self._made(share, found, statistics, prompts, cuts)
                what = f"{share:.1%} of the MACs, {len(one.recipe.cuts)} cuts"
                bar.update(task, description=what)
                one = dataclasses.replace(one, saved_time=saved(one.recipe))
                bar.advance(task)
                return one

            limits = FEW_CUTS if most is None else (most,)
            return [enough_time(timed, b, limits) for b in self.options.budgets]

    def _stopwatch(self, prompts: Prompts) -> AbstractContextManager[Stopwatch]:
        assert self.options.latency is not None
        first = int((prompts.visual == prompts.usual).nonzero()[0])
        prompt = range(first, first + 1)
        inputs = self._inputs(prompt)
        dense = default_recipe(self.geometry.layers, prompts.usual).keep_all()
        target = self.options.latency
        return stopwatch(self.model, self.processor, inputs, dense, target)

    def _statistics(self) -> Statistics:
        source = origin(self.model, self.calibration)
        if self.options.statistics is not None:
            return load_statistics(self.options.statistics, source)
        samples = len(self.calibration)
        with observed(self.model), _bar("statistics", samples) as (progress, task):
            return collect(
                self._observed,
                self.calibration,
                self.folder,
                source,
                lambda done: progress.update(task, completed=done),
            )

    def _observed(self, samples: Sequence[int]) -> Statistics:
        """Statistics of a batch; trials, if there are any, start from the same run."""
        inputs, trials = self._inputs(samples), self.trials
        with trials.starting(samples[0]) if trials else contextlib.nullcontext():
            return observe(self.model, inputs)

    def _inputs(self, samples: Sequence[int]) -> dict[str, Tensor]:
        return self.calibration.inputs(self.processor, samples, self.model.device)

    def _searched(self, statistics: Statistics, prompts: Prompts) -> dict[float, Found]:
        budgets, counts = self.options.budgets, Counts(statistics)

        def estimated(wanted: Sequence[float]) -> dict[float, Found]:
            return search(counts, self.geometry, prompts, wanted, STEPS)

        if self.trials is None:
            return estimated(budgets)
        with self._of_all(self.trials, statistics) as trial:
            return search(
                trial,
                self.geometry,
                prompts,
                budgets,
                EXACT_STEPS,
                estimate=lambda saved: estimated([saved])[saved].tolerance,
            )

    @contextlib.contextmanager
    def _of_all(self, trials: Trials, statistics: Statistics) -> Iterator[Trial]:
        """Trials on the samples of all processes, each of which runs its share."""
        batches = batches_here(self.calibration)
        cross, received = (
            s.double().sum(dim=2) for s in (statistics.cross, statistics.own)
        )
        with observed(self.model), _bar("exact", None) as (progress, task):
            for samples in batches:
                inputs = functools.partial(self._inputs, samples)
                trials.add(samples[0], inputs, cross[samples], received[samples])
            mine = [index for samples in batches for index in samples]

            def of_all(tolerance: float) -> Iterator[Tensor]:
                progress.update(task, description=f"trial at alpha {tolerance:.4f}")
                for counts in trials(tolerance):
                    every = torch.zeros(len(self.calibration), dtype=torch.int64)
                    every[mine] = counts
                    yield distributed.sum_of_all(every)
                    progress.advance(task)

            yield of_all

    def _made(
        self,
        budget: float,
        found: Found,
        statistics: Statistics,
        prompts: Prompts,
        most: int | None,
    ) -> Fitted:
        kept = attention_kept(statistics, prompts.usual)
        drops = found.drops
        if most is not None:
            drops = coalesced(drops, most, kept, self.geometry, prompts, budget)
        recipe = dataclasses.replace(found, drops=drops).recipe(
            "fitprune",
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
        return Fitted(
            recipe,
            budget,
            found.tolerance,
            _saved([work.total for work in works]),
            _saved([work.visual for work in works]),
            mean_kept(kept, drops),
            mean_kept(kept, found.drops),
        )


def _saved(works: Sequence[Work]) -> float:
    spent = sum(work.pruned_macs for work in works)
    return 1 - spent / sum(work.dense_macs for work in works)


@contextlib.contextmanager
def _bar(what: str, total: int | None) -> Iterator[tuple[Progress, TaskID]]:
    """A progress bar, of the first process alone."""
    columns = ("{task.description}", BarColumn(), MofNCompleteColumn())
    console = Console(stderr=True)
    shown = distributed.rank() == 0
    with Progress(
        *columns, TimeRemainingColumn(), console=console, disable=not shown
    ) as progress:
        yield progress, progress.add_task(what, total=total)


def check_request(folder: Path, options: Options) -> None:
    """Check the arguments before a model is loaded.

    Raises:
        InputError: A budget is no share, or the folder is a file or holds anything
            which ``fit_recipes`` did not write.
        MissingDependencyError: matplotlib is not installed.
    """
    for budget in options.budgets:
        check_budget(budget)
    if options.latency is not None:
        _check_measurable(options)
    require_plots()
    check_folder(folder)


def _check_measurable(options: Options) -> None:
    found = None
    if options.exact:
        found = "an exact search, which takes minutes for each recipe to time"
    if distributed.count() > 1:
        found = f"{distributed.count()} processes, which would disturb each other"
    if found is not None:
        raise InputError(
            "option --latency",
            expected="recipes found from statistics, by one process",
            found=found,
            fix="Fit to MACs, or omit the other option. Statistics that several "
            "processes took can be given with --statistics.",
        )
    if options.latency == "onnx":
        require_onnxruntime()
