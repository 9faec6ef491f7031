"""Generation on ONNX Runtime: all of transformers', turns, sizes, interoperability."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LogitsProcessorList, StoppingCriteriaList
from transformers.exporters import ExportedModel
from transformers.exporters.runners.runner_onnx import OnnxModelRunner
from transformers.generation.streamers import BaseStreamer

from tests.tiny import (
    CACHE,
    IMAGE,
    Inputs,
    batch,
    counted_positions,
    recipe_for,
    tiny_llava,
)
from vtprune_fx import oracle
from vtprune_fx.errors import InputError
from vtprune_fx.export import load, write_onnx
from vtprune_fx.models.arguments import cache_of
from vtprune_fx.models.loading import open_checkpoint
from vtprune_fx.recipes.schema import Recipe
from vtprune_fx.reference.random_llava import CheckpointSpec, build_checkpoint

pytestmark = pytest.mark.compat

TEXT = torch.tensor([[0, 0, 1, 40, 41, 42], [1, 50, 51, 52, 53, 54]])
"""Two prompts of text, the first padded with two tokens."""

NEW = 5


@pytest.fixture(scope="module")
def exported(onnx_folder: Path) -> Any:
    return load(onnx_folder)


@pytest.fixture(scope="module")
def original(onnx_folder: Path) -> Any:
    return open_checkpoint(onnx_folder.parent / "checkpoint")[0]


def answers(model: Any, **options: Any) -> list[list[int]]:
    """What follows two prompts of text, by a seed."""
    torch.manual_seed(3)
    found: Tensor = model.generate(
        TEXT, attention_mask=(TEXT > 0).long(), max_new_tokens=NEW, **options
    )
    return found[:, TEXT.shape[1] :].tolist()


OPTIONS: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "top_k": 20, "temperature": 0.7},
    "a processor of transformers'": {"do_sample": False, "repetition_penalty": 5.0},
    "beams": {"num_beams": 3, "do_sample": False},
    "several sequences": {"do_sample": True, "num_return_sequences": 2},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_text_is_continued_as_by_the_original(
    exported: Any, original: Any, options: dict[str, Any]
) -> None:
    assert answers(exported, **options) == answers(original, **options)


def test_a_processor_and_a_criterion_of_ones_own_are_asked(exported: Any) -> None:
    def always_seven(ids: Tensor, scores: Tensor) -> Tensor:
        forced = torch.full_like(scores, -torch.inf)
        forced[:, 7] = 0
        return forced

    def after_three(ids: Tensor, scores: object) -> Tensor:
        return torch.full((len(ids),), ids.shape[1] >= TEXT.shape[1] + 3)

    found = answers(
        exported,
        do_sample=False,
        logits_processor=LogitsProcessorList([always_seven]),
        stopping_criteria=StoppingCriteriaList([after_three]),
    )
    assert found == [[7] * 3] * 2


class Heard(BaseStreamer):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.ended = False

    def put(self, value: Tensor) -> None:
        self.ids += value.flatten().tolist()

    def end(self) -> None:
        self.ended = True


def test_tokens_are_streamed(exported: Any) -> None:
    heard = Heard()
    prompt = TEXT[1:]
    found = exported.generate(
        prompt, max_new_tokens=NEW, do_sample=False, streamer=heard
    )
    assert heard.ids == found[0].tolist()
    assert heard.ended


def test_a_prompt_of_text_is_read_in_one_run(
    exported: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs, run = [], OnnxModelRunner.__call__

    def counting(self: OnnxModelRunner, **inputs: Any) -> Any:
        runs.append(inputs["input_ids"].shape[1])
        return run(self, **inputs)

    monkeypatch.setattr(OnnxModelRunner, "__call__", counting)
    exported.generate(TEXT[1:], max_new_tokens=3, do_sample=False, eos_token_id=None)
    assert runs == [6, 1, 1]


# ------------------------------------------------------------------- prompts and turns


def pictures(model: Any, *prompts: tuple[int, ...]) -> Inputs:
    """A batch for the checkpoint's model, whose placeholder has another id."""
    inputs = batch(tiny_llava(layers=3), *prompts)
    ids = inputs["input_ids"]
    inputs["input_ids"] = torch.where(
        ids == IMAGE, model.config.image_token_id, ids.clamp(min=10)
    )
    inputs["input_ids"][inputs["attention_mask"] == 0] = 0
    return inputs


def samples_of(model: Any, inputs: Inputs) -> list[oracle.Sample]:
    positions = counted_positions(inputs)
    return oracle.split_batch(model, **inputs, position_ids=positions)


def greedy_turns(
    model: Any, recipe: Recipe, sample: oracle.Sample, turn: list[int], new: int
) -> list[int]:
    """The oracle's answer, then a turn, then its answer to that."""
    state = oracle.prefill(model, recipe, sample)
    said: list[int] = []
    logits = state.logits[-1]
    for _ in range(new):
        said.append(int(logits.argmax()))
        logits = oracle.step(model, state, said[-1])
    for token in turn:
        logits = oracle.step(model, state, token)
    said += turn
    for _ in range(new):
        said.append(int(logits.argmax()))
        logits = oracle.step(model, state, said[-1])
    return said


