"""Prefill, dense against pruned, in one process: is the saved work saved time?

    python -m benchmarks.prefill --preset cpu-mid --threads 2 --json prefill.json
    python -m benchmarks.prefill --preset cpu-mid --threads 2 --freezing
    python -m benchmarks.prefill --preset llava-7b --device cuda --batch 8
    python -m benchmarks.prefill --preset small --sweep tokens
    python -m benchmarks.prefill --preset cpu-mid --runtime onnx
    python -m benchmarks.prefill --preset llava-7b --runtime tensorrt --device cuda

A model with random weights, 35 tokens of text, an image, 40 tokens of text. Run in
turn: the stock model compiled by inductor (dense), the same pruned by a recipe as
published, and with its cuts merged into six at most that save as much; beside them the
stock model and the oracle, which prunes as the published implementations do, both
eager.

Realisation is time saved over MACs saved, both as shares of the dense run's, of each
round by itself, and of the rounds the median: 1 is the limit. MACs are the decoder's,
so the vision tower, which no recipe touches, is timed by itself and taken off both.

``--schedule`` adds both with their counts as an input of the graph, as in
``vtprune_fx.compile``.

``--freezing`` is inductor's for inference, of the dense graph and of the pruned ones:
weights are packed once, which otherwise is a part of each matrix product.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime as dt
import functools
import json
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch._inductor.utils import fresh_cache
from torch.nn.functional import scaled_dot_product_attention
from torch.profiler import ProfilerActivity, profile

import vtprune_fx
from benchmarks import onnx_prefill, tensorrt_prefill
from benchmarks.presets import (
    PRESETS,
    TEXT_AFTER,
    TEXT_BEFORE,
    build,
    coalesced_recipe,
    prompt,
    realisation,
)
from vtprune_fx import oracle
from vtprune_fx.backend import vtprune_backend
from vtprune_fx.generation.counts import PromptCounts
from vtprune_fx.models.arguments import cache_of
from vtprune_fx.planning.report import PruneReport
from vtprune_fx.recipes.counting import Geometry, Work, cost
from vtprune_fx.recipes.default import default_recipe
from vtprune_fx.recipes.loading import load_recipe
from vtprune_fx.recipes.schema import Recipe

RUNTIMES = ("inductor", "eager", "onnx", "tensorrt")
"""``eager`` runs Dynamo's graphs, operator by operator."""

Run = Callable[[], Any]
console = Console()


@dataclass
class Measured:
    """One contestant.

    Attributes:
        cuts: Of its recipe.
        saved: Share of the decoder's MACs that the recipe saves.
        compile_seconds: Up to the end of the first run, without any cache.
        pass_seconds: Of them in vtprune's passes and verifier.
        seconds: Of each round.
        cache_bytes: Keys and values of all layers, as run.
        cache_predicted: The same as counted beforehand.
        operators: Milliseconds of a run in vtprune's operators; less what fused
            attention takes, where they do its work, too.
        peak_bytes: Of the device's memory in a run, on a GPU.
    """

    cuts: int = 0
    saved: float = 0.0
    compile_seconds: float | None = None
    pass_seconds: float | None = None
    seconds: list[float] = field(default_factory=list)
    cache_bytes: int | None = None
    cache_predicted: int | None = None
    operators: dict[str, float] = field(default_factory=dict)
    peak_bytes: int | None = None

    @property
    def median(self) -> float:
        """Seconds."""
        return statistics.median(self.seconds)


@dataclass(frozen=True)
class Size:
    """What a sweep changes; None is what the preset and the command line say.

    Attributes:
        tokens: Visual tokens.
        layers: Of the decoder.
        batch: Prompts.
    """

    tokens: int | None = None
    layers: int | None = None
    batch: int | None = None


SWEEPS: dict[str, Sequence[int]] = {
    "tokens": range(576, 2881, 576),
    "layers": (2, 4, 8, 16),
    "batch": (1, 2, 4, 8),
}
"""The field of ``Size`` that a sweep changes, and to what."""


