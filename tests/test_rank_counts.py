"""Counts by rank: the oracle, and ``vtprune calibrate``, which fixes them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.test_cli_recipes import Run, io, run
from tests.test_fit_command import LAYERS, TOKENS, root
from tests.tiny import batch, recipe_for, tiny_llava
from vtprune_fx import oracle
from vtprune_fx.errors import InputError, PlanError, RecipeError
from vtprune_fx.fitting.calibration import open_calibration
from vtprune_fx.fitting.rank_counts import _counted, calibrate, check_adaptive
from vtprune_fx.models.loading import open_checkpoint
from vtprune_fx.oracle.scores import Seen, attention_rank
from vtprune_fx.recipes.loading import load_recipe
from vtprune_fx.recipes.schema import Provenance, Recipe

__all__ = ["io", "root"]  # fixtures


def by_rank(rules: dict[int, dict[str, object]], layers: int, **more: Any) -> Recipe:
    """SparseVLM with a rule in some layers."""
    fields: dict[str, object] = {
        "schema_version": 1,
        "name": "by-rank",
        "method": "sparsevlm",
        "score": "sparsevlm",
        "positions": "compacted",
        "layers": layers,
        "visual_tokens": TOKENS,
        "cuts": [
            {"layer": layer, "site": "after_layer", "by_rank": rule}
            for layer, rule in rules.items()
        ],
        "provenance": {"source": "this test"},
    }
    return load_recipe(fields | more)


def keep(scale: float, bias: float = 0) -> dict[str, object]:
    """The rule of the published code."""
    return {"rule": "keep", "scale": scale, "bias": bias}


def drop(factor: float) -> dict[str, object]:
    """The rule of the paper."""
    return {"rule": "drop", "lambda": factor}


# ------------------------------------------------------------------------ the oracle


def test_equal_raters_are_one_rank() -> None:
    """Three raters, two with the same query: their rows are in proportion."""
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 2, 9, 8, generator=generator)
    query[:, 8] = query[:, 6]
    visual = torch.arange(9) < 6
    allowed = torch.ones(9, 9, dtype=torch.bool).tril()
    logits = (query @ key.transpose(1, 2) * 0.3).masked_fill(~allowed, -torch.inf)
    one, maps = torch.zeros(9, 8), logits.softmax(dim=2)
    evidence = (query, key, 0.3, one, one, one, visual, ~visual, one[:, :0], allowed)
    seen = Seen(*evidence, maps)
    # Mean over heads would mix them otherwise; one head alone has two rows of three.
    assert attention_rank(dataclasses.replace(seen, probabilities=maps[:1])) == 2
    attended = maps.mean(dim=0)[6:, :6].numpy()
    assert attention_rank(seen) == np.linalg.matrix_rank(attended) == 3
    nothing = dataclasses.replace(seen, visual=torch.zeros_like(visual))
    assert attention_rank(nothing) == 0


def sample_of(model: Any, *texts: int) -> oracle.Sample:
    """One prompt with images."""
    [sample] = oracle.split_batch(model, **batch(model, texts))
    return sample


def test_each_cut_follows_its_own_rank() -> None:
    model = tiny_llava(layers=LAYERS)
    recipe = by_rank({0: keep(2), 2: keep(1, 1)}, LAYERS)
    done = oracle.prefill(model, recipe, sample_of(model, 3, 6))
    first, second = done.ranks[0], done.ranks[2]
    assert all(1 <= rank <= 6 for rank in (first, second))  # of six text tokens
    assert len(done.kept[0]) == len(done.kept[1]) == 9 + 2 * first
    assert len(done.kept[2]) == 9 + min(second + 1, 2 * first - 1)


def test_the_papers_rule_leaves_a_full_rank_alone() -> None:
    """Twelve raters at most see 2 tokens with rank 2, and v - rank = 0."""
    model = tiny_llava(layers=LAYERS)
    sample = sample_of(model, 3, 12)
    recycle = {"tau": 0.5, "theta": 0.5, "form": "paper"}
    recipe = by_rank({0: keep(0, 2), 1: drop(1)}, LAYERS, recycle=recycle)
    done = oracle.prefill(model, recipe, sample)
    # 14 leave; of 7 of them int(3.5) = 3 clusters are made.
    assert len(done.kept[0]) == 15 + 2 + 3
    rank = done.ranks[1]
    assert rank <= 5
    dropped = 5 - rank
    new = max(1, int(0.5 * max(1, int(0.5 * dropped)))) if dropped else 0
    assert len(done.kept[1]) == 15 + 5 - dropped + new


# --------------------------------------------------------------------- calibrating


def made(ranks: dict[int, int], present: dict[int, int]) -> oracle.Prefill:
    """A run with these ranks, and visual tokens ahead of each cut."""
    none = torch.empty(0)
    scores = {layer: torch.zeros(count) for layer, count in present.items()}
    return oracle.Prefill(none, none, [], [], [], [], scores, ranks)


def test_the_mean_of_what_stayed_is_fixed() -> None:
    """6, 8 and 12 stay of 16, then 4, 6 and 10 of what there is.

    With 2 new tokens of 7 dropped: int(0.5 * 7) + 1 = 4 form int(0.3 * 4) + 1 = 2.
    """
    recycle = {"tau": 0.5, "theta": 0.3}
    recipe = by_rank({0: keep(2), 2: keep(2, -2)}, LAYERS, recycle=recycle)
    runs = [
        made({0: rank, 2: rank}, {0: 16, 2: 2 * rank + new})
        for rank, new in ((3, 3), (4, 2), (6, 1))
    ]
    first, second = _counted(recipe, runs, 16)
    assert (first.ranks, first.stayed) == ((3, 4, 6), (6, 8, 12))
    assert (first.stay, first.drop) == (9, 7)  # of 8.67
    assert second.stayed == (4, 6, 10)
    assert (second.stay, second.drop) == (7, 9 + 2 - 7)  # of 6.67


def test_no_more_stay_than_there_are() -> None:
    recipe = by_rank({0: keep(0, 3), 2: keep(0, 9)}, LAYERS)
    runs = [made({0: 1, 2: 1}, {0: 16, 2: 20})]
    first, second = _counted(recipe, runs, 16)
    assert (first.stay, first.drop, second.stay, second.drop) == (3, 13, 3, 0)


def test_calibrate_writes_a_static_recipe(root: Path, tmp_path: Path, io: Run) -> None:
    rules = by_rank({0: keep(2), 2: keep(0.5)}, LAYERS, recycle=RECYCLE)
    source, output = tmp_path / "rank.json", tmp_path / "static.json"
    source.write_text(rules.to_json())
    asked = ["--recipe", str(source), "--data", str(root / "data"), "--limit", "6"]
    status, out, _ = run(
        *io, "calibrate", str(root / "checkpoint"), *asked, "--output", str(output)
    )
    assert status == 0
    static = load_recipe(output)
    assert (static.name, static.adaptive) == ("by-rank-calibrated", False)
    assert (static.layers, static.visual_tokens) == (LAYERS, TOKENS)
    assert (static.recycle, static.positions) == (rules.recycle, "compacted")
    ranks = ranks_of(root, rules, 6)
    for layer in (0, 2):
        own = [rank[layer] for rank in ranks]
        spread = f"{min(own)} / {np.median(own):g} / {max(own)}"
        assert f"{layer} {spread}" in " ".join(out.split())
    stay = round(np.mean([2 * rank[0] for rank in ranks]))
    assert static.cuts[0].drop == TOKENS - stay
    status, out, _ = run(*io, "cost", "--recipe", str(output), "--json")
    assert json.loads(out)["after"][0] == stay + static.new_tokens(TOKENS - stay)


RECYCLE = {"tau": 0.3, "theta": 0.1}


def ranks_of(root: Path, recipe: Recipe, limit: int) -> list[dict[int, int]]:
    model: Any
    model, processor = open_checkpoint(root / "checkpoint")
    found = open_calibration(str(root / "data"), limit)
    inputs = found.inputs(processor, range(limit), model.device)
    samples = oracle.split_batch(model, **inputs)
    return [oracle.prefill(model, recipe, sample).ranks for sample in samples]


def test_what_cannot_be_calibrated(root: Path, tmp_path: Path) -> None:
    rules = by_rank({0: keep(2)}, LAYERS)
    with pytest.raises(RecipeError, match="numbers: there is nothing to calibrate"):
        check_adaptive(recipe_for(2, {0: 3}), tmp_path / "new.json")
    with pytest.raises(InputError, match="expected a file for the recipe, found a fol"):
        check_adaptive(rules, tmp_path)
    opened = open_checkpoint(root / "checkpoint")
    prompts = open_calibration(str(root / "data"), 2)
    text, images = prompts.openers[0]()
    two = dataclasses.replace(
        prompts, openers=[*prompts.openers, lambda: (text, images * 2)]
    )
    source = Provenance(source="this test")
    with pytest.raises(InputError, match="same number of visual tokens, found 16 and"):
        calibrate(*opened, rules, two, source)
    deep = by_rank({7: keep(2)}, 8)
    with pytest.raises(PlanError, match="cut at layer 7: expected a layer below 3"):
        calibrate(*opened, deep, prompts, source)
