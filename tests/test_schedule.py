"""Counts that come with each run: one graph for every image size and every budget."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch._dynamo import lookup_backend, register_backend
from torch.fx import GraphModule

import vtprune_fx
from tests import processors, zoo
from tests.tiny import recipe_for
from tests.zoo import IMAGE, LAYERS, Inputs
from vtprune_fx import oracle, pruning
from vtprune_fx.errors import InputError, RecipeError, VtpruneError
from vtprune_fx.models.arguments import cache_of
from vtprune_fx.recipes.counting import Geometry, cost
from vtprune_fx.recipes.scaling import check_same_places, scaled
from vtprune_fx.recipes.schema import Recipe

if TYPE_CHECKING:
    from collections.abc import Callable

RECIPE = recipe_for(LAYERS, {0: 576, 1: 960}, of=2880)
NEW = 3
FAMILIES = ("LLaVA-NeXT", "Qwen2.5-VL")

MADE: list[str] = []
"""What was compiled since the test began: ``prompt`` or ``step``, as often."""


def counting(inner: str) -> Callable[..., Any]:
    """A backend that notes what it compiles."""

    def backend(module: GraphModule, inputs: Any, **kwargs: Any) -> Any:
        pruned = any(n.name == "vtprune_schedule" for n in module.graph.nodes)
        MADE.append("prompt" if pruned else "step")
        return lookup_backend(inner)(module, inputs, **kwargs)

    return backend


register_backend(counting("eager"), name="counted_eager")
register_backend(counting("inductor"), name="counted_inductor")


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch.compiler.reset()
    MADE.clear()


def compiled(name: str, recipe: Recipe | None = RECIPE, inner: str = "eager") -> Any:
    return vtprune_fx.compile(zoo.tiny(name), recipe, inner=f"counted_{inner}")


def by_processor(name: str, number: int) -> Inputs:
    """One prompt of one to three pictures; each fourth time a batch of three.

    All pictures have sizes of their own: 8 to 89 pixels wide and high.
    """
    sizes = iter([(8 + 37 * k % 82, 8 + 53 * k % 82) for k in range(7 * number, 400)])
    samples = 3 if number % 4 == 3 else 1
    prompts = [
        (list(itertools.islice(sizes, 1 + (number + row) % 3)), 3 + number % 5 + row)
        for row in range(samples)
    ]
    return processors.inputs_of(name, *prompts, seed=number)


def without_processor(name: str, number: int) -> Inputs:
    """The same by the model's encoder alone."""
    pictures = [1 + (number + row) % 3 for row in range(3 if number % 4 == 3 else 1)]
    prompts: list[zoo.Prompt] = [
        (3, *("image", 1) * many, 4 + number % 5 + row)
        for row, many in enumerate(pictures)
    ]
    return zoo.batch(name, zoo.shared(name), *prompts, seed=number)


def assert_as_the_oracle(
    model: Any, name: str, recipe: Recipe, inputs: Inputs, **options: Any
) -> None:
    """Kept tokens, tokens that layers hold, and logits of three new tokens."""
    made = model.generate(
        **inputs,
        max_new_tokens=NEW,
        do_sample=False,
        eos_token_id=None,
        return_dict_in_generate=True,
        output_logits=True,
        **options,
    )
    report = vtprune_fx.report_of(model)
    assert report is not None
    plain, layers = zoo.shared(name), cache_of(made).layers
    for row, sample in enumerate(oracle.split_batch(plain, **inputs)):
        state = oracle.prefill(plain, recipe, sample)
        padding = inputs["input_ids"].shape[1] - len(sample.input_ids)
        for layer, positions in report.keep_sets.items():
            kept = [int(p) for p in positions[row] - padding if p >= 0]
            expected = [p for p in state.kept[layer].tolist() if p >= 0]
            assert kept == expected, (row, layer)
        held = [layer.held() - int(layer.padding[row]) for layer in layers]
        assert held == [k.shape[1] + NEW - 1 for k in state.keys], row
        logits = state.logits[-1]
        for step in range(NEW):
            torch.testing.assert_close(
                made.logits[step][row], logits, atol=1e-4, rtol=0
            )
            if step + 1 < NEW:
                token = int(made.sequences[row, step - NEW])
                logits = oracle.step(plain, state, token)