class Bench:
    """A model, a prompt and what runs on them.

    Args:
        arguments: The command line's.
        size: What differs from it in a sweep.
    """

    def __init__(self, arguments: argparse.Namespace, size: Size) -> None:
        self.device: str = arguments.device
        dtype = torch.float32 if self.device == "cpu" else torch.bfloat16
        self.inner: str = arguments.runtime
        self.model = build(arguments.preset, self.device, dtype, size.layers)
        batch = size.batch or arguments.batch
        self.inputs = prompt(self.model, batch, size.tokens)
        self.geometry = Geometry.from_config(self.model.config)
        ids = self.inputs["input_ids"]
        self.visual = ids.shape[1] - TEXT_BEFORE - TEXT_AFTER
        for name in ("input_ids", "attention_mask"):
            torch._dynamo.mark_dynamic(self.inputs[name], 1)
        self.found: dict[str, Measured] = {}
        self.runs: dict[str, Run] = {}
        torch.compiler.reset()

    def work(self, recipe: Recipe) -> Work:
        """What the recipe makes of the prompt, counted."""
        return cost(recipe, self.geometry, self.visual, TEXT_BEFORE + TEXT_AFTER).total

    def forward(self, model: Callable[..., Any]) -> Any:
        """Run a prompt up to the first token's logits."""
        with torch.no_grad():
            outputs = model(**self.inputs, logits_to_keep=1)
        if self.device != "cpu":
            torch.cuda.synchronize()
        return outputs

    def add_compiled(
        self, name: str, recipe: Recipe | None, *, scheduled: bool = False
    ) -> None:
        """Compile the model with a recipe, or unpruned, and note what that takes.

        Args:
            name: Of the contestant.
            recipe: None for the dense model.
            scheduled: Let the recipe's numbers come with each run.
        """
        run = self.found[name] = Measured()
        reports: list[PruneReport] = []
        if recipe is None:
            model = torch.compile(self.model, backend=self.inner, fullgraph=True)
        else:
            options: Any = {"recipe": recipe, "on_report": reports.append}
            options["inner"] = self.inner
            if scheduled:
                counts = PromptCounts(recipe, self.visual, per_sample=False)
                layers = [cut.layer for cut in recipe.cuts]
                options["schedule"] = lambda: counts.schedule(layers)
            model = torch.compile(
                self.model, backend=vtprune_backend, options=options, fullgraph=True
            )
            run.cuts, run.saved = len(recipe.cuts), self.work(recipe).saved
        self.runs[name] = functools.partial(self.forward, model)
        with fresh_cache():
            start = time.perf_counter()
            outputs = self.runs[name]()
            run.compile_seconds = time.perf_counter() - start
        if reports:
            records = reports[0].passes
            run.pass_seconds = sum(r.seconds + r.verify_seconds for r in records)
        self._note_cache(run, cache_of(outputs), recipe)

    def add_engine(self, name: str, recipe: Recipe | None) -> None:
        """Build a TensorRT engine with a recipe, or of the unpruned model."""
        run = self.found[name] = Measured()
        if recipe is not None:
            run.cuts, run.saved = len(recipe.cuts), self.work(recipe).saved
        start = time.perf_counter()
        recipe = recipe or default_recipe(self.geometry.layers, self.visual).keep_all()
        self.runs[name] = tensorrt_prefill.engine(self.model, self.inputs, recipe)
        run.compile_seconds = time.perf_counter() - start

    def _note_cache(self, run: Measured, cache: Any, recipe: Recipe | None) -> None:
        layers = ((layer.keys, layer.values) for layer in cache.layers)
        run.cache_bytes = sum(t.nbytes for pair in layers for t in pair)
        work = self.work(recipe or default_recipe(self.geometry.layers, self.visual))
        each = work.pruned_cache_bytes if recipe else work.dense_cache_bytes
        run.cache_predicted = each * len(self.inputs["input_ids"])

    def add_eager(self, recipe: Recipe) -> None:
        """The stock model, and the oracle with a recipe; the vision tower alone."""
        self.runs["stock, eager"] = functools.partial(self.forward, self.model)
        self.found["stock, eager"] = Measured()
        if "pixel_values" not in self.inputs:
            return
        if len(self.inputs["input_ids"]) == 1:
            given = dict(self.inputs)
            [sample] = oracle.split_batch(self.model, **given)
            self.runs["oracle, eager"] = lambda: oracle.prefill(
                self.model, recipe, sample
            )
            saved = self.work(recipe).saved
            self.found["oracle, eager"] = Measured(len(recipe.cuts), saved)
        model: Any = self.model
        tower: Any = torch.compile(model.get_image_features)
        pixels = {"pixel_values": self.inputs["pixel_values"]}
        self.runs["vision tower"] = lambda: self._tower(tower, pixels)
        self.found["vision tower"] = Measured()

    def _tower(self, tower: Callable[..., Any], pixels: dict[str, Any]) -> None:
        with torch.no_grad():
            tower(**pixels)
        if self.device != "cpu":
            torch.cuda.synchronize()

    def time(self, rounds: int) -> None:
        """Run all in turn, after a first round that does not count."""
        for turn in track(range(rounds + 1), "rounds", console=console, transient=True):
            for name, run in self.runs.items():
                start = time.perf_counter()
                run()
                if turn:
                    self.found[name].seconds.append(time.perf_counter() - start)

    def profile(self) -> None:
        """Note the time in vtprune's operators, and the peak of memory."""
        for name, run in self.runs.items():
            measured = self.found[name]
            if self.device != "cpu":
                torch.cuda.reset_peak_memory_stats()
                run()
                measured.peak_bytes = torch.cuda.max_memory_allocated()
            if measured.compile_seconds is None or not measured.cuts:
                continue
            found = [self._operators(run) for _ in range(5)]
            measured.operators = {
                each: statistics.median(one[each] for one in found) for each in found[0]
            }

    def _operators(self, run: Run) -> dict[str, float]:
        activities = [ProfilerActivity.CPU]
        if self.device != "cpu":
            activities.append(ProfilerActivity.CUDA)
        with profile(activities=activities, record_shapes=True) as profiled:
            run()
        return _own_operators(profiled)


