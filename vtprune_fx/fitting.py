"""``vtprune fit``: recipes for a model and budgets, from calibration prompts.

A folder holds what belongs together: the statistics, which later runs reuse, and a
recipe and a picture for each budget. Of several processes each takes batches of its
own, and all come to the same recipes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import json
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
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
from vtprune_fx.calibration import Calibration, open_calibration
from vtprune_fx.coalesce import attention_kept, coalesced, mean_kept
from vtprune_fx.collect import PARTS, STATISTICS, collect, origin, own_batches
from vtprune_fx.cost import Geometry, Work, cost
from vtprune_fx.curve import require_plots
from vtprune_fx.errors import InputError, first_sentence
from vtprune_fx.exact import Trials
from vtprune_fx.export import require_onnxruntime
from vtprune_fx.fit import Account, Found, Prompts, Trial, check_budget, search
from vtprune_fx.inputs import open_checkpoint, replace_file
from vtprune_fx.latency import Stopwatch, stopwatch
from vtprune_fx.observe import observed
from vtprune_fx.recipe import Provenance, Recipe, default
from vtprune_fx.runtime import Target
from vtprune_fx.statistics import Counts, Statistics, load_statistics, observe

SUMMARY = "fit.json"
"""In a folder: its recipes, and what they save."""

STEPS, EXACT_STEPS = 12, 7
"""Halvings of the interval of tolerances; the published search makes 7."""

FEW_CUTS = (None, 6, 3)
"""The most cuts to try where time is measured: each costs a score and a gather."""

TRIES, NEAR, MOST, LEAST = 3, 0.02, 0.9, 0.1
"""Recipes timed for each of these, how near a budget is near, the most MACs to save,
and the least time that a share of them is taken to save."""

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
        latency: Where to measure, if budgets are shares of the time to the first token
            rather than of MACs.
        statistics: A file to use instead of the folder's own.
        model: What the user calls the model.
        command: The command line.
    """

    budgets: Sequence[float]
    count: Count = "all"
    exact: bool = False
    max_cuts: int | None = None
    latency: Target | None = None
    statistics: Path | None = None
    model: str = "model"
    command: str = "vtprune_fx.fitting"


@dataclass(frozen=True)
class Fitted:
    """A recipe that meets a budget.

    Attributes:
        recipe: The recipe.
        budget: What was asked for, of MACs or of time.
        tolerance: The share of its attention that a layer may lose, alpha.
        saved: Share of the prefill's MACs that it saves on the calibration prompts.
        saved_visual: The same over the visual tokens alone.
        kept: Share of the attention that it keeps (``coalesce.mean_kept``).
        kept_before: The same of the recipe before cuts were merged.
        saved_time: Share of the time to the first token that it saves, where measured.
    """

    recipe: Recipe
    budget: float
    tolerance: float
    saved: float
    saved_visual: float
    kept: float
    kept_before: float
    saved_time: float | None = None


@dataclass(frozen=True)
class Request:
    """What ``vtprune fit`` opens.

    Attributes:
        model: A checkpoint folder or a hub id.
        data: What ``open_calibration`` takes.
        limit: Samples at most.
        device: Of torch, or None for a GPU if there is one.
        dtype: Of the weights, a name of torch.
    """

    model: str
    data: str
    limit: int = 64
    device: str | None = None
    dtype: str = "float32"


