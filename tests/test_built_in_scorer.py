"""A scorer that ships is its module and one line: shown by shipping one more."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch
from torch import Tensor

import vtprune_fx
from tests.tiny import batch, cache_lengths, recipe_for, tiny_llava
from vtprune_fx import oracle
from vtprune_fx.errors import RecipeError
from vtprune_fx.scorers import Evidence, registry

MODEL = tiny_llava(layers=2)
NAME = "long-keys"


def rate(seen: Evidence) -> Tensor:
    """The longest keys are kept."""
    lengths: Tensor = seen.key.float().norm(dim=3)
    return lengths.sum(dim=1)


@pytest.fixture
def shipped(monkeypatch: pytest.MonkeyPatch) -> None:
    """The module that would be ``scorers/long_keys.py``, and its line."""
    module = ModuleType("vtprune_fx.scorers.long_keys")
    module.rate = rate  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(registry._BUILT_IN, NAME, registry._BuiltIn(rows=0))


@pytest.mark.usefixtures("shipped")
def test_recipes_run_it_and_the_oracle_knows_it() -> None:
    recipe = recipe_for(2, {0: 5}, score=NAME)
    inputs = batch(MODEL, (3, 6))
    pruned = vtprune_fx.prune(MODEL, inputs, recipe)
    outputs = pruned(**inputs)
    assert cache_lengths(outputs) == [25, 20]
    positions = torch.arange(25)[None]
    [sample] = oracle.split_batch(MODEL, **inputs, position_ids=positions)
    expected = oracle.prefill(MODEL, recipe, sample)
    torch.testing.assert_close(outputs.logits[0], expected.logits)


@pytest.mark.usefixtures("shipped")
def test_it_is_listed_counted_and_protected() -> None:
    assert NAME in registry.names()
    assert registry.rows(NAME) == 0
    assert not registry.sees_tower(NAME)
    with pytest.raises(RecipeError, match=NAME):
        vtprune_fx.register_scorer(NAME, rate)
