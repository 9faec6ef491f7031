"""Accuracy of the reference model, dense and pruned, and how it is reported."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import VipLlavaConfig, VipLlavaForConditionalGeneration

from tests.test_cli_recipes import Run, io, run
from tests.tiny import recipe_for
from vtprune_fx.errors import InputError
from vtprune_fx.evaluation import evaluate as evaluation
from vtprune_fx.evaluation.evaluate import Backend, evaluate, inputs_of
from vtprune_fx.evaluation.results import Evaluation, paired, wilson
from vtprune_fx.models.loading import load_model, load_processor, open_checkpoint
from vtprune_fx.recipes.counting import Geometry, cost
from vtprune_fx.recipes.loading import load_recipe
from vtprune_fx.reference import CHECKPOINT
from vtprune_fx.reference.questions import Sample, draw_samples
from vtprune_fx.reference.random_llava import CheckpointSpec, build_checkpoint

__all__ = ["io"]  # a fixture

RECIPE = load_recipe("fitprune-reference-55")
FRESH = 2000
"""A seed that nothing was trained or chosen on."""
ASKED = 30
"""Questions."""


def samples(count: int) -> list[Sample]:
    return list(draw_samples("test", FRESH, count))


@pytest.mark.parametrize(
    ("right", "total", "low", "high"),
    # Newcombe 1998, table I: method 3, without continuity correction.
    [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_interval_of_a_share(right: int, total: int, low: float, high: float) -> None:
    assert wilson(right, total) == pytest.approx((low, high), abs=5e-5)


def test_interval_of_a_change() -> None:
    before, after = [True] * 6 + [False] * 4, [True] * 4 + [False] * 6
    change, spread = paired(before, after)
    assert change == pytest.approx(-0.2)
    # Two of ten differ by one: variance .2 - .04, over ten questions.
    assert spread == pytest.approx(1.96 * (0.16 / 10) ** 0.5)
    assert paired(before, before) == (0.0, 0.0)


@pytest.fixture(scope="module")
def answered() -> Evaluation:
    """Some questions, by the oracle: dense, pruned, and the worst tokens kept."""
    recipes = [RECIPE, RECIPE.baseline("inverted")]
    return evaluate(*open_checkpoint(CHECKPOINT), recipes, samples(ASKED))


def test_dense_answers_are_those_of_transformers(answered: Evaluation) -> None:
    model: Any = load_model(CHECKPOINT)
    processor = load_processor(CHECKPOINT)
    for sample, said in zip(samples(10), answered.results[0].answers, strict=False):
        inputs = inputs_of(processor, [sample])
        ids = model.generate(**inputs, max_new_tokens=12)
        new = ids[0, inputs["input_ids"].shape[1] :]
        assert str(processor.decode(new, skip_special_tokens=True)).strip() == said


def test_models_beside_llava_are_asked_too(tmp_path: Path) -> None:
    """A VipLLaVA, whose projector reads two layers of the tower."""
    spec = CheckpointSpec(image_size=56, layers=2, hidden=32, heads=4, vision_layers=2)
    llava: Any
    llava, processor = open_checkpoint(build_checkpoint(tmp_path / "llava", spec))
    config = VipLlavaConfig(
        vision_config=llava.config.vision_config,
        text_config=llava.config.text_config,
        image_token_index=llava.config.image_token_id,
        vision_feature_layer=[-2, -1],
    )
    torch.manual_seed(0)
    model: Any = VipLlavaForConditionalGeneration(config).eval()
    found = evaluate(model, processor, [recipe_for(2, {0: 5})], samples(3))
    dense, pruned = found.results
    for sample, said in zip(samples(3), dense.answers, strict=True):
        inputs = inputs_of(processor, [sample])
        ids = model.generate(
            **inputs, max_new_tokens=12, eos_token_id=processor.tokenizer.eos_token_id
        )
        new = ids[0, inputs["input_ids"].shape[1] :]
        assert str(processor.decode(new, skip_special_tokens=True)).strip() == said
    assert pruned.macs_saved > 0


def test_scores_matter(answered: Evaluation) -> None:
    dense, fitprune, inverted = answered.results
    assert dense.accuracy > 0.9
    assert fitprune.accuracy > 0.9
    assert inverted.accuracy < fitprune.accuracy - 0.2


def test_costs_are_those_of_the_prompts(answered: Evaluation) -> None:
    model, processor = open_checkpoint(CHECKPOINT)
    geometry = Geometry.from_config(model.config)
    dense = spent = cache = 0
    for sample in samples(ASKED):
        visual = 144 * len(sample.pictures)
        whole = inputs_of(processor, [sample])["input_ids"].shape[1]
        work = cost(RECIPE, geometry, visual, whole - visual).total
        dense, spent = dense + work.dense_macs, spent + work.pruned_macs
        cache += work.pruned_cache_bytes
    result = answered.results[1]
    assert result.macs_saved == pytest.approx(1 - spent / dense)
    assert result.cache_bytes == pytest.approx(cache / ASKED)
    assert answered.results[0].macs_saved == 0
    assert 0.5 < result.macs_saved < 0.6


def _answers(backend: Backend, count: int) -> list[tuple[str, ...]]:
    found = evaluate(*open_checkpoint(CHECKPOINT), [RECIPE], samples(count), backend)
    return [result.answers for result in found.results]


@pytest.mark.slow
def test_onnx_runtime_answers_like_the_oracle(answered: Evaluation) -> None:
    expected = [result.answers for result in answered.results[:2]]
    assert _answers("onnx", ASKED) == expected


@pytest.mark.slow
def test_compiled_answers_like_the_oracle(answered: Evaluation) -> None:
    expected = [result.answers for result in answered.results[:2]]
    assert _answers("compile", ASKED) == expected


@pytest.fixture(scope="module")
def fresh() -> Evaluation:
    """2,000 questions, by the oracle."""
    recipes = [RECIPE, RECIPE.baseline("random"), RECIPE.baseline("inverted")]
    return evaluate(*open_checkpoint(CHECKPOINT), recipes, samples(2000))


@pytest.mark.slow
def test_fitprune_loses_half_a_point_at_most(fresh: Evaluation) -> None:
    dense, fitprune, *_ = fresh.results
    assert fitprune.accuracy >= dense.accuracy - 0.005


@pytest.mark.slow
def test_the_claims_on_fresh_questions(fresh: Evaluation) -> None:
    found = fresh
    dense, fitprune, random, inverted = (result.accuracy for result in found.results)
    assert dense >= 0.95
    for kind in found.kinds:
        assert found.accuracy_of(found.results[0], kind) >= 0.9, kind
    assert found.results[1].macs_saved >= 0.55
    assert random <= fitprune - 0.05
    assert inverted <= random - 0.05


def test_the_command_prints_writes_and_draws(tmp_path: Path, io: Run) -> None:
    files = ["--output", str(tmp_path / "e.json"), "--plot", str(tmp_path / "e.png")]
    options = ["--limit", "6", "--baselines", *files]
    status, out, _ = run(*io, "eval", *options)
    assert status == 0
    assert "dense" in out
    told = json.loads((tmp_path / "e.json").read_text())
    names = [result["recipe"] for result in told["results"]]
    scores = ("", "-random", "-uniform", "-inverted")
    assert names == ["dense", *(RECIPE.name + score for score in scores)]
    assert [set(q["answers"]) for q in told["questions"]] == [set(names)] * 6
    with (tmp_path / "e.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["recipe"] for row in rows] == names
    assert float(rows[1]["macs_saved"]) == pytest.approx(
        told["results"][1]["macs_saved"], abs=1e-4
    )
    with Image.open(tmp_path / "e.png") as picture:
        assert picture.width > 500


def test_last_batch_is_as_large_as_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "BATCH", 4)
    group = [(i, sample) for i, sample in enumerate(samples(10))]
    batches = [[i for i, _ in batch] for batch in evaluation._batches(group)]
    assert batches == [[0, 1, 2, 3], [4, 5, 6, 7], [6, 7, 8, 9]]
    assert [len(batch) for batch in evaluation._batches(group[:3])] == [3]


def test_the_oracle_refuses_what_it_does_not_know() -> None:
    _, processor = open_checkpoint(CHECKPOINT)
    other: Any = torch.nn.Module()
    other.config = open_checkpoint(CHECKPOINT)[0].config
    with pytest.raises(InputError, match="--backend compile or onnx"):
        evaluate(other, processor, [RECIPE], samples(1))
