"""FitPrune's recipe search: ours against the published procedure, on one model.

    python benchmarks/fit_search.py [--models reference narrow] [--rounds 3]
        [--json FILE]

``published`` below is written down from the published procedure: one sample at a time,
every layer recomputed for every tolerance, complete attention maps, a Python loop over
the candidates to drop with a sum for each. In one respect it is ours, or there would be
no common result: it returns the smallest tolerance whose recipe meets the budget
rather than the last one tried, and counts what the recipe saves. Every recipe of the
exact mode is compared with its result; a difference is an error.

Times are seconds of the processor, which other programs disturb less than the clock's,
on one thread: medians of rounds in which one search follows the other. Model and
prompts are loaded; the vision tower is included, and statistics are taken anew for each
search of ours. Only ratios mean anything. ``reference`` is the reference model;
``narrow`` has LLaVA-1.5's 32 layers and 576 visual tokens.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig
from transformers import LlavaForConditionalGeneration as Llava

from vtprune_fx import oracle
from vtprune_fx.fitting.attention_statistics import Counts, Statistics, merged, observe
from vtprune_fx.fitting.calibration import open_calibration
from vtprune_fx.fitting.exact import Trials
from vtprune_fx.fitting.observe import observed
from vtprune_fx.fitting.search import Account, Found, Prompts, search
from vtprune_fx.models.loading import open_checkpoint
from vtprune_fx.oracle import pruner
from vtprune_fx.oracle.decoder import Decoder, Heads
from vtprune_fx.recipes.counting import Geometry
from vtprune_fx.reference import CHECKPOINT

BUDGETS = (0.6, 0.3, 0.4, 0.5, 0.7)
"""The first is what exact searches for one budget are compared on."""
STEPS, EXACT_STEPS = 12, 7
BATCH = 8

Inputs = dict[str, Tensor]


# ------------------------------------------------------- the published procedure


@torch.no_grad()
def published(
    model: Llava, samples: Sequence[oracle.Sample], prompts: Prompts, budget: float
) -> Found:
    """The recipe for a budget, as the published code searches it.

    Args:
        model: A LLaVA, running (``Decoder.running``).
        samples: Calibration prompts, without padding.
        prompts: The same, for what they cost.
        budget: Share of the MACs to save.
    """
    geometry = Geometry.from_config(model.config)
    layers = geometry.layers
    dense = [_sums(model, sample, layers) for sample in samples]
    low, high = 0.0, 1.0
    best: tuple[int, ...] = (prompts.usual,)
    while high - low > 2.0**-EXACT_STEPS:
        alpha = (low + high) / 2
        drops = _scheme(model, samples, dense, alpha, prompts, budget)
        if drops is None:
            low = alpha
        else:
            high, best = alpha, drops
    return Found(high, best)


def _scheme(
    model: Llava,
    samples: Sequence[oracle.Sample],
    dense: list[list[tuple[Tensor, Tensor]]],
    alpha: float,
    prompts: Prompts,
    budget: float,
) -> tuple[int, ...] | None:
    """What layers drop at a tolerance until the budget is met, or None."""
    account = Account(Geometry.from_config(model.config), prompts)
    runs = [_Run(model, sample) for sample in samples]
    drops: list[int] = []
    for layer in range(model.config.get_text_config().num_hidden_layers):
        counts = [
            run.layer(layer, sums[layer], alpha)
            for run, sums in zip(runs, dense, strict=True)
        ]
        drops.append(prompts.drop(torch.tensor(counts)))
        account.cut(drops[-1])
        if account.saved() >= budget:
            return tuple(drops)
    return None


def _sums(
    model: Llava, sample: oracle.Sample, layers: int
) -> list[tuple[Tensor, Tensor]]:
    """``Wc`` and ``Ws`` of each layer of the unpruned model."""
    run = _Run(model, sample)
    sums = []
    for layer in range(layers):
        run.hidden, cross, visual = run.attention(layer)
        sums.append((cross.sum(), visual.sum()))
    return sums


class _Run:
    """One sample on its way through the decoder."""

    def __init__(self, model: Llava, sample: oracle.Sample) -> None:
        self.decoder = Decoder(model)
        self.hidden = pruner._embed(model, sample)
        self.visual = sample.input_ids == model.config.image_token_id
        self.instruction = pruner._after_last(self.visual)
        self.positions = sample.positions

    def attention(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        """The layer's output, and what visual tokens receive, by both sums."""
        count = len(self.hidden)
        heads = Heads(torch.ones(count, count, dtype=torch.bool).tril())
        tables = self.decoder.tables(index, self.hidden, self.positions)
        after = self.decoder.run(index, self.hidden, tables, heads)
        maps = heads.probabilities
        largest = maps.amax(dim=0)[:, self.visual]
        cross = largest[self.instruction].sum(dim=0) / self.instruction.sum()
        visual = largest[self.visual].sum(dim=0) / self.visual.sum().clamp(min=1)
        return after, cross, visual

    def layer(self, index: int, dense: tuple[Tensor, Tensor], alpha: float) -> int:
        """Run a layer and drop what it may lose."""
        after, cross, visual = self.attention(index)
        by_cross = _candidates(cross, dense[0] * (1 - alpha))
        by_visual = _candidates(visual, dense[1] * (1 - alpha))
        dropped = sorted(by_cross & by_visual)
        kept = torch.ones_like(self.visual)
        kept[self.visual.nonzero()[:, 0][dropped]] = False
        self.hidden, self.visual = after[kept], self.visual[kept]
        self.instruction = self.instruction[kept]
        self.positions = self.positions[kept]
        return len(dropped)


