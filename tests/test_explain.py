"""``explain``: what would be cut, and what is refused, without running."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import sympy
from transformers.exporters.utils import get_leaf_tensors

from tests.tiny import batch, recipe_for, tiny_llava
from vtprune_fx import explain, prune
from vtprune_fx.errors import PlanError
from vtprune_fx.models.arguments import PAST, cache_of

pytestmark = pytest.mark.compat

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from torch import Tensor

    from vtprune_fx.planning.interface import Port
    from vtprune_fx.recipes.schema import Recipe


def test_cuts_are_told_layer_by_layer() -> None:
    model = tiny_llava(layers=3)
    found = explain(model, batch(model, (3, 6)), recipe_for(3, {0: 3, 2: 5}))
    heading, *layers = str(found).splitlines()
    assert "16 visual tokens" in heading
    assert [line.split(": ", 1)[1].split(";")[0] for line in layers] == [
        "3 dropped, 13 kept",
        "no cut",
        "5 dropped, 8 kept",
    ]


def test_new_tokens_are_told() -> None:
    """Of 6 that leave int(6 * 0.5) + 1 = 4 become int(4 * 0.3) + 1 = 2."""
    model, recycle = tiny_llava(layers=3), {"tau": 0.5, "theta": 0.3}
    recipe = recipe_for(3, {1: 6}, site="after_layer", recycle=recycle)
    found = explain(model, batch(model, (3, 6)), recipe)
    assert "6 dropped, 12 kept, 2 of them new; gathers" in str(found)


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


@pytest.mark.parametrize(
    "recipe",
    [
        recipe_for(2, {0: 3, 1: 5}),
        recipe_for(2, {1: 4}, site="before_layer"),
        recipe_for(2, {0: 6}, site="after_layer", recycle={"tau": 0.5, "theta": 0.3}),
    ],
    ids=["after_attention", "before_layer", "recycled"],
)
def test_what_a_graph_takes_and_returns_is_told(recipe: Recipe) -> None:
    """Names and shapes, against what the pruned model returns when it runs."""
    model = tiny_llava(layers=2)
    inputs = batch(model, (3, 6), (2, 4))
    found = explain(model, inputs, recipe).interface
    assert found is not None
    samples, prompt = inputs["input_ids"].shape
    sizes = {"batch": samples, "prompt": prompt, "images": 2}
    result = prune(model, inputs, recipe)(**inputs)
    returned = {"logits": result.logits, PAST: cache_of(result)}
    outputs = get_leaf_tensors(returned)
    assert _told(found.inputs, sizes) == _seen(inputs)
    assert _told(found.outputs, sizes) == _seen(outputs)


Shapes = dict[str, tuple[str, list[int]]]


def _told(ports: Iterable[Port], sizes: dict[str, int]) -> Shapes:
    return {
        port.name: (
            port.dtype,
            [int(sympy.sympify(size).subs(sizes)) for size in port.shape],
        )
        for port in ports
    }


def _seen(tensors: Mapping[str, Tensor]) -> Shapes:
    return {
        name: (str(value.dtype).removeprefix("torch."), list(value.shape))
        for name, value in tensors.items()
    }