def test_a_second_turn_goes_on_from_a_pruned_cache(
    exported: Any, original: Any
) -> None:
    inputs = pictures(original, (5, 9), (2, 4))
    options: Any = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    first = exported.generate(**inputs, **options, return_dict_in_generate=True)
    turn = torch.tensor([[20, 21, 22], [30, 31, 32]])
    ids = torch.cat([first.sequences, turn], dim=1)
    more = torch.ones(2, ids.shape[1] - inputs["input_ids"].shape[1], dtype=torch.long)
    mask = torch.cat([inputs["attention_mask"], more], dim=1)
    cache = cache_of(first)
    second = exported.generate(ids, attention_mask=mask, **{CACHE: cache}, **options)
    found = second[:, inputs["input_ids"].shape[1] :].tolist()
    recipe = exported.manifest.recipe
    samples = samples_of(original, inputs)
    expected = [
        greedy_turns(original, recipe, sample, asked, 4)
        for sample, asked in zip(samples, turn.tolist(), strict=True)
    ]
    assert found == expected


def test_a_second_image_on_a_filled_cache_is_refused(
    exported: Any, original: Any
) -> None:
    inputs = pictures(original, (5, 9))
    cache = cache_of(exported(**inputs))
    with pytest.raises(InputError, match="images in the first prompt alone"):
        exported(**inputs, **{CACHE: cache})


# ------------------------------------------------------------------- interoperability


def test_transformers_alone_loads_and_runs_an_export(
    onnx_folder: Path, exported: Any, original: Any
) -> None:
    plain: Any = ExportedModel.from_pretrained(onnx_folder, device="cpu")
    inputs = pictures(original, (5, 9), (2, 4))
    found = plain.runners["prefill"](**inputs, position_ids=counted_positions(inputs))
    outputs = exported(**inputs)
    torch.testing.assert_close(found["logits"], outputs.logits, rtol=0, atol=0)
    names = {spec.name for spec in plain.runners["prefill"].session.get_inputs()}
    assert names == {"input_ids", "attention_mask", "position_ids", "pixel_values"}
    names = {spec.name for spec in plain.runners["decode"].session.get_outputs()}
    cached = {
        f"output.past_key_values.layers.{layer}.{kind}"
        for layer in range(3)
        for kind in ("keys", "values")
    }
    assert names == {"logits", *cached}


# ------------------------------------------------------------------- one for all


BATCHES: dict[str, list[tuple[int, ...]]] = {
    "one sample, 600 tokens": [(5, 19)],
    "one sample, 900 tokens": [(300, 24)],
    "two samples, 600 and 900 tokens": [(14, 10), (24, 300)],
    "three samples, 650 to 800 tokens": [(60, 14), (124, 100), (1, 150)],
    "four samples, padded": [(3, 30), (40, 4), (0, 25), (100, 200)],
    "two images": [(3, 4, 6)],
}


@pytest.mark.slow
def test_one_export_serves_batches_lengths_images_and_text(tmp_path: Path) -> None:
    """576 visual tokens an image, as in LLaVA-1.5; only the widths are tiny."""
    spec = CheckpointSpec(layers=3, hidden=32, heads=4, intermediate=48)
    recipe = recipe_for(3, {0: 100, 1: 200, 2: 50}, visual_tokens=576)
    checkpoint = build_checkpoint(tmp_path / "checkpoint", spec)
    original: Any
    original, processor = open_checkpoint(checkpoint)
    write_onnx(original, processor, recipe, tmp_path / "onnx")
    exported: Any = load(tmp_path / "onnx")
    options: Any = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    image = torch.full((576,), original.config.image_token_id)
    generator = torch.Generator().manual_seed(0)
    for name, prompts in BATCHES.items():
        inputs = drawn(prompts, image, generator)
        ids = exported.generate(**inputs, **options)
        expected = [
            oracle.generate(original, recipe, sample, 4)
            for sample in samples_of(original, inputs)
        ]
        assert ids[:, -4:].tolist() == expected, name
    for shape in ((1, 600), (4, 900)):
        words = torch.randint(10, 90, shape, generator=generator)
        mask = torch.ones_like(words)
        found = exported.generate(words, attention_mask=mask, **options)
        expected = original.generate(words, attention_mask=mask, **options)
        assert found.tolist() == expected.tolist(), f"text alone, {shape}"


def drawn(
    prompts: list[tuple[int, ...]], image: Tensor, generator: torch.Generator
) -> Inputs:
    """A batch padded on the left, an image in each gap between counts of text."""
    rows = []
    for first, *more in prompts:
        parts = [torch.randint(10, 90, (first,), generator=generator)]
        for count in more:
            parts += [image, torch.randint(10, 90, (count,), generator=generator)]
        rows.append(torch.cat(parts))
    longest = max(map(len, rows))
    ids = torch.stack([torch.nn.functional.pad(r, (longest - len(r), 0)) for r in rows])
    images = sum(len(prompt) - 1 for prompt in prompts)
    pixels = torch.randn(images, 3, 336, 336, generator=generator)
    return {
        "input_ids": ids,
        "attention_mask": (ids > 0).long(),
        "pixel_values": pixels,
    }
