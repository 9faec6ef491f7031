"""``vtprune calibrate``: static counts for a recipe whose counts follow the rank.

The oracle prunes each calibration prompt by that prompt's ranks. A layer then keeps the
mean over prompts of the tokens kept after it, rounded: an ordinary static recipe.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import cast

from rich.console import Console
from rich.progress import track
from transformers import LlavaForConditionalGeneration, PreTrainedModel, ProcessorMixin

from vtprune_fx import oracle
from vtprune_fx.errors import InputError, RecipeError
from vtprune_fx.fitting.calibration import Calibration
from vtprune_fx.recipes.rank_rule import ByRank
from vtprune_fx.recipes.schema import Provenance, Recipe


@dataclass(frozen=True)
class Counted:
    """Tokens of calibration prompts kept after one layer.

    Attributes:
        layer: The layer.
        ranks: Of the raters' attention, one for each prompt.
        stayed: Visual tokens kept, without new ones, one number for each prompt.
        stay: Visual tokens that the static recipe keeps: their mean, rounded, or all
            that are present if those are fewer.
        drop: Visual tokens that it drops.
    """

    layer: int
    ranks: tuple[int, ...]
    stayed: tuple[int, ...]
    stay: int
    drop: int


def check_adaptive(recipe: Recipe, file: Path) -> None:
    """Check the arguments before a model is loaded.

    Raises:
        RecipeError: The recipe has counts already.
        InputError: The file to write is a folder.
    """
    if not recipe.adaptive:
        raise RecipeError(
            f"recipe {recipe.name}",
            expected="counts that follow the rank of each sample's attention",
            found="numbers: there is nothing to calibrate",
            fix="Use it unchanged, or fit one with `vtprune fit`.",
        )
    if file.is_dir():
        raise InputError(
            f"output {file}",
            expected="a file for the recipe",
            found="a folder",
            fix="Name a file in it.",
        )


def calibrate(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    recipe: Recipe,
    calibration: Calibration,
    provenance: Provenance,
) -> tuple[Recipe, list[Counted]]:
    """Fix the counts of a recipe on calibration prompts.

    Args:
        model: An unmodified LLaVA with a decoder that the oracle knows.
        processor: Its processor.
        recipe: Its counts follow the rank.
        calibration: The prompts, all with the same number of visual tokens.
        provenance: Of the static recipe.

    Returns:
        The static recipe, and the counts that it was made from, layer by layer.

    Raises:
        InputError: A prompt has no visual token, or another number than the others.
        PlanError: The model is none that the oracle knows, or lacks a layer that the
            recipe cuts in.
    """
    # The oracle checks what it gets.
    llava = cast("LlavaForConditionalGeneration", model)
    samples = list(_samples(llava, processor, calibration))
    visual = _visual_tokens(samples, calibration)
    console = Console(stderr=True)
    runs = [
        oracle.prefill(llava, recipe, sample)
        for sample in track(samples, "calibrated", console=console)
    ]
    counted = list(_counted(recipe, runs, visual))
    return _static(recipe, counted, visual, len(runs[0].kept), provenance), counted


def _samples(
    model: LlavaForConditionalGeneration,
    processor: ProcessorMixin,
    calibration: Calibration,
) -> Iterator[oracle.Sample]:
    for batch in calibration.batches():
        inputs = calibration.inputs(processor, batch, model.device)
        yield from oracle.split_batch(model, **inputs)


def _visual_tokens(samples: Sequence[oracle.Sample], calibration: Calibration) -> int:
    """How many each sample has."""
    found = sorted({len(sample.features) for sample in samples})
    if len(found) == 1 and found[0]:
        return found[0]
    raise InputError(
        f"calibration data {calibration.name!r}",
        expected="prompts that all have the same number of visual tokens",
        found=" and ".join(map(str, found)),
        fix="Calibrate on prompts with one image each, all of one size.",
    )


def _counted(
    recipe: Recipe, runs: Sequence[oracle.Prefill], visual: int
) -> Iterator[Counted]:
    left = visual
    for cut in recipe.cuts:
        rule: ByRank | None = cut.by_rank
        assert rule is not None, "all cuts of such a recipe have one"
        ranks = tuple(run.ranks[cut.layer] for run in runs)
        present = [len(run.scores[cut.layer]) for run in runs]
        stayed = tuple(
            came - rule.drop(rank, came)
            for rank, came in zip(ranks, present, strict=True)
        )
        stay = min(left, round(fmean(stayed)))
        yield Counted(cut.layer, ranks, stayed, stay, left - stay)
        left = stay + recipe.new_tokens(left - stay)


def _static(
    recipe: Recipe,
    counted: Sequence[Counted],
    visual: int,
    layers: int,
    provenance: Provenance,
) -> Recipe:
    drops = {one.layer: one.drop for one in counted}
    cuts = [
        {"layer": cut.layer, "drop": drops[cut.layer], "site": cut.site}
        for cut in recipe.cuts
    ]
    changes = {
        "name": f"{recipe.name}-calibrated",
        "layers": layers,
        "visual_tokens": visual,
        "cuts": cuts,
        "provenance": provenance,
    }
    return Recipe.model_validate(recipe.model_dump() | changes)
