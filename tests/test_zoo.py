"""Every model of the zoo, pruned, against the oracle: no model is known by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import vtprune_fx
from tests.matrix import IMAGES, VIDEOS, assert_onnx_is_the_oracle
from tests.tiny import recipe_for
from tests.zoo import (
    IMAGE,
    LAYERS,
    PAD,
    ZOO,
    Prompt,
    assert_generates_like_the_oracle,
    batch,
    recipe_of,
    shared,
    tiny,
)
from vtprune_fx import oracle
from vtprune_fx.errors import PlanError
from vtprune_fx.fitting.attention_statistics import observe
from vtprune_fx.fitting.observe import observed
from vtprune_fx.recipes.schedule import common_count, dropped_before

SOME = {"Qwen2-VL", "Gemma 3", "Qwen3-VL"}
"""What the default suite runs: three axes, masks of its own, features that enter later
layers. Any resolution is below."""


def run(model: Any, inputs: Any) -> None:
    with torch.no_grad():
        model(**inputs)


def names(some: set[str]) -> list[object]:
    return [
        name if name in some else pytest.param(name, marks=pytest.mark.slow)
        for name in ZOO
    ]


@pytest.mark.compat
@pytest.mark.parametrize("name", names(SOME))
def test_images_are_the_oracle(name: str) -> None:
    assert_generates_like_the_oracle(name, IMAGES, recipe_of(name))


@pytest.mark.parametrize(
    "name",
    [
        name if name == "Video-LLaVA" else pytest.param(name, marks=pytest.mark.slow)
        for name, kind in ZOO.items()
        if kind.video
    ],
)
def test_videos_beside_images_are_the_oracle(name: str) -> None:
    assert_generates_like_the_oracle(name, VIDEOS, recipe_of(name))


@pytest.mark.parametrize("name", names(SOME))
def test_recipes_are_fitted_to_what_the_oracle_goes_by(name: str) -> None:
    """Who leaves first has the lowest product of the two means that are observed."""
    model = shared(name)
    inputs = batch(name, model, *IMAGES)
    with observed(model):
        found = observe(model, inputs)
    assert found.cross.shape[:2] == (len(IMAGES), LAYERS)
    recipe = recipe_for(LAYERS, {0: 2})
    for own, sample in enumerate(oracle.split_batch(model, **inputs)):
        [visual] = (sample.input_ids == IMAGE).nonzero(as_tuple=True)
        assert found.visual[own] == len(visual)
        product = found.cross[own, 0] * found.own[own, 0]
        lowest = product[: len(visual)].argsort(stable=True)[:2]
        kept = oracle.prefill(model, recipe, sample).kept[0]
        left = set(range(len(sample.input_ids))) - set(kept.tolist())
        assert left == set(visual[lowest].tolist())


# ---------------------------------------------------------------- any resolution

SHARES = recipe_for(LAYERS, {0: 576, 1: 960}, of=2880)
THREE: tuple[Prompt, ...] = ((3, "image", 6), (2, "image", 1), (4, "image", 12))
"""Images of three shapes, of 30, 51 and 33 visual tokens."""


def test_images_of_three_shapes_each_lose_their_own_share() -> None:
    """int(n * v / 2880) of v visual tokens, the rest of the prompt whole."""
    name = "LLaVA-NeXT"
    model = tiny(name)
    inputs = batch(name, model, *THREE)
    visual = (inputs["input_ids"] == IMAGE).sum(dim=1).tolist()
    assert visual == [30, 51, 33]
    torch.compiler.reset()
    vtprune_fx.compile(model, SHARES, inner="eager")
    run(model, inputs)
    report = vtprune_fx.report_of(model)
    assert report is not None
    kept = report.keep_sets[1]
    for row, ids in enumerate(inputs["input_ids"]):
        own = ids[kept[row][kept[row] >= 0]]
        lost = 576 * visual[row] // 2880 + 960 * visual[row] // 2880
        assert int((own == IMAGE).sum()) == visual[row] - lost
        assert _text(own) == _text(ids)


def _text(ids: torch.Tensor) -> list[int]:
    return ids[(ids != IMAGE) & (ids != PAD)].tolist()


@pytest.mark.parametrize(
    "fields",
    [
        {},
        pytest.param({"site": "after_layer"}, marks=pytest.mark.slow),
        {"site": "before_layer", "score": "last-token", "positions": "compacted"},
    ],
    ids=str,
)
def test_batches_of_other_numbers_are_the_oracle(fields: dict[str, Any]) -> None:
    recipe = recipe_for(LAYERS, {0: 576, 1: 960}, of=2880, **fields)
    assert_generates_like_the_oracle("LLaVA-NeXT", THREE, recipe)


def test_recycling_needs_equal_numbers() -> None:
    name = "LLaVA-NeXT"
    recipe = recipe_for(
        LAYERS,
        {0: 960},
        of=2880,
        site="after_layer",
        recycle={"tau": 0.3, "theta": 0.1},
    )
    model = tiny(name)
    vtprune_fx.compile(model, recipe, inner="eager")
    with pytest.raises(PlanError, match="equal numbers of visual tokens together"):
        run(model, batch(name, model, *THREE))


def test_a_batch_loses_what_all_its_rows_can() -> None:
    """By hand: of 10 tokens four leave, of 5 to 9 two, one at each cut."""
    recipe = recipe_for(2, {0: 2, 1: 2}, of=10)
    assert common_count(recipe, [10, 5], [0, 0]) == 9
    assert common_count(recipe, [10, 5], [0, 2]) == 10
    assert common_count(recipe, [10, 5, 0], [0, 2, 4]) == 10
    # The text alone has room for one at each cut, or for none.
    assert common_count(recipe, [10, 5, 0], [0, 2, 2]) == 9
    assert common_count(recipe, [10, 5, 0], [0, 2, 0]) == 5
    assert dropped_before(recipe, 5, 2) == [0, 1]


def test_cuts_ahead_of_deep_stacked_features_are_refused() -> None:
    name = "Qwen3-VL"
    model = tiny(name)
    vtprune_fx.compile(model, recipe_for(LAYERS, {0: 2}), inner="eager")
    with pytest.raises(PlanError, match=r"deep-stacked features"):
        run(model, batch(name, model, *IMAGES))


def test_positions_along_three_axes_cannot_be_compacted() -> None:
    name = "Qwen2-VL"
    model = tiny(name)
    recipe = recipe_for(LAYERS, {0: 2}, positions="compacted")
    vtprune_fx.compile(model, recipe, inner="eager")
    with pytest.raises(PlanError, match="along several"):
        run(model, batch(name, model, *IMAGES))


@pytest.mark.parametrize(
    "name", ["Qwen2-VL", pytest.param("LLaVA-NeXT", marks=pytest.mark.slow)]
)
def test_towers_that_are_told_sizes_cannot_be_looked_at(name: str) -> None:
    """They run ahead of the graph, so VisionZip finds no tower in it."""
    model = tiny(name)
    recipe = recipe_for(LAYERS, {0: 2}, site="before_layer", score="visionzip")
    vtprune_fx.compile(model, recipe, inner="eager")
    with pytest.raises(PlanError, match="does not look at the vision tower"):
        run(model, batch(name, model, *IMAGES))


# --------------------------------------------------------------------- the oracle


@pytest.mark.parametrize("name", ZOO)
def test_the_oracle_unpruned_is_the_models_own_forward(name: str) -> None:
    model = shared(name)
    keep_all = recipe_for(LAYERS, {})
    for prompts in (IMAGES, VIDEOS) if ZOO[name].video else (IMAGES,):
        inputs = batch(name, model, *prompts)
        with torch.no_grad():
            logits = model(**inputs).logits
        for row, sample in enumerate(oracle.split_batch(model, **inputs)):
            own = logits[row, -len(sample.input_ids) :]
            found = oracle.prefill(model, keep_all, sample)
            torch.testing.assert_close(found.logits, own, atol=2e-5, rtol=0)


# ------------------------------------------------------------------------- a video


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fitprune", "sparsevlm"])
def test_a_video_of_eight_frames_through_video_llava(method: str) -> None:
    fields: dict[str, Any] = {"method": method, "score": method}
    if method == "sparsevlm":
        recycle = {"tau": 0.3, "theta": 0.1}
        fields |= {"positions": "compacted", "recycle": recycle, "site": "after_layer"}
    recipe = recipe_for(LAYERS, {0: 30, 1: 20}, visual_tokens=64, **fields)
    prompts: tuple[Prompt, ...] = ((3, "video", 6), (2, "video", 9))
    assert_generates_like_the_oracle("Video-LLaVA", prompts, recipe)


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n, kind in ZOO.items() if kind.papers])
def test_on_onnx_runtime_is_the_oracle(name: str) -> None:
    assert_onnx_is_the_oracle(name)
