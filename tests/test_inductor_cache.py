"""Inductor's cache of compiled graphs knows which recipe a graph was pruned by."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters

from tests.tiny import Compiled, Inputs, batch, recipe_for, tiny_llava
from vtprune_fx import oracle
from vtprune_fx.recipes.schema import Recipe

SOME, OTHERS = recipe_for(2, {0: 3, 1: 5}), recipe_for(2, {0: 5, 1: 3})
"""Cuts in the same layers, and as many tokens left."""


@pytest.mark.slow
def test_another_recipe_is_another_graph(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    model = tiny_llava(layers=2)
    inputs = batch(model, (3, 6))
    hits = []
    for recipe in (SOME, OTHERS, SOME):
        torch.compiler.reset()
        counters.clear()
        assert_is_the_oracle(recipe, inputs)
        hits.append(counters["inductor"]["fxgraph_cache_hit"])
    assert hits[:2] == [0, 0]
    assert hits[2] > 0


def assert_is_the_oracle(recipe: Recipe, inputs: Inputs) -> None:
    model = tiny_llava(layers=2)
    logits = Compiled(model, recipe, "inductor")(**inputs).logits[0]
    [sample] = oracle.split_batch(model, **inputs)
    expected = oracle.prefill(model, recipe, sample).logits
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)