def _own_operators(profiled: profile) -> dict[str, float]:
    """Milliseconds in vtprune's operators, and, negative, in what one replaces."""
    spent: dict[str, float] = {}
    for event in profiled.key_averages(group_by_input_shape=True):
        if not event.key.startswith("vtprune::"):
            continue
        name = event.key.removeprefix("vtprune::")
        milliseconds = max(event.cpu_time_total, event.device_time_total) / 1e3
        spent[name] = spent.get(name, 0) + milliseconds
        if name == "attend_and_choose":
            # As attend_and_choose takes them.
            value, query = (tuple(event.input_shapes[at]) for at in (0, 5))
            instead = event.count * _fused_attention_ms(query, value)
            spent["fused attention"] = spent.get("fused attention", 0) - instead
    if not spent.keys().isdisjoint(("choose", "attend_and_choose")):
        # Called by them, and counted there.
        spent.pop("received", None)
    return spent


@functools.cache
def _fused_attention_ms(query: tuple[int, ...], value: tuple[int, ...]) -> float:
    """What PyTorch's attention takes on a CPU, with a causal mask as models have."""
    samples, heads, tokens, depth = query
    groups, wide = value[1], value[3]
    queries, keys, values = (
        torch.randn(samples, tokens, *shape).transpose(1, 2)
        for shape in ((heads, depth), (groups, depth), (groups, wide))
    )
    mask = torch.ones(samples, 1, tokens, tokens, dtype=torch.bool).tril()

    def spent() -> float:
        start = time.perf_counter()
        scaled_dot_product_attention(
            queries, keys, values, mask, enable_gqa=heads != groups
        )
        return 1e3 * (time.perf_counter() - start)

    return statistics.median(spent() for _ in range(9))