# ------------------------------------------------------------------ every image size


@pytest.mark.parametrize("name", FAMILIES)
def test_pictures_of_all_sizes_take_two_graphs(name: str) -> None:
    """One for single prompts and one for batches, of prompts and of steps."""
    model = compiled(name)
    counts = set()
    for number in range(20):
        inputs = by_processor(name, number)
        counts |= set((inputs["input_ids"] == IMAGE).sum(dim=1).tolist())
        assert_as_the_oracle(model, name, RECIPE, inputs)
    assert len(counts) >= 15
    assert sorted(MADE) == ["prompt", "prompt", "step", "step"]


SLOW = [
    pytest.param(n, marks=pytest.mark.slow) for n in ("LLaVA-OneVision", "Idefics3")
]


@pytest.mark.parametrize("name", ["Qwen2.5-VL", *SLOW])
def test_images_of_all_sizes_take_two_graphs(name: str) -> None:
    """The same of families whose processors need more than the suite installs."""
    model = compiled(name)
    for number in range(8):
        assert_as_the_oracle(model, name, RECIPE, without_processor(name, number))
    assert sorted(MADE) == ["prompt", "prompt", "step", "step"]


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_five_sizes_take_two_graphs_of_inductor(name: str) -> None:
    model = compiled(name, inner="inductor")
    for number in (0, 1, 2, 3, 5):
        assert_as_the_oracle(model, name, RECIPE, by_processor(name, number))
    assert sorted(MADE) == ["prompt", "prompt", "step", "step"]


