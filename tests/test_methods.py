"""Every method on every path is the oracle: compiled, exported, on ONNX Runtime."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from tests.onnx_prefill import Prefill
from tests.tiny import (
    Compiled,
    Inputs,
    assert_matches_oracle,
    assert_static,
    batch,
    counted_positions,
    recipe_for,
    tiny_llava,
)
from vtprune_fx.api import prune
from vtprune_fx.errors import PlanError, RecipeError
from vtprune_fx.export import export_onnx
from vtprune_fx.recipe import load_recipe
from vtprune_fx.scorers import register_scorer

if TYPE_CHECKING:
    from torch import Tensor

    from vtprune_fx.recipe import Recipe
    from vtprune_fx.scorers.evidence import Evidence

LAYERS = 4
LAST = LAYERS - 1

METHODS: dict[str, Recipe] = {
    "fastv": recipe_for(LAYERS, {1: 8}, site="after_layer", score="last-token"),
    "vtw": recipe_for(LAYERS, {1: 16}, site="after_layer", score="uniform"),
    "fitprune behind layers": recipe_for(
        LAYERS, {0: 3, 2: 5, 3: 2}, site="after_layer"
    ),
    "last token ahead of layers": recipe_for(
        LAYERS, {1: 3, 2: 5, 3: 2}, site="before_layer", score="last-token"
    ),
    "fitprune ahead of all layers": recipe_for(
        LAYERS, {0: 3, 2: 5}, site="before_layer"
    ),
}

PROMPTS = {
    "three samples, padded, images elsewhere": ((5, 9), (2, 4), (8, 3)),
    "two images": ((3, 2, 6), (1, 0, 4)),
    "text alone beside images": ((5, 9), (12,), (2, 4, 1)),
}


def _some(*fast: str) -> list[Any]:
    """All methods; those that are not named here are slow."""
    return [
        name if name in fast else pytest.param(name, marks=pytest.mark.slow)
        for name in METHODS
    ]


def prompts(case: str, *, positions: bool) -> Inputs:
    inputs = batch(tiny_llava(layers=LAYERS), *PROMPTS[case], seed=1)
    return inputs | {"position_ids": counted_positions(inputs)} if positions else inputs


@pytest.mark.parametrize("name", METHODS)
def test_compiled_is_the_oracle(name: str) -> None:
    model, recipe = tiny_llava(layers=LAYERS), METHODS[name]
    compiled = Compiled(model, recipe)
    for case in PROMPTS:
        inputs = prompts(case, positions=case != "two images")
        outputs = compiled(**inputs)
        kept = compiled.recorded.keep_sets
        assert_matches_oracle(outputs, kept, model, recipe, inputs)
    assert_static(compiled.recorded.graphs[0])


@pytest.mark.parametrize("name", _some("fitprune ahead of all layers"))
def test_exported_is_the_oracle(name: str) -> None:
    model, recipe = tiny_llava(layers=LAYERS, kv_heads=2), METHODS[name]
    pruned = prune(model, batch(model, (3, 6), (9, 1)), recipe)
    for case in PROMPTS:
        inputs = prompts(case, positions=False)
        outputs, kept = pruned(**inputs), pruned.keep_sets(**inputs)
        assert_matches_oracle(outputs, kept, model, recipe, inputs)


@pytest.mark.parametrize("name", _some("last token ahead of layers"))
def test_on_onnx_runtime_is_the_oracle(name: str) -> None:
    model, recipe = tiny_llava(layers=LAYERS), METHODS[name]
    exported, _ = export_onnx(model, batch(model, (5, 9), (2, 4)), recipe)
    for case in ("three samples, padded, images elsewhere", "two images"):
        inputs = prompts(case, positions=True)
        run = Prefill(exported.components["prefill"].program, inputs, recipe)
        assert_matches_oracle(run.outputs, run.keep_sets, model, recipe, inputs)


@pytest.mark.parametrize("decoder", ["gemma", "qwen2"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_other_decoders_are_cut_behind_layers_too(decoder: str, attention: str) -> None:
    model = tiny_llava(layers=2, decoder=decoder, attention=attention)
    recipe = recipe_for(2, {0: 3, 1: 5}, site="after_layer", score="last-token")
    inputs = batch(model, (5, 9), (2, 4))
    compiled = Compiled(model, recipe)
    outputs = compiled(**inputs)
    kept = compiled.recorded.keep_sets
    assert_matches_oracle(outputs, kept, model, recipe, inputs)


# ------------------------------------------------------------- a scorer of one's own


def test_a_scorer_of_ones_own_works_on_every_path() -> None:
    def longest(seen: Evidence, *, power: int = 1) -> Tensor:
        assert seen.hidden is not None
        scores: Tensor = seen.hidden.norm(dim=2) * seen.key.norm(dim=3).mean(dim=1)
        return scores.pow(power)

    register_scorer("longest", longest)
    recipe = recipe_for(2, {0: 5, 1: 3}, score="longest", options={"power": 2})
    model = tiny_llava(layers=2)
    inputs = batch(model, (5, 9), (2, 4), (8, 3))
    compiled, exported = Compiled(model, recipe), export_onnx(model, inputs, recipe)[0]
    outputs = compiled(**inputs)
    kept = compiled.recorded.keep_sets
    assert_matches_oracle(outputs, kept, model, recipe, inputs)
    positioned = inputs | {"position_ids": counted_positions(inputs)}
    run = Prefill(exported.components["prefill"].program, positioned, recipe)
    assert_matches_oracle(run.outputs, run.keep_sets, model, recipe, positioned)


def fields(recipe: Recipe, **changes: Any) -> dict[str, object]:
    return recipe.model_dump() | changes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"score": "magic"}, "field score: expected .*fitprune or .* found 'magic'"),
        (
            {"options": {"depth": 2}},
            "field options: .* of the score 'last-token': it has none, found 'depth'",
        ),
        (
            {"score": "random", "options": {"seed": 2}},
            "field options: .* found 'seed'",
        ),
        (
            {
                "cuts": [
                    {"layer": 1, "drop": 2, "site": "after_layer"},
                    {"layer": 2, "drop": 2, "site": "before_layer"},
                ]
            },
            "field cuts: expected one cut at a place, found one after layer 1",
        ),
        (
            {"cuts": [{"layer": 1, "drop": 2, "site": "inside"}]},
            "field cuts.0.site: expected .*'after_layer'.* found 'inside'",
        ),
    ],
)
def test_what_a_recipe_cannot_say(changes: dict[str, object], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe(fields(METHODS["fastv"], **changes))


def test_a_name_that_is_taken() -> None:
    with pytest.raises(RecipeError, match="scorer 'fitprune': expected a name of its"):
        register_scorer("fitprune", lambda seen: seen.roles)


def test_a_scorer_that_cannot_be_traced_is_refused() -> None:
    register_scorer("first", lambda seen: seen.roles * int(seen.roles[0, 0]))
    recipe = recipe_for(2, {0: 5}, score="first")
    model = tiny_llava(layers=2)
    with pytest.raises(PlanError, match=r"scorer 'first'.*traceable"):
        prune(model, batch(model, (5, 9)), recipe)