def _candidates(received: Tensor, least: Tensor) -> set[int]:
    """As many of the weakest as may be dropped: one more at a time, summed anew."""
    order = received.argsort()
    total, count = received.sum(), 0
    for more in range(1, len(order) + 1):
        if total - received[order[:more]].sum() < least:
            break
        count = more
    return set(order[:count].tolist())


# ---------------------------------------------------------------------- ours


@dataclass(frozen=True)
class Task:
    """A model and its calibration prompts.

    Attributes:
        name: What the table calls it.
        model: The model.
        batches: The prompts as the model takes them.
    """

    name: str
    model: Llava
    batches: list[Inputs]

    def samples(self) -> list[oracle.Sample]:
        """The same prompts without padding, images encoded."""
        return [
            sample
            for inputs in self.batches
            for sample in oracle.split_batch(self.model, **inputs)
        ]

    def published(self, budget: float) -> Found:
        """The recipe for a budget, from the prompts on, as published."""
        samples = self.samples()
        with Decoder(self.model).running():
            return published(self.model, samples, self.prompts(), budget)

    def statistics(self) -> list[Statistics]:
        """One pass over the unpruned model."""
        with observed(self.model):
            return [observe(self.model, inputs) for inputs in self.batches]

    def by_statistics(self, budgets: Sequence[float]) -> dict[float, Found]:
        """Recipes, from the prompts on."""
        found = merged(self.statistics())
        prompts = Prompts(found.visual, found.text)
        return search(Counts(found), self.geometry, prompts, budgets, STEPS)

    def exactly(self, budgets: Sequence[float]) -> dict[float, Found]:
        """The same, attention recomputed on what is left."""
        with observed(self.model), tempfile.TemporaryDirectory() as scratch:
            trials = Trials(self.model, Path(scratch))
            parts = []
            for number, inputs in enumerate(self.batches):
                with trials.starting(number):
                    parts.append(observe(self.model, inputs))
                cross, visual = (
                    s.double().sum(dim=2) for s in (parts[-1].cross, parts[-1].own)
                )
                trials.add(number, functools.partial(dict, inputs), cross, visual)
            return self._by_trials(trials, merged(parts), budgets)

    def _by_trials(
        self, trials: Trials, found: Statistics, budgets: Sequence[float]
    ) -> dict[float, Found]:
        prompts, counts = Prompts(found.visual, found.text), Counts(found)

        def estimate(saved: float) -> float:
            near = search(counts, self.geometry, prompts, [saved], STEPS)
            return near[saved].tolerance

        args = (self.geometry, prompts, budgets, EXACT_STEPS)
        return search(trials, *args, estimate=estimate)

    @property
    def geometry(self) -> Geometry:
        """Of the decoder."""
        return Geometry.from_config(self.model.config)

    def prompts(self) -> Prompts:
        """What the samples cost."""
        image = self.model.config.image_token_id
        visual = torch.cat([(b["input_ids"] == image).sum(1) for b in self.batches])
        lengths = torch.cat([b["attention_mask"].sum(1) for b in self.batches])
        return Prompts(visual, lengths - visual)


