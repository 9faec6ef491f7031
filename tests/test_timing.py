"""Models that run while they are measured."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
from torch._dynamo import config

from tests.tiny import batch, recipe_for, tiny_llava
from vtprune_fx import timing
from vtprune_fx.generation.compile import pruned, report_of
from vtprune_fx.timing import running


def test_recipes_beyond_what_torch_recompiles_run_in_turn(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A function may be compiled once; three recipes follow beside a dense model."""
    eager = functools.partial(pruned, inner="eager")
    monkeypatch.setattr(timing, "pruned", eager)
    ours = tiny_llava(layers=2)
    whole = copy.deepcopy(ours)
    processor: Any = None  # torch.compile needs none
    inputs = batch(whole, (3, 6))
    run: dict[str, Any] = {**inputs, "max_new_tokens": 1, "do_sample": False}
    recipes = [recipe_for(2, drops) for drops in ({0: 5}, {0: 6}, {1: 7})]
    dense = recipes[0].keep_all()
    with config.patch(recompile_limit=1):
        with running(whole, processor, dense, "torch", inputs) as model:
            expected = model.generate(**run)
            for recipe in recipes:
                with running(ours, processor, recipe, "torch", inputs) as shorter:
                    shorter.generate(**run)
                    report = report_of(shorter)
                assert report is not None
                assert report.visual_tokens == recipe.tokens_per_layer(16, 2)
                assert model.generate(**run).equal(expected)
        assert config.recompile_limit == 1
