"""Every method on every path is the oracle: compiled, exported, on ONNX Runtime."""

from __future__ import annotations

from copy import deepcopy
from typing import TYPE_CHECKING, Any

import pytest
import torch

import vtprune_fx
from tests.onnx_prefill import Prefill
from tests.tiny import (
    CACHE,
    Compiled,
    Inputs,
    assert_matches_oracle,
    assert_static,
    batch,
    counted_positions,
    recipe_for,
    tiny_llava,
)
from vtprune_fx import oracle
from vtprune_fx.api import prune
from vtprune_fx.errors import InputError, PlanError, RecipeError
from vtprune_fx.evaluation.picture import sample_photo
from vtprune_fx.export import export_onnx, load, write_onnx
from vtprune_fx.models.arguments import cache_of
from vtprune_fx.models.loading import open_checkpoint
from vtprune_fx.models.prompts import batch_inputs
from vtprune_fx.models.ragged_attention import use_ragged_attention
from vtprune_fx.recipes.loading import load_recipe
from vtprune_fx.reference.random_llava import CheckpointSpec, build_checkpoint
from vtprune_fx.scorers import register_scorer

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from vtprune_fx.recipes.schema import Recipe
    from vtprune_fx.scorers.evidence import Evidence

LAYERS = 4
TINY = CheckpointSpec(
    image_size=56, layers=2, hidden=32, heads=4, intermediate=48, vision_layers=2
)

METHODS: dict[str, Recipe] = {
    "fastv": recipe_for(LAYERS, {1: 8}, site="after_layer", score="last-token"),
    "vtw": recipe_for(LAYERS, {1: 16}, site="after_layer", score="uniform"),
    "sparsevlm": recipe_for(
        LAYERS, {0: 3, 2: 5}, site="after_layer", score="sparsevlm"
    ),
    "sparsevlm-plus": recipe_for(
        *(LAYERS, {0: 3, 2: 5}),
        site="after_layer",
        score="sparsevlm-plus",
        options={"heads": 3},
    ),
    "dart": recipe_for(LAYERS, {1: 9}, site="after_layer", score="dart"),
    "dart with few pivots": recipe_for(
        *(LAYERS, {1: 5, 3: 7}),
        site="before_layer",
        score="dart",
        options={"visual_pivots": 1, "text_pivots": 20},
    ),
    "divprune": recipe_for(
        LAYERS, {0: 9}, site="before_layer", score="divprune", options={"picks": 7}
    ),
    "divprune with few picks": recipe_for(
        *(LAYERS, {1: 5, 2: 3}),
        site="before_layer",
        score="divprune",
        options={"picks": 2},
    ),
    "pyramiddrop": recipe_for(
        *(LAYERS, {1: 8, 2: 4, 3: 2}),
        site="before_layer",
        score="last-token",
        positions="compacted",
    ),
    "sparsevlm, recycled": recipe_for(
        *(LAYERS, {0: 9, 1: 4, 3: 2}),
        site="after_layer",
        score="sparsevlm",
        positions="compacted",
        recycle={"tau": 0.5, "theta": 0.4},
    ),
    "recycled as in the paper": recipe_for(
        *(LAYERS, {0: 9, 1: 4}),
        site="after_layer",
        score="sparsevlm",
        recycle={"tau": 0.9, "theta": 0.3, "form": "paper"},
    ),
    "recycled, positions kept": recipe_for(
        LAYERS, {1: 15, 2: 3}, site="after_layer", recycle={"tau": 0.9, "theta": 0.3}
    ),
    "compacted behind attention": recipe_for(
        LAYERS, {0: 3, 2: 5}, positions="compacted"
    ),
    "fitprune behind layers": recipe_for(
        LAYERS, {0: 3, 2: 5, 3: 2}, site="after_layer"
    ),
    "last token ahead of layers": recipe_for(
        LAYERS, {1: 3, 2: 5, 3: 2}, site="before_layer", score="last-token"
    ),
    "fitprune ahead of all layers": recipe_for(
        LAYERS, {0: 3, 2: 5}, site="before_layer"
    ),
    "visionzip": recipe_for(
        *(LAYERS, {0: 11}),
        site="before_layer",
        score="visionzip",
        positions="compacted",
        recycle={"tau": 1.0, "theta": 0.3, "form": "contextual"},
    ),
    "visionzip's score in the decoder": recipe_for(
        LAYERS, {1: 5, 2: 3}, site="after_layer", score="visionzip"
    ),
}

