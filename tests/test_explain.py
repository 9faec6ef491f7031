"""``explain``: what would be cut, and what is refused, without running."""

from __future__ import annotations

from tests.tiny import batch, recipe_for, tiny_llava
from vtprune_fx import explain
from vtprune_fx.errors import PlanError


def test_cuts_are_told_layer_by_layer() -> None:
    model = tiny_llava(layers=3)
    found = explain(model, batch(model, (3, 6)), recipe_for(3, {0: 3, 2: 5}))
    heading, *layers = str(found).splitlines()
    assert "16 visual tokens" in heading
    assert [line.split(": ", 1)[1].split(";")[0] for line in layers] == [
        "3 leave, 13 stay",
        "no cut",
        "5 leave, 8 stay",
    ]


def test_new_tokens_are_told() -> None:
    """Of 6 that leave int(6 * 0.5) + 1 = 4 become int(4 * 0.3) + 1 = 2."""
    model, recycle = tiny_llava(layers=3), {"tau": 0.5, "theta": 0.3}
    recipe = recipe_for(3, {1: 6}, site="after_layer", recycle=recycle)
    found = explain(model, batch(model, (3, 6)), recipe)
    assert "6 leave, 12 stay, 2 of them new; gathers" in str(found)


def test_what_is_refused_is_told() -> None:
    model = tiny_llava(layers=3)
    found = explain(model, batch(model, (3, 6)), recipe_for(9, {8: 3}))
    assert isinstance(found.refused, PlanError)
    assert "a layer below 3" in str(found)
    assert found.plan is None


def test_text_alone_is_not_pruned() -> None:
    model = tiny_llava(layers=3)
    found = explain(model, batch(model, (9,)), recipe_for(3, {0: 3}))
    assert "not pruned" in str(found)
