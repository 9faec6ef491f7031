"""Graphs whose counts follow the rank of a sample's own attention are the oracle."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import onnx_ir
import onnxruntime
import pytest
import torch

from tests.test_rank_counts import by_rank, drop, keep
from tests.tiny import (
    Compiled,
    Inputs,
    assert_matches_oracle,
    batch,
    cache_lengths,
    counted_positions,
    tiny_llava,
)
from vtprune_fx import oracle, vtprune_backend
from vtprune_fx.errors import InputError
from vtprune_fx.export import export_onnx
from vtprune_fx.export.onnx_rank_functions import FUNCTIONS
from vtprune_fx.planning.report import PruneReport
from vtprune_fx.recipes.schema import Recipe, Recycle
from vtprune_fx.scorers.roles import INSTRUCTION, VISUAL
from vtprune_fx.selection import attention_rank

RECIPES = {
    "code": by_rank({0: keep(2), 1: keep(1)}, 2, recycle={"tau": 0.5, "theta": 0.4}),
    "paper": by_rank(
        {0: keep(0, 2), 1: drop(1)},
        2,
        recycle={"tau": 0.3, "theta": 0.3, "form": "paper"},
        positions="kept",
    ),
    "nothing new": by_rank({0: keep(2), 1: drop(0.5)}, 2),
}
PROMPTS = ((3, 6), (5, 4), (2, 12))


def prompts() -> list[Inputs]:
    """Samples of one image, whose ranks differ."""
    return [batch(tiny_llava(layers=2), texts, seed=2) for texts in PROMPTS]


def one_slow(*slow: str) -> list[Any]:
    marks = pytest.mark.slow
    return [pytest.param(n, marks=marks) if n in slow else n for n in RECIPES]


@pytest.mark.parametrize("name", one_slow("nothing new"))
def test_one_compiled_graph_serves_all_ranks(name: str) -> None:
    model, recipe = tiny_llava(layers=2), RECIPES[name]
    compiled, ranks = Compiled(model, recipe), set()
    for inputs in prompts():
        outputs = compiled(**inputs)
        kept = compiled.recorded.keep_sets
        assert_matches_oracle(outputs, kept, model, recipe, inputs)
        ranks.add(oracle_run(recipe, inputs).ranks[0])
    assert len(ranks) > 1
    assert len(compiled.recorded.graphs) == 1


def oracle_run(recipe: Recipe, inputs: Inputs) -> oracle.Prefill:
    model = tiny_llava(layers=2)
    [sample] = oracle.split_batch(model, **inputs)
    return oracle.prefill(model, recipe, sample)


@pytest.mark.parametrize("fullgraph", [True, False])
def test_a_plain_compile_of_one_length_follows_the_rank(fullgraph: bool) -> None:
    """Nothing marked, so lengths are numbers, and symbols are those that ranks make."""
    model, recipe = tiny_llava(layers=2), RECIPES[next(iter(RECIPES))]
    inputs, reports = prompts()[0], list[PruneReport]()
    told: dict[str, Any] = {"recipe": recipe, "inner": "aot_eager"}
    told["on_report"] = reports.append
    run: Any = torch.compile(
        model.forward, backend=vtprune_backend, options=told, fullgraph=fullgraph
    )
    with torch.no_grad():
        outputs = run(**inputs)
    [report] = reports
    assert_matches_oracle(outputs, report.keep_sets, model, recipe, inputs)


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_inductor_compiles_it(name: str) -> None:
    model, recipe = tiny_llava(layers=2), RECIPES[name]
    compiled = Compiled(model, recipe, inner="inductor")
    for inputs in prompts():
        outputs, run = compiled(**inputs), oracle_run(recipe, inputs)
        assert cache_lengths(outputs) == [keys.shape[1] for keys in run.keys]
        torch.testing.assert_close(outputs.logits[0], run.logits, atol=1e-4, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_onnx_runtime_runs_it(name: str) -> None:
    model, recipe = tiny_llava(layers=2), RECIPES[name]
    exported, report = export_onnx(model, batch(model, (5, 9), (2, 4)), recipe)
    assert "by rank after the last of 2 layers" in str(report)
    serialized = onnx_ir.to_proto(exported.components["prefill"].program)
    session = onnxruntime.InferenceSession(serialized.SerializeToString())
    names = [output.name for output in session.get_outputs()]
    for inputs in prompts():
        run = oracle_run(recipe, inputs)
        feed = inputs | {"position_ids": counted_positions(inputs)}
        arrays = session.run(None, {name: feed[name].numpy() for name in feed})
        found = dict(zip(names, map(torch.from_numpy, arrays), strict=True))
        for layer, keys in enumerate(run.keys):
            own = found[f"past_key_values.layers.{layer}.keys"]
            assert own.shape[2] == keys.shape[1]
        torch.testing.assert_close(found["logits"][0], run.logits, atol=1e-4, rtol=0)


# -------------------------------------------------------------------- the operators


def test_a_batch_is_refused() -> None:
    attended, roles = torch.zeros(2, 3, 3), torch.ones(2, 3, dtype=torch.long)
    with pytest.raises(
        InputError, match=r"batch: expected one sample.*found 2\..*calib"
    ):
        attention_rank.attention_rank(attended, roles)


@pytest.mark.parametrize("recycle", [None, (0.3, 0.1), (0.9, 0.5)])
@pytest.mark.parametrize("form", ["code", "paper"])
def test_a_graph_counts_as_the_recipe_does(
    recycle: tuple[float, float] | None, form: Any
) -> None:
    how = recycle and Recycle(tau=recycle[0], theta=recycle[1], form=form)
    rules = [cut.by_rank for r in RECIPES.values() for cut in r.cuts]
    ranks, visuals = (0, 1, 5, 23), (1, 6, 23, 576)
    for rule, found, visual in itertools.product(rules, ranks, visuals):
        assert rule is not None
        if found > visual:
            continue
        roles = torch.tensor([[0, *[VISUAL] * visual, INSTRUCTION, INSTRUCTION]])
        counts = attention_rank.counts(torch.tensor(found), roles, rule, how).tolist()
        dropped = rule.drop(found, visual)
        chosen, new = how.counts(dropped) if how else (0, 0)
        assert counts[attention_rank.KEPT] == visual + 3 - dropped
        assert counts[attention_rank.CLUSTERED] == max(1, chosen)
        assert (counts[attention_rank.CLUSTERS], counts[attention_rank.NEW]) == (
            max(1, new),
            new,
        )


@pytest.mark.parametrize(
    ("raters", "visual", "of"),
    [(5, 16, 3), (6, 16, 6), (23, 576, 17), (60, 30, 30), (0, 5, 0), (3, 0, 0)],
)
def test_onnx_finds_the_rank(raters: int, visual: int, of: int) -> None:
    """A product of [raters, of] and [of, visual] has rank ``of``."""
    random = np.random.default_rng(raters)
    product = random.random((raters, of)) @ random.random((of, visual))
    length = raters + visual + 2
    attended = random.random((1, length, length)).astype(np.float32)
    attended[0, length - raters :, 1 : 1 + visual] = product / max(1, of)
    roles = np.zeros((1, length), np.int64)
    roles[0, 1 : 1 + visual], roles[0, length - raters :] = VISUAL, INSTRUCTION
    function: Any = FUNCTIONS[0]
    model = function.to_model_proto()
    session = onnxruntime.InferenceSession(model.SerializeToString())
    [found] = session.run(None, {"attended": attended, "roles": roles})
    assert int(found) == of
    given = (torch.from_numpy(attended), torch.from_numpy(roles))
    assert int(attention_rank.attention_rank(*given)) == of
