"""Accuracy against saved MACs: every method, one model, the same questions.

    python benchmarks/methods.py RUN [--limit 2000] [--seed 2000] [--jobs 2]

Each method cuts where its authors cut, at the same relative depth of the reference
model. How much it cuts there follows from the budget: where the published recipe keeps
a share s of the visual tokens, this one keeps s ** p, with the p that saves as much as
was asked for. VTW, which keeps none, has only its depth to choose, and gets as near as
the number of layers allows. FitPrune has the recipes that ship for this model, set by
hand; the baseline is these with tokens drawn at random.

RUN holds a file for each recipe that is done; the same command goes on from there. At
the end it holds ``methods.json``, ``methods.png`` and ``methods.csv``.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from transformers import AutoConfig

from vtprune_fx.evaluation.curve import draw_curve
from vtprune_fx.evaluation.evaluate import evaluate_one
from vtprune_fx.evaluation.results import Evaluation, Result
from vtprune_fx.files import replace_file
from vtprune_fx.models.loading import open_checkpoint
from vtprune_fx.recipes.counting import Geometry, cost
from vtprune_fx.recipes.loading import load_recipe
from vtprune_fx.recipes.schema import Cut, Recipe, Recycle
from vtprune_fx.reference import CHECKPOINT
from vtprune_fx.reference.questions import TWO_PICTURES, Sample, draw_samples

BUDGETS = (0.3, 0.45, 0.55, 0.65, 0.75)
"""Shares of the language model's prefill MACs to save."""

PUBLISHED = (
    "sparsevlm-llava-1.5-7b-64",
    "sparsevlm-plus-llava-1.5-7b-64",
    "fastv-llava-1.5-7b",
    "pyramiddrop-llava-1.5-7b",
    "dart-llava-1.5-7b-64",
    "divprune-llava-1.5-7b-64",
    "visionzip-llava-1.5-7b-64",
    "vtw-llava-1.5-7b",
)
"""A recipe of each method, whose cuts are stretched to the reference model's depth."""

VISUAL = 144
"""Visual tokens of a picture."""

PROMPTS = ((1 - TWO_PICTURES, VISUAL, 17), (TWO_PICTURES, 2 * VISUAL, 21))
"""Share of prompts, visual tokens, and other tokens: what a budget is met for."""


def recipes(geometry: Geometry) -> Iterator[Recipe]:
    """All recipes to compare, for a model of these sizes."""
    for budget in BUDGETS:
        shipped = load_recipe(f"fitprune-reference-{100 * budget:.0f}")
        yield shipped
        yield shipped.baseline("random")
        for name in PUBLISHED:
            yield at_budget(load_recipe(name), geometry, budget)


def at_budget(published: Recipe, geometry: Geometry, budget: float) -> Recipe:
    """A published recipe, stretched to a model and set to save a share of its MACs."""
    name = f"{published.method}-{100 * budget:.0f}"
    start = published.model_copy(update={"name": name, "options": _options(published)})
    scale = geometry.layers / published.layers
    # After the first layer at least, except for what is cut before all layers.
    depths = [d and max(1, round(scale * d)) for d in map(_depth, published.cuts)]
    left = _shares_left(published)
    if left == [0.0]:
        choices = [
            _stretched(start, geometry, left, [d]) for d in range(1, geometry.layers)
        ]
        return min(choices, key=lambda each: abs(saved(each, geometry) - budget))
    low, high = 0.0, 16.0
    while high - low > 1e-6:
        power = (low + high) / 2
        tried = _stretched(start, geometry, [share**power for share in left], depths)
        low, high = (power, high) if saved(tried, geometry) < budget else (low, power)
    found = _stretched(start, geometry, [share**high for share in left], depths)
    if "picks" not in found.options:
        return found
    kept = 2 * found.tokens_per_layer(VISUAL, 1)[0]  # of two pictures
    return found.model_copy(update={"options": {"picks": kept}})


def saved(recipe: Recipe, geometry: Geometry) -> float:
    """Share of the MACs of prompts with one picture and with two."""
    works = [
        (share, cost(recipe, geometry, *tokens).total) for share, *tokens in PROMPTS
    ]
    spent = sum(share * work.pruned_macs for share, work in works)
    return 1 - spent / sum(share * work.dense_macs for share, work in works)


