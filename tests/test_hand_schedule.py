"""Counts that come with each run, on hand-built graphs.

Expected values come from ``tests.plain_scores``: loops over one sample, no fx.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import sympy
import torch

from tests.graphs import IMAGE, Inputs, Spec, inputs_for, plain_run
from tests.hand_passes import (
    ATEN,
    CUT_OP,
    FORMS,
    PASSES,
    Case,
    anatomy_of,
    keep_sets,
    node_named,
    run,
)
from tests.plain_scores import expected
from tests.test_hand_passes import assert_as_plain, assert_outputs, close, padding_of
from vtprune_fx.errors import PlanError
from vtprune_fx.graph.values import READ
from vtprune_fx.planning.place import place, with_counts
from vtprune_fx.recipes.schema import Cut

if TYPE_CHECKING:
    from collections.abc import Mapping

    from vtprune_fx.passes import Form
    from vtprune_fx.recipes.schema import Site

TWO = Case(Spec(layers=2), {0: 1, 1: 1}, scheduled=True)


def given_for(case: Case, drops: Mapping[int, int], **options: Any) -> Inputs:
    """Inputs, the numbers of a run first: drop, share and ``of`` of each cut."""
    rows = [[drops[layer], 0, 1] for layer in case.drops]
    return {"schedule": torch.tensor(rows), **inputs_for(case.spec, **options)}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("site", ["after_attention", "after_layer", "before_layer"])
def test_one_graph_drops_what_each_run_says(form: Form, site: Site) -> None:
    """More at the first cut, more at the second, all visual tokens."""
    drops = {0: 1, 1: 1} if site != "after_layer" else {0: 1}
    case = replace(TWO, drops=drops, form=form, site=site, score="fitprune")
    module = case.pruned()
    for numbers in ({0: 4, 1: 1}, {0: 1, 1: 3}, {0: 2, 1: 4}):
        now = {layer: numbers[layer] for layer in case.drops}
        given = given_for(case, now, padding=1)
        assert_as_plain(replace(case, drops=now), module, given)


@pytest.mark.parametrize("form", FORMS)
def test_a_run_that_drops_nothing_is_the_dense_one(form: Form) -> None:
    case = replace(TWO, form=form, score="last-token")
    given = given_for(case, {0: 0, 1: 0})
    outputs, _ = run(case.pruned(), given)
    kept = keep_sets(case.pruned(), given)
    tokens = given["embeds"].shape[1]
    for sample in range(len(given["embeds"])):
        ran = plain_run(case.spec, given, {}, sample)
        assert_outputs(case.spec, outputs, ran, given, sample)
        for positions in kept.values():
            assert positions[sample].tolist() == list(range(tokens))


@pytest.mark.parametrize("spec", [Spec(layers=3, flat=True), Spec(2, rotary=True)])
def test_sizes_and_shared_tables_follow_the_numbers(spec: Spec) -> None:
    case = Case(spec, {0: 1, 1: 1}, scheduled=True, form=CUT_OP)
    module = case.pruned()
    for now in ({0: 2, 1: 1}, {0: 0, 1: 5}):
        assert_as_plain(replace(case, drops=now), module, given_for(case, now))


@pytest.mark.parametrize("form", [ATEN, CUT_OP])
def test_compacted_positions_follow_the_numbers(form: Form) -> None:
    """As the same cut with its number in the graph."""
    fields = {"positions": "compacted"}
    spec = Spec(layers=2, rotary=True)
    scheduled = Case(spec, {0: 1}, scheduled=True, form=form, fields=fields)
    module = scheduled.pruned()
    for drop in (1, 3, 6):
        fixed = Case(spec, {0: drop}, form=form, fields=fields)
        given = inputs_for(spec)
        wanted, _ = run(fixed.pruned(), given)
        found, _ = run(module, given_for(scheduled, {0: drop}))
        for one, other in zip(found, wanted, strict=True):
            torch.testing.assert_close(one, other, atol=0, rtol=0)


@pytest.mark.parametrize(("share", "of"), [(3, 6), (1, 3), (0, 1), (5, 6)])
def test_each_sample_drops_the_share_that_the_run_says(share: int, of: int) -> None:
    """Of 6 and 2 visual tokens ``floor(share v / of)``, made up for by padding."""
    case = Case(
        Spec(layers=2), {0: 1}, per_sample=True, scheduled=True, fields={"of": 6}
    )
    given = inputs_for(case.spec, images=(6, 2), tokens=15, padding=5)
    row = share * 6 // of
    given = {"schedule": torch.tensor([[row, share, of]]), **given}
    module = case.pruned()
    outputs, _ = run(module, given)
    kept = keep_sets(module, given)[0]
    for sample, visual in enumerate((6, 2)):
        drop = share * visual // of
        ran, stay = expected(case.spec, given, sample, "uniform", {0: drop}, case.site)
        padding = padding_of(given, sample)
        rows = kept[sample].tolist()
        real = [at for at, n in enumerate(rows) if n >= padding]
        assert [rows[at] for at in real] == [n for n in stay[0] if n >= padding]
        assert len(rows) == 15 - row
        close(outputs[0][sample][real], ran.out[-len(real) :])


# ----------------------------------------------------------------------- the plan


def test_the_plan_has_a_row_for_each_cut_and_symbols_for_numbers() -> None:
    _, plan = replace(TWO, drops={0: 2, 1: 0}).planned()
    assert plan.schedule == "vtprune_schedule"
    assert [cut.row for cut in plan.cuts] == [0, 1]
    assert all(isinstance(cut.drop, sympy.Symbol) for cut in plan.cuts)
    first, second = plan.cuts
    assert second.dropped - first.dropped == second.drop
    assert plan.needed == 0


def test_what_was_planned_with_numbers_has_no_rows() -> None:
    _, plan = Case(Spec(layers=2), {0: 2, 1: 1}).planned()
    assert plan.schedule is None
    assert [cut.row for cut in plan.cuts] == [None, None]
    assert [cut.drop for cut in plan.cuts] == [2, 1]


def test_nothing_is_asserted_in_the_graph() -> None:
    """A run's numbers are checked before it."""
    module, plan = TWO.run("InsertScores")
    assert not PASSES["CheckTokens"](plan, ATEN)(module).modified