THREE, MIXED = "three samples, padded, images elsewhere", "text alone beside images"
PROMPTS = {
    THREE: ((5, 9), (2, 4), (8, 3)),
    "two images": ((3, 2, 6), (1, 0, 4)),
    MIXED: ((5, 9), (12,), (2, 4, 1)),
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


COMPACTED = [name for name in METHODS if METHODS[name].positions == "compacted"]


ONE_OF_EACH = (
    *("fastv", "sparsevlm-plus", "dart", "divprune", "pyramiddrop", "visionzip"),
    *("sparsevlm, recycled", "fitprune ahead of all layers"),
)


@pytest.mark.parametrize("name", _some(*ONE_OF_EACH))
def test_compiled_is_the_oracle(name: str) -> None:
    model, recipe = tiny_llava(layers=LAYERS), METHODS[name]
    if name in COMPACTED:
        model = deepcopy(model)
        use_ragged_attention(model)
    compiled = Compiled(model, recipe)
    inputs = prompts(THREE if name in COMPACTED else MIXED, positions=True)
    outputs = compiled(**inputs)
    kept = compiled.recorded.keep_sets
    assert_matches_oracle(outputs, kept, model, recipe, inputs)
    assert_static(compiled.recorded.graphs[0])
    if name in COMPACTED:
        assert_goes_on(cache_of(outputs), model, recipe, inputs)


@pytest.mark.parametrize("name", _some("sparsevlm, recycled"))
def test_compiled_for_all_prompts_is_the_oracle(name: str) -> None:
    model, recipe = tiny_llava(layers=LAYERS), METHODS[name]
    compiled = Compiled(model, recipe)
    for case in PROMPTS:
        inputs = prompts(case, positions=case != "two images")
        outputs = compiled(**inputs)
        kept = compiled.recorded.keep_sets
        assert_matches_oracle(outputs, kept, model, recipe, inputs)


def assert_goes_on(cache: Any, model: Any, recipe: Recipe, inputs: Inputs) -> None:
    """On the cache as it was handed out, by a decode path that no pass has seen."""
    samples = oracle.split_batch(model, **inputs)
    states = [oracle.prefill(model, recipe, sample) for sample in samples]
    mask, position = inputs["attention_mask"], inputs["position_ids"][:, -1:]
    for token in (7, 8, 9):
        mask = torch.cat((mask, torch.ones_like(mask[:, :1])), dim=1)
        position = position + 1
        with torch.no_grad():
            logits = model(
                input_ids=torch.full((len(samples), 1), token),
                attention_mask=mask,
                position_ids=position,
                **{CACHE: cache},
            ).logits[:, -1]
        expected = torch.stack([oracle.step(model, state, token) for state in states])
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", _some("fitprune ahead of all layers"))
def test_exported_is_the_oracle(name: str) -> None:
    model, recipe = tiny_llava(layers=LAYERS, kv_heads=2), METHODS[name]
    pruned = prune(model, batch(model, (3, 6), (9, 1)), recipe)
    for case in PROMPTS:
        inputs = prompts(case, positions=False)
        outputs, kept = pruned(**inputs), pruned.keep_sets(**inputs)
        assert_matches_oracle(outputs, kept, model, recipe, inputs)


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_on_onnx_runtime_is_the_oracle(name: str) -> None:
    model, recipe = tiny_llava(layers=LAYERS), METHODS[name]
    exported, _ = export_onnx(model, batch(model, (5, 9), (2, 4)), recipe)
    for case in (THREE, "two images"):
        inputs = prompts(case, positions=True)
        run = Prefill(exported.components["prefill"].program, inputs, recipe)
        assert_matches_oracle(run.outputs, run.keep_sets, model, recipe, inputs)


@pytest.mark.parametrize(
    ("decoder", "attention"),
    [
        ("gemma", "eager"),
        ("qwen2", "sdpa"),
        pytest.param("gemma", "sdpa", marks=pytest.mark.slow),
        pytest.param("qwen2", "eager", marks=pytest.mark.slow),
    ],
)
def test_other_decoders_are_cut_behind_layers_too(decoder: str, attention: str) -> None:
    model = tiny_llava(layers=2, decoder=decoder, attention=attention)
    recipe = recipe_for(2, {0: 3, 1: 5}, site="after_layer", score="last-token")
    inputs = batch(model, (5, 9), (2, 4))
    compiled = Compiled(model, recipe)
    outputs = compiled(**inputs)
    kept = compiled.recorded.keep_sets
    assert_matches_oracle(outputs, kept, model, recipe, inputs)


GENERATED = (
    *("pyramiddrop", "sparsevlm, recycled"),
    *("divprune", "fitprune ahead of all layers", "visionzip"),
)


@pytest.mark.parametrize(
    ("name", "static"),
    [
        *((name, False) for name in GENERATED),
        ("pyramiddrop", True),
        *(pytest.param(n, True, marks=pytest.mark.slow) for n in GENERATED[1:]),
    ],
)
def test_generate_is_the_oracle(name: str, static: bool) -> None:
    model: Any = tiny_llava.__wrapped__(layers=LAYERS)
    inputs = batch(model, *PROMPTS[MIXED], seed=1)
    positioned = inputs | {"position_ids": counted_positions(inputs)}
    samples = oracle.split_batch(model, **positioned)
    expected = [oracle.generate(model, METHODS[name], s, 8) for s in samples]
    vtprune_fx.compile(model, METHODS[name], inner="eager")
    cache = {"cache_implementation": "static"} if static else {}
    ids = model.generate(
        **inputs, **cache, max_new_tokens=8, do_sample=False, eos_token_id=None
    )
    assert ids[:, inputs["input_ids"].shape[1] :].tolist() == expected


def test_onnx_runtime_generates_behind_a_cut_ahead_of_all_layers(
    tmp_path: Path,
) -> None:
    recipe = recipe_for(2, {0: 6, 1: 3}, site="before_layer", score="divprune")
    checkpoint = build_checkpoint(tmp_path / "checkpoint", TINY)
    model: Any
    model, processor = open_checkpoint(checkpoint)
    write_onnx(model, processor, recipe, tmp_path / "onnx")
    exported: Any = load(tmp_path / "onnx")
    prompts = [("What is it?", [sample_photo()])] * 2 + [
        ("And what is behind it?", [sample_photo()])
    ]
    inputs = batch_inputs(processor, prompts)
    assert (inputs["attention_mask"] == 0).any()
    options: Any = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    answer: Any = exported.generate(**inputs, **options, return_dict_in_generate=True)
    positioned = inputs | {"position_ids": counted_positions(inputs)}
    samples = oracle.split_batch(model, **positioned)
    expected = [oracle.generate(model, recipe, s, 6) for s in samples]
    assert answer.sequences[:, -6:].tolist() == expected
    more = torch.cat([answer.sequences, answer.sequences[:, -3:]], dim=1)
    with pytest.raises(InputError, match=r"one new token at a time, found \d+, after"):
        exported.generate(more, **{CACHE: cache_of(answer)}, **options)


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
    with pytest.raises(RecipeError, match="scorer 'fitprune': expected another name"):
        register_scorer("fitprune", lambda seen: seen.roles)


def test_a_scorer_that_cannot_be_traced_is_refused() -> None:
    register_scorer("first", lambda seen: seen.roles * int(seen.roles[0, 0]))
    recipe = recipe_for(2, {0: 5}, score="first")
    model = tiny_llava(layers=2)
    with pytest.raises(PlanError, match=r"scorer 'first'.*traceable"):
        prune(model, batch(model, (5, 9)), recipe)