def warm_up(arguments: argparse.Namespace) -> None:
    """Keep what a process does once out of all compile times."""
    bench = Bench(arguments, Size(layers=2))
    for recipe in (None, default_recipe(bench.geometry.layers, bench.visual)):
        bench.add_compiled("", recipe)


def ms_per_token(bench: Bench, recipe: Recipe, steps: int) -> dict[str, float]:
    """Milliseconds per generated token, eager, dense and then pruned."""
    model, inputs = bench.model, dict(bench.inputs)

    def spent(new: int) -> float:
        start = time.perf_counter()
        with torch.no_grad():
            model.generate(  # type: ignore[operator] # a mixin's method
                **inputs, do_sample=False, min_new_tokens=new, max_new_tokens=new
            )
        return time.perf_counter() - start

    def each() -> float:
        spent(2)
        return statistics.median(
            (spent(1 + steps) - spent(1)) / steps for _ in range(3)
        )

    torch.compiler.reset()
    found = {"dense": each()}
    # The steps are timed alone, so no prompt has to be compiled.
    vtprune_fx.compile(model, recipe, inner="eager", decode=False)
    found["pruned"] = each()
    vtprune_fx.undo(model)
    return {name: 1e3 * seconds for name, seconds in found.items()}


def measured(arguments: argparse.Namespace, size: Size | None = None) -> Bench:
    """Compile, run and profile everything; of a sweep, only dense and as published.

    Args:
        arguments: The command line's.
        size: What differs from it, in a sweep.
    """
    bench = Bench(arguments, size or Size())
    recipe = (
        load_recipe(arguments.recipe)
        if arguments.recipe
        else default_recipe(bench.geometry.layers, bench.visual)
    )
    add = bench.add_engine if arguments.runtime == "tensorrt" else bench.add_compiled
    recipes: dict[str, Recipe | None] = {"dense": None, "published": recipe}
    if size is None:
        recipes["few"] = coalesced_recipe(recipe, bench.geometry, bench.visual)
    for name, cut in recipes.items():
        with console.status(f"compiling: {name}"):
            add(name, cut)
        if arguments.schedule and cut is not None:
            with console.status(f"compiling: {name}, scheduled"):
                bench.add_compiled(f"{name}, scheduled", cut, scheduled=True)
    if size is None:
        bench.add_eager(recipe)
    bench.time(arguments.rounds)
    bench.profile()
    return bench


# --------------------------------------------------------------------------- the tables


def table(bench: Bench, title: str) -> Table:
    """The measurements, one row for each contestant."""
    titles = ("", "cuts", "MACs", "ms", "spread", "time", "realisation", "ops ms")
    made = Table(title=title)
    for column in (*titles, "cache MiB", "counted", "compile s", "passes s"):
        made.add_column(column, justify="left" if not column else "right")
    tower = bench.found["vision tower"].median if "vision tower" in bench.found else 0.0
    dense = [seconds - tower for seconds in bench.found["dense"].seconds]
    for name, run in bench.found.items():
        share, reached = "", ""
        if name != "vision tower":
            decoder = [seconds - tower for seconds in run.seconds]
            pairs = zip(decoder, dense, strict=True)
            share = f"{statistics.median(a / b for a, b in pairs):.3f}"
            if run.saved:
                reached = f"{realisation(dense, decoder, run.saved):.2f}"
        made.add_row(
            name,
            str(run.cuts or ""),
            f"{1 - run.saved:.3f}" if run.saved else "",
            f"{1e3 * run.median:.0f}",
            f"{1e3 * min(run.seconds):.0f}-{1e3 * max(run.seconds):.0f}",
            share,
            reached,
            f"{sum(run.operators.values()):.1f}" if run.operators else "",
            _mebi(run.cache_bytes),
            _mebi(run.cache_predicted),
            "" if run.compile_seconds is None else f"{run.compile_seconds:.1f}",
            "" if run.pass_seconds is None else f"{run.pass_seconds:.2f}",
        )
    made.caption = "Shares of the dense decoder's MACs and time, the tower taken off."
    return made


def _mebi(count: int | None) -> str:
    return "" if count is None else f"{count / 2**20:.1f}"