def test_each_count_is_read_once() -> None:
    module = replace(TWO, score="fitprune", form=CUT_OP).pruned()
    read = [node for node in module.graph.nodes if READ in node.meta]
    assert len(read) == len(TWO.drops)
    assert len(node_named(module, "vtprune_schedule").users) == len(TWO.drops)


def test_a_plan_with_the_counts_of_a_run() -> None:
    """By hand: a third and a half of 6 are 2 and 3."""
    _, plan = TWO.planned()
    recipe = Case(Spec(layers=2), {0: 2, 1: 3}, fields={"of": 6}).recipe
    counted = with_counts(plan, recipe, 6)
    assert [cut.drop for cut in counted.cuts] == [2, 3]
    assert [cut.dropped for cut in counted.cuts] == [2, 5]
    assert [cut.share for cut in counted.cuts] == [None, None]
    assert (counted.visual_tokens, counted.dropped) == (6, 5)
    assert counted.schedule == plan.schedule
    fewer = with_counts(plan, recipe.model_copy(update={"cuts": recipe.cuts[1:]}), 6)
    assert [cut.drop for cut in fewer.cuts] == [0, 3]


def test_a_per_sample_plan_has_the_shares_of_the_run() -> None:
    case = Case(
        Spec(layers=2), {0: 1}, per_sample=True, scheduled=True, fields={"of": 6}
    )
    _, plan = case.planned()
    recipe = Case(Spec(layers=2), {0: 5}, fields={"of": 12}).recipe
    counted = with_counts(plan, recipe, 6)
    assert [(cut.drop, cut.share) for cut in counted.cuts] == [(2, 5)]
    assert counted.of == 12


def test_more_layers_than_there_are_is_refused_with_any_numbers() -> None:
    case = replace(TWO, drops={0: 1})
    module, _ = case.planned()
    far = case.recipe.model_copy(update={"cuts": (Cut(layer=7, drop=1),), "layers": 8})
    with pytest.raises(PlanError, match="a layer below 2"):
        place(far, anatomy_of(module), module.graph, schedule="vtprune_schedule")


def test_more_than_an_image_has_is_no_matter_of_the_plan() -> None:
    """It is of the run, which may have larger images."""
    case = Case(Spec(), {0: 1}, scheduled=True)
    many = Case(Spec(), {0: IMAGE}, scheduled=True).recipe
    module, _ = case.planned()
    cut = many.cuts[0].model_copy(update={"drop": 10 * IMAGE})
    many = many.model_copy(update={"cuts": (cut,)})
    name = "vtprune_schedule"
    assert len(place(many, anatomy_of(module), module.graph, schedule=name).cuts) == 1
    with pytest.raises(PlanError, match="which a sample has"):
        place(many, anatomy_of(module), module.graph)