def test_the_default_recipe_takes_one_graph_too(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """And says once what it drops."""
    pruning.say_default.cache_clear()
    name = "LLaVA-NeXT"
    model = compiled(name, None)
    for number in (0, 1, 2, 5):
        inputs = by_processor(name, number)
        visual = int((inputs["input_ids"] == IMAGE).sum())
        recipe = vtprune_fx.default_recipe(LAYERS, visual)
        assert_as_the_oracle(model, name, recipe, inputs)
    assert sorted(MADE) == ["prompt", "step"]
    said = [r for r in caplog.records if "No recipe given" in r.getMessage()]
    assert len(said) == 1


def test_equal_samples_take_the_graph_of_unequal_ones() -> None:
    name = "LLaVA-NeXT"
    model = compiled(name)
    unequal, equal = by_processor(name, 3), [([(30, 50)], n) for n in (4, 9, 5)]
    for inputs in (unequal, processors.inputs_of(name, *equal)):
        assert_as_the_oracle(model, name, RECIPE, inputs)
    assert sorted(MADE) == ["prompt", "step"]


def test_the_report_has_the_numbers_of_the_run() -> None:
    """By hand: 576 and 960 of 2880 are a fifth and a third."""
    name = "LLaVA-NeXT"
    model = compiled(name)
    for sizes in ([(30, 50)], [(60, 20), (33, 44)]):
        inputs = processors.inputs_of(name, (sizes, 5))
        visual = int((inputs["input_ids"] == IMAGE).sum())
        model(**inputs)
        report = vtprune_fx.report_of(model)
        assert report is not None
        first, second = visual // 5, visual // 3
        assert [cut.drop for cut in report.plan.cuts] == [first, second]
        assert report.plan.dropped == first + second
        left = visual - first - second
        assert report.visual_tokens == [visual - first, left, left]
        assert f"{visual} visual tokens, {left} after the last" in str(report)


RECYCLED: dict[str, Any] = {
    "site": "after_layer",
    "recycle": {"tau": 0.5, "theta": 0.5},
}
BY_RANK = Recipe.model_validate(
    {
        **recipe_for(LAYERS, {}).model_dump(),
        "cuts": [{"layer": 0, "by_rank": {"rule": "keep", "scale": 1.0}}],
    }
)

FIXED = {
    "by rank": BY_RANK,
    "counts, recycled": recipe_for(LAYERS, {0: 4}, **RECYCLED),
    "shares, recycled": recipe_for(LAYERS, {0: 4}, of=50, **RECYCLED),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", FIXED)
def test_other_recipes_run_on_all_sizes(kind: str) -> None:
    """Their numbers are part of the graphs, the number of features is not."""
    name, recipe = "LLaVA-NeXT", FIXED[kind]
    model, first = compiled(name, recipe), by_processor(name, 0)
    text = {key: first[key][:, -3:] for key in ("input_ids", "attention_mask")}
    with torch.no_grad():
        model(**text)
    for number in (0, 1):
        inputs = by_processor(name, number)
        assert_as_the_oracle(model, name, recipe, inputs)
        report = vtprune_fx.report_of(model)
        assert report is not None
        assert report.plan.visual_tokens == int((inputs["input_ids"] == IMAGE).sum())


# --------------------------------------------------------------------- every budget


@pytest.mark.parametrize("name", FAMILIES)
def test_five_budgets_take_one_graph(name: str) -> None:
    model = compiled(name)
    inputs, batch = by_processor(name, 2), by_processor(name, 3)
    assert_as_the_oracle(model, name, RECIPE, inputs)
    assert_as_the_oracle(model, name, RECIPE, batch)
    before = list(MADE)
    kept = set()
    for budget in (0, 0.1, 0.25, 0.4, 0.5):
        with vtprune_fx.schedule(model, budget) as recipe:
            assert_as_the_oracle(model, name, recipe, inputs)
            assert_as_the_oracle(model, name, recipe, batch)
        report = vtprune_fx.report_of(model)
        assert report is not None
        kept.add(report.visual_tokens[-1])
    assert len(kept) == 5
    assert before == MADE
    assert_as_the_oracle(model, name, RECIPE, inputs)


@pytest.mark.compat
def test_generate_takes_a_schedule_for_one_call() -> None:
    name = "LLaVA-NeXT"
    model, inputs = compiled(name), by_processor(name, 1)
    fewer = recipe_for(LAYERS, {1: 10})
    assert_as_the_oracle(model, name, fewer, inputs, schedule=fewer)
    assert_as_the_oracle(model, name, RECIPE, inputs)
    assert sorted(MADE) == ["prompt", "step"]


def test_schedules_within_each_other_end_as_they_began() -> None:
    name = "LLaVA-NeXT"
    model, inputs = compiled(name), by_processor(name, 1)
    outer, inner = recipe_for(LAYERS, {0: 4}), recipe_for(LAYERS, {1: 9})
    with vtprune_fx.schedule(model, outer):
        with vtprune_fx.schedule(model, inner):
            assert_as_the_oracle(model, name, inner, inputs)
        assert_as_the_oracle(model, name, outer, inputs)
        with contextlib.suppress(ZeroDivisionError), vtprune_fx.schedule(model, inner):
            raise ZeroDivisionError
        assert_as_the_oracle(model, name, outer, inputs)
    assert_as_the_oracle(model, name, RECIPE, inputs)


@pytest.mark.parametrize("name", FAMILIES)
def test_keeping_all_is_the_dense_model(name: str) -> None:
    """To the bit where no score computes attention by another kernel."""
    inputs = by_processor(name, 1)
    with torch.no_grad():
        dense = zoo.shared(name)(**inputs).logits
        for score, allowed in (("uniform", 0.0), ("fitprune", 1e-6)):
            shares = recipe_for(LAYERS, {0: 576, 1: 960}, of=2880, score=score)
            model = compiled(name, shares)
            with vtprune_fx.schedule(model, 0):
                logits = model(**inputs).logits
            assert (logits - dense).abs().max() <= allowed * dense.abs().max(), score
            vtprune_fx.undo(model)


def test_keep_all_is_a_recipe_too() -> None:
    name = "LLaVA-NeXT"
    model, inputs = compiled(name), by_processor(name, 1)
    everything = RECIPE.keep_all()
    assert_as_the_oracle(model, name, everything, inputs, schedule=everything)


# -------------------------------------------------------------------------- scaling


GEOMETRY = Geometry(
    layers=4, hidden=64, intermediate=128, heads=4, kv_heads=2, head_dim=16
)
COUNTS = recipe_for(4, {0: 10, 1: 20, 3: 5}, visual_tokens=100)


@pytest.mark.parametrize("budget", [0.01, 0.1, 0.2, 0.35, 0.5])
@pytest.mark.parametrize("of", [None, 1000])
def test_the_least_scale_that_meets_the_budget(budget: float, of: int | None) -> None:
    """Checked against every scale there is."""
    drops = {0: 10, 1: 20, 3: 5} if of is None else {0: 100, 1: 200, 3: 50}
    recipe = recipe_for(4, drops, visual_tokens=100, of=of)
    reference, total = of or 100, sum(drops.values())
    enough = []
    for k in range(reference + 1):
        changed = {at: drop * k // total for at, drop in drops.items()}
        one = recipe_for(4, changed, visual_tokens=100, of=of)
        if cost(one, GEOMETRY, reference, 0).visual.saved >= budget:
            enough.append(changed)
    found = scaled(recipe, budget, GEOMETRY)
    assert {cut.layer: cut.drop for cut in found.cuts} == enough[0]
    assert found.of == of


def test_the_ends_of_the_scale() -> None:
    assert {cut.drop for cut in scaled(COUNTS, 0, GEOMETRY).cuts} == {0}
    most = recipe_for(4, {0: 28, 1: 57, 3: 14}, visual_tokens=100)
    saved = cost(most, GEOMETRY, 100, 0).visual.saved
    found = scaled(COUNTS, saved, GEOMETRY)
    assert [cut.drop for cut in found.cuts] == [28, 57, 14]


@pytest.mark.parametrize("budget", [-0.1, 0.99, 2.0, float("nan"), float("inf")])
def test_a_budget_out_of_reach_is_refused(budget: float) -> None:
    with pytest.raises(InputError, match=r"0, which keeps all tokens, to 0\.\d+"):
        scaled(COUNTS, budget, GEOMETRY)


def test_of_the_shipped_recipes_some_share_their_places() -> None:
    """The documentation's example: 70 % in the graph of 60 %, and not 80 %."""
    load = vtprune_fx.load_recipe
    compiled_with = load("fitprune-llava-1.5-7b-60")
    check_same_places(compiled_with, load("fitprune-llava-1.5-7b-70"))
    with pytest.raises(InputError, match=r"fitprune-llava-1\.5-7b-80: expected cuts"):
        check_same_places(compiled_with, load("fitprune-llava-1.5-7b-80"))


# ------------------------------------------------------------------------ bad input


BAD: dict[str, tuple[Any, type[VtpruneError], str]] = {
    "another layer": (recipe_for(LAYERS, {2: 4}), InputError, "after_attention 2"),
    "another site": (
        recipe_for(LAYERS, {0: 4}, site="before_layer"),
        InputError,
        "before_layer 0",
    ),
    "another score": (recipe_for(LAYERS, {0: 4}, score="uniform"), InputError, "score"),
    "other positions": (
        recipe_for(LAYERS, {0: 4}, positions="compacted"),
        InputError,
        "compacted",
    ),
    "rules by rank": (
        BY_RANK,
        InputError,
        "rules by rank",
    ),
    "a budget out of reach": (0.99, InputError, "keeps all tokens, to 0"),
    "a negative budget": (-0.5, InputError, "keeps all tokens, to 0"),
    "no recipe of this name": ("no-such-recipe", RecipeError, "no-such-recipe"),
    "more than a sample has": (
        recipe_for(LAYERS, {0: 200}, visual_tokens=500),
        InputError,
        "at least 200 visual tokens",
    ),
}


def test_refused_schedules_change_nothing() -> None:
    """One after the other on one model, which takes seconds to compile."""
    name = "LLaVA-NeXT"
    model, inputs = compiled(name), by_processor(name, 1)
    assert_as_the_oracle(model, name, RECIPE, inputs)
    before = list(MADE)
    for asked, error, message in BAD.values():
        with pytest.raises(error, match=message):
            model.generate(**inputs, max_new_tokens=2, schedule=asked)
        with pytest.raises(error, match=message), vtprune_fx.schedule(model, asked):
            model(**inputs)
        assert_as_the_oracle(model, name, RECIPE, inputs)
    assert before == MADE


@pytest.mark.parametrize(
    ("recipe", "mode"),
    [
        (RECIPE, "max-autotune-no-cudagraphs"),
        (recipe_for(LAYERS, {}), None),
        (
            recipe_for(LAYERS, {0: 4}, **RECYCLED),
            None,
        ),
    ],
    ids=["a mode", "no cuts", "new tokens"],
)
def test_fixed_numbers_take_no_schedule(recipe: Recipe, mode: str | None) -> None:
    model = zoo.tiny("LLaVA-NeXT")
    vtprune_fx.compile(model, recipe, mode=mode)
    refused = pytest.raises(InputError, match=r"undo\(model\), and compile")
    with refused, vtprune_fx.schedule(model, 0.1):
        pass


@pytest.mark.slow
def test_a_mode_of_inductor_runs_on_all_sizes() -> None:
    """With a graph for each: CUDA graphs, which a mode may ask for, fix sizes."""
    name = "LLaVA-NeXT"
    model = zoo.tiny(name)
    vtprune_fx.compile(model, RECIPE, mode="reduce-overhead")
    for number in (0, 1, 3):
        assert_as_the_oracle(model, name, RECIPE, by_processor(name, number))


def test_a_model_that_was_not_compiled_takes_no_schedule() -> None:
    refused = pytest.raises(InputError, match=r"that vtprune_fx\.compile returned")
    with refused, vtprune_fx.schedule(zoo.tiny("LLaVA-NeXT"), 0.1):
        pass


def test_two_tokens_are_kept_at_least() -> None:
    """An image alone, all of it dropped: nothing would be left to answer from."""
    name = "LLaVA-NeXT"
    every = recipe_for(LAYERS, {0: 1}, of=1)
    model = compiled(name, every)
    inputs = processors.inputs_of(name, ([(30, 50)], 1))
    with pytest.raises(InputError, match="of which two are kept"):
        model(**inputs)
    assert MADE == []


@pytest.fixture(scope="module", autouse=True)
def _graphs_end_here() -> Iterator[None]:
    yield
    torch.compiler.reset()


def test_a_decoder_of_experts_takes_other_numbers_too() -> None:
    """Another recipe's, or none; a budget needs costs, which are not counted for it."""
    name = "Qwen3-VL-MoE"
    recipe, fewer = recipe_for(LAYERS, {1: 2, 2: 3}), recipe_for(LAYERS, {2: 4})
    model = compiled(name, recipe)
    inputs = without_processor(name, 0)
    for asked in (recipe, fewer, recipe.keep_all()):
        assert_as_the_oracle(model, name, asked, inputs, schedule=asked)
    assert_as_the_oracle(model, name, recipe.keep_all(), inputs, schedule=0)
    assert sorted(MADE) == ["prompt", "step"]
    with pytest.raises(InputError, match="decoders of dense layers"):
        model.generate(**inputs, schedule=0.1)