def exponent(sizes: Sequence[int], seconds: list[float]) -> float:
    """By which power of the size the time grows: least squares of logarithms."""
    logs = (torch.tensor(each, dtype=torch.double).log() for each in (sizes, seconds))
    across, up = (each - each.mean() for each in logs)
    return float((across * up).sum() / across.square().sum())


def sweep(arguments: argparse.Namespace) -> dict[str, Any]:
    """Dense and pruned over what the sweep is of; exponents of the growth."""
    over: str = arguments.sweep
    sizes = SWEEPS[over]
    times: dict[str, list[float]] = {"dense": [], "published": []}
    for each in sizes:
        bench = measured(arguments, Size(**{over: each}))
        console.print(table(bench, f"{over}: {each}"))
        for name, row in times.items():
            row.append(bench.found[name].median)
    grown = {name: exponent(sizes, row) for name, row in times.items()}
    for name, power in grown.items():
        console.print(f"{name}: time grows with {over} to the power {power:.2f}")
    return {over: list(sizes), "seconds": times, "exponents": grown}


def _on_onnx_runtime(arguments: argparse.Namespace) -> dict[str, Any]:
    recipe = load_recipe(arguments.recipe) if arguments.recipe else None
    with contextlib.ExitStack() as stack:
        folder = arguments.folder or Path(stack.enter_context(TemporaryDirectory()))
        of = (folder, arguments.preset, recipe, arguments.threads, arguments.fused)
        found = onnx_prefill.measure(*of)
    console.print(*onnx_prefill.tables(found))
    return found


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", choices=PRESETS, default="cpu-mid")
    parser.add_argument("--recipe", help="shipped name or file; the default otherwise")
    parser.add_argument("--runtime", choices=RUNTIMES, default="inductor")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=2, help="of the CPU")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=0, help="time so many new tokens")
    parser.add_argument("--freezing", action="store_true", help="pack weights once")
    parser.add_argument(
        "--schedule", action="store_true", help="with counts as an input, besides"
    )
    parser.add_argument("--sweep", choices=SWEEPS, help="growth over one size")
    parser.add_argument("--fused", action="store_true", help="ONNX: with fusions too")
    parser.add_argument("--folder", type=Path, help="where ONNX graphs are kept")
    parser.add_argument("--json", type=Path, help="file for all numbers")
    arguments = parser.parse_args()
    if arguments.schedule and arguments.runtime not in ("inductor", "eager"):
        parser.error("--schedule takes --runtime inductor or eager")
    if arguments.runtime == "tensorrt" and arguments.device != "cuda":
        parser.error("--runtime tensorrt takes --device cuda")
    if arguments.freezing and arguments.runtime != "inductor":
        parser.error("--freezing is inductor's")
    return arguments


def main() -> None:
    """Measure, print, write."""
    arguments = _arguments()
    torch.set_num_threads(arguments.threads)
    torch._inductor.config.freezing = arguments.freezing
    if arguments.runtime in ("inductor", "eager"):
        with console.status("warming up"):
            warm_up(arguments)
    result: dict[str, Any] = {
        "date": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", "-m", "benchmarks.prefill", *sys.argv[1:]]),
        "torch": torch.__version__,
    }
    if arguments.runtime == "onnx":
        result |= _on_onnx_runtime(arguments)
    elif arguments.sweep:
        result |= sweep(arguments)
    else:
        bench = measured(arguments)
        frozen = ", weights frozen" if arguments.freezing else ""
        title = f"{arguments.preset}, batch {arguments.batch}{frozen}"
        console.print(table(bench, title))
        result["found"] = {name: asdict(run) for name, run in bench.found.items()}
        if arguments.steps:
            recipe = load_recipe(arguments.recipe) if arguments.recipe else None
            recipe = recipe or default_recipe(bench.geometry.layers, bench.visual)
            decode = ms_per_token(bench, recipe, arguments.steps)
            console.print(f"ms per new token, eager: {decode}")
            result["decode_ms"] = decode
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