def _options(published: Recipe) -> dict[str, int | float]:
    # 14 of 32 heads is 2 of the reference model's 4.
    return {"heads": 2} if "heads" in published.options else dict(published.options)


def _depth(cut: Cut) -> int:
    """Layers before a cut."""
    return cut.layer if cut.site == "before_layer" else cut.layer + 1


def _shares_left(recipe: Recipe) -> list[float]:
    """Share of the visual tokens kept at each cut, without new tokens."""
    present, shares = recipe.visual_tokens, []
    for cut in recipe.cuts:
        shares.append((present - cut.drop) / recipe.visual_tokens)
        present -= cut.drop - recipe.new_tokens(cut.drop)
    return shares


def _stretched(
    recipe: Recipe, geometry: Geometry, shares: Sequence[float], depths: Sequence[int]
) -> Recipe:
    """The same method with other shares kept, after other numbers of layers."""
    present, cuts = VISUAL, []
    for cut, share, depth in zip(recipe.cuts, shares, depths, strict=True):
        drop = present - round(share * VISUAL)
        if drop <= 0:
            continue
        layer = depth if cut.site == "before_layer" else depth - 1
        cuts.append(Cut(layer=layer, drop=drop, site=cut.site))
        present -= drop - recipe.new_tokens(drop)
    sizes = {"layers": geometry.layers, "visual_tokens": VISUAL, "of": VISUAL}
    changes: dict[str, object] = {"cuts": tuple(cuts)}
    if recipe.recycle and recipe.recycle.form == "contextual" and cuts:
        changes["recycle"] = _contextual(recipe, recipe.recycle, cuts[0].drop)
    return recipe.model_copy(update=sizes | changes)


def _contextual(recipe: Recipe, published: Recycle, drop: int) -> Recycle:
    """As many tokens merged, to one that stays, as in the published recipe."""
    [cut] = recipe.cuts
    each = recipe.new_tokens(cut.drop) / (recipe.visual_tokens - cut.drop)
    share = round(each * (VISUAL - drop)) / drop + 1e-9  # not to be rounded down
    return published.model_copy(update={"theta": min(share, 1.0)})


# ------------------------------------------------------------------------- answering


def answered(recipe: Recipe, run: Path, seed: int, limit: int) -> Result:
    """All questions under one recipe, or what an earlier call wrote down."""
    file = run / f"{recipe.name}.json"
    weights = (CHECKPOINT / "model.safetensors").read_bytes()
    asked = {
        "model": hashlib.sha256(weights).hexdigest(),
        "questions": [seed, limit],
        "recipe": json.loads(recipe.to_json()),
    }
    if file.is_file() and (stored := json.loads(file.read_text()))["asked"] == asked:
        fields = stored["result"]
        return Result(**fields | {k: tuple(fields[k]) for k in ("answers", "right")})
    torch.set_num_threads(1)
    result = evaluate_one(*open_checkpoint(CHECKPOINT), recipe, _asked(seed, limit))
    done = {"asked": asked, "result": dataclasses.asdict(result)}
    replace_file(file, (json.dumps(done) + "\n").encode())
    return result


@functools.cache
def _asked(seed: int, limit: int) -> list[Sample]:
    """The questions: drawn once a process, which costs as much as answering them."""
    return list(draw_samples("test", seed, limit))


def main() -> None:
    """Answer, then draw."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="folder for what is done")
    parser.add_argument("--limit", type=int, default=2000, help="questions")
    parser.add_argument("--seed", type=int, default=2000, help="seed of the questions")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes")
    given = parser.parse_args()
    given.run.mkdir(parents=True, exist_ok=True)
    geometry = Geometry.from_config(AutoConfig.from_pretrained(CHECKPOINT))
    compared = list(recipes(geometry))
    ask = functools.partial(answered, run=given.run, seed=given.seed, limit=given.limit)
    with ProcessPoolExecutor(given.jobs) as pool:
        results = pool.map(ask, [compared[0].keep_all(), *compared])
        done = list(track(results, "recipes", len(compared) + 1))
    questions = (sample.questions[0] for sample in _asked(given.seed, given.limit))
    evaluation = Evaluation(tuple(questions), tuple(done))
    Console().print(*evaluation.tables())
    numbers = json.dumps(evaluation.fields(), indent=1) + "\n"
    replace_file(given.run / "methods.json", numbers.encode())
    draw_curve(evaluation, given.run / "methods.png")


if __name__ == "__main__":
    main()