def reference_task(count: int) -> Task:
    """The reference model, on questions of its training split."""
    model, processor = open_checkpoint(CHECKPOINT)
    assert isinstance(model, Llava)
    data = open_calibration("reference", count)
    device = torch.device("cpu")
    batches = [data.inputs(processor, samples, device) for samples in data.batches()]
    return Task("reference", model, batches)


def narrow_task(count: int) -> Task:
    """LLaVA-1.5's layers and visual tokens, 64 wide, with random weights."""
    torch.manual_seed(0)
    text = LlamaConfig(
        hidden_size=64,
        intermediate_size=172,
        num_hidden_layers=32,
        num_attention_heads=8,
        vocab_size=512,
        # Queries and keys wide enough for attention to be far from uniform.
        initializer_range=0.1,
    )
    vision = CLIPVisionConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=336,
        patch_size=14,
        initializer_range=0.2,
    )
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=500)
    model = Llava(config)
    model.train(mode=False)
    ids = torch.randint(0, 499, (count, 35 + 576 + 40))
    ids[:, 35 : 35 + 576] = 500
    pixels = torch.randn(count, 3, 336, 336)
    batches = [
        {
            "input_ids": ids[start : start + BATCH],
            "attention_mask": torch.ones_like(ids[start : start + BATCH]),
            "pixel_values": pixels[start : start + BATCH],
        }
        for start in range(0, count, BATCH)
    ]
    return Task("narrow", model, batches)


# --------------------------------------------------------------------- the figures


def timed(function: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds of the processor, and what came of it."""
    start = time.process_time()
    result = function()
    return time.process_time() - start, result


def measure(task: Task, budgets: Sequence[float], rounds: int) -> dict[str, Any]:
    """Seconds of each search, and ratios."""
    seconds: dict[str, list[float]] = {}
    for _ in range(rounds):
        for name, spent in _round(task, budgets).items():
            seconds.setdefault(name, []).append(spent)
    medians = {name: statistics.median(spent) for name, spent in seconds.items()}
    one, many = medians["exact, one budget"], medians["exact, all budgets"]
    published = [medians[f"published, {budget}"] for budget in budgets]
    return {
        "samples": len(task.prompts().visual),
        "published, one budget": published[0],
        "exact, one budget": one,
        "times faster, exact, one": published[0] / one,
        "published, all budgets": sum(published),
        "exact, all budgets": many,
        "times faster, exact, all": sum(published) / many,
        "statistics, all budgets": medians["statistics, all budgets"],
        "times faster, statistics": sum(published) / medians["statistics, all budgets"],
        "rounds": seconds,
    }


def _round(task: Task, budgets: Sequence[float]) -> dict[str, float]:
    """One search after the other; an error if the exact ones are not as published."""
    spent, found = {}, {}
    for budget in budgets:
        what = f"published, {budget}"
        spent[what], found[budget] = timed(functools.partial(task.published, budget))
    for what, wanted in (("one budget", budgets[:1]), ("all budgets", budgets)):
        search = functools.partial(task.exactly, wanted)
        spent[f"exact, {what}"], recipes = timed(search)
        for budget, recipe in recipes.items():
            assert recipe == found[budget], f"{recipe} at {budget}"
    search = functools.partial(task.by_statistics, budgets)
    spent["statistics, all budgets"], _ = timed(search)
    return spent


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    makers = {"reference": (reference_task, 32), "narrow": (narrow_task, 8)}
    parser.add_argument("--models", nargs="+", choices=makers, default=[*makers])
    parser.add_argument("--samples", type=int, help="instead of 32 and 8")
    parser.add_argument("--budgets", nargs="+", type=float, default=[*BUDGETS])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    torch.set_num_threads(1)
    results = {}
    for name in options.models:
        make, count = makers[name]
        task = make(options.samples or count)
        results[name] = measure(task, options.budgets, options.rounds)
    print(f"{'seconds':28}" + "".join(f"{name:>12}" for name in results))
    for row in [*next(iter(results.values()))][:-1]:
        cells = (f"{result[row]:12.2f}" for result in results.values())
        print(f"{row:28}" + "".join(cells))
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