def fit_request(request: Request, folder: Path, options: Options) -> list[Fitted]:
    """Open a model and its calibration prompts, and fit recipes.

    What can be refused is refused ahead of anything slow.

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
    with processes.joined():
        fitted = fit_recipes(model, processor, calibration, folder, options)
        return [] if processes.rank() else fitted


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
            fix="Name cpu, or leave it out.",
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
        return [self._told(one) for one in made(statistics, prompts)]

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
        dense = default(self.geometry.layers, prompts.usual).keep_all()
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
        """Trials on all processes' samples, each of which runs its own."""
        own = own_batches(self.calibration)
        cross, received = (
            s.double().sum(dim=2) for s in (statistics.cross, statistics.own)
        )
        with observed(self.model), _bar("exact", None) as (progress, task):
            for samples in own:
                inputs = functools.partial(self._inputs, samples)
                trials.add(samples[0], inputs, cross[samples], received[samples])
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

    def _told(self, fitted: Fitted) -> Fitted:
        """With the recipe's name, and where it is from."""
        provenance = Provenance(
            source=self.options.command,
            model=self.options.model,
            note=self._note(fitted),
        )
        told = {"name": self._name(fitted.budget), "provenance": provenance}
        return dataclasses.replace(fitted, recipe=fitted.recipe.model_copy(update=told))

    def _name(self, budget: float) -> str:
        """``fitprune-MODEL-60``, and what is unusual about it."""
        model = re.sub(r"[^a-z0-9.]+", "-", Path(self.options.model).name.lower())
        parts = ["fitprune", model.strip("-."), f"{100 * budget:g}"]
        parts += ["visual"] * (self.options.count == "visual")
        parts += ["exact"] * self.options.exact
        parts += [self.options.latency] if self.options.latency else []
        if self.options.max_cuts is not None:
            parts.append(f"{self.options.max_cuts}-cuts")
        return "-".join(filter(None, parts))

    def _note(self, fitted: Fitted) -> str:
        data = self.calibration
        mode = "exact search" if self.options.exact else "from statistics"
        of = f"the prefill MACs of {self.options.count} tokens"
        if fitted.saved_time is not None:
            of = f"the time to the first token with {self.options.latency}"
        note = (
            f"Alpha {fitted.tolerance:.4f}, {mode}; budget {fitted.budget:.1%} of "
            f"{of}, reached {fitted.saved:.1%} of the MACs of all and "
            f"{fitted.saved_visual:.1%} of those of visual tokens; "
            f"{len(data)} samples of {data.name}."
        )
        if fitted.saved_time is not None:
            note += f" Measured: {fitted.saved_time:.1%} of the time saved."
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
    if options.latency is not None:
        _check_measurable(options)
    require_plots()
    _check_folder(folder)


def _check_measurable(options: Options) -> None:
    found = None
    if options.exact:
        found = "an exact search, which takes minutes for each recipe to time"
    if processes.count() > 1:
        found = f"{processes.count()} processes, which would disturb each other"
    if found is not None:
        raise InputError(
            "option --latency",
            expected="recipes found from statistics, by one process",
            found=found,
            fix="Fit to MACs, or leave the other option out. Statistics that several "
            "processes took can be given with --statistics.",
        )
    if options.latency == "onnx":
        require_onnxruntime()


def enough_time(
    timed: Callable[[float, int | None], Fitted],
    budget: float,
    limits: Sequence[int | None],
) -> Fitted:
    """Of recipes that save enough time, the one that keeps most attention.

    For each limit of cuts a few shares of the MACs are tried: one as large as the
    budget, one larger by what that misses, and then along the line through both.

    Args:
        timed: A share of the MACs and the most cuts in, what was made and timed out.
        budget: Share of the time to save.
        limits: The most cuts to try, None for any number.

    Raises:
        InputError: None does.
    """
    tried: list[Fitted] = []
    for cuts in limits:
        share, slope = budget, 1.0
        before: tuple[float, float] | None = None
        for _ in range(TRIES):
            tried.append(timed(share, cuts))
            time = tried[-1].saved_time or 0.0
            if budget <= time <= budget + NEAR:
                break
            if before is not None and share != before[0]:
                slope = max(LEAST, (time - before[1]) / (share - before[0]))
            before = (share, time)
            share = min(share + (budget + NEAR / 2 - time) / slope, MOST)
    enough = [one for one in tried if (one.saved_time or 0.0) >= budget]
    if not enough:
        most = max(one.saved_time or 0.0 for one in tried)
        raise InputError(
            f"budget {budget}",
            expected="a share of the time that a recipe saves here",
            found=f"{most:.1%} saved by the fastest of {len(tried)}",
            fix="Ask for less. Small models spend their time outside the arithmetic.",
        )
    best = max(enough, key=lambda one: one.kept)
    return dataclasses.replace(best, budget=budget)


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
