"""The reference model: its pictures and questions, its training, its checkpoint."""

from __future__ import annotations

import collections
import csv
import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from examples.reference_model.batches import (
    HIDE_FROM,
    IGNORED,
    PADDING,
    PREFIX,
    QUESTIONS,
    PatchBatches,
    QuestionBatches,
    hidden_patches,
)
from examples.reference_model.model import (
    PATCH,
    VISUAL_TOKENS,
    build_processor,
    build_tokenizer,
)
from examples.reference_model.train import Plan, Training
from vtprune_fx.errors import InputError
from vtprune_fx.models.loading import open_checkpoint
from vtprune_fx.reference import CHECKPOINT
from vtprune_fx.reference.pictures import SIDE, SPLITS, Thing
from vtprune_fx.reference.questions import KINDS, Sample, draw_samples
from vtprune_fx.reference.tokenizer import IMAGE_ID

CPU = torch.device("cpu")
SHORT = Plan(see_steps=2, talk_steps=4, see_rows=2, talk_rows=2)
LONGER = Plan(see_steps=20, talk_steps=25, see_rows=8, talk_rows=4)


# ------------------------------------------------------------- pictures and questions


@pytest.fixture(scope="module")
def samples() -> list[Sample]:
    return list(draw_samples("test", 0, 600))


def test_the_same_arguments_draw_the_same(samples: list[Sample]) -> None:
    again = list(draw_samples("test", 0, 20))
    assert [s.questions for s in again] == [s.questions for s in samples[:20]]
    for one, other in zip(again, samples, strict=False):
        for first, second in zip(one.pictures, other.pictures, strict=True):
            np.testing.assert_array_equal(first.pixels, second.pixels)


@pytest.mark.parametrize(("split", "seed"), [("test", 1), ("train", 0)])
def test_other_arguments_draw_others(
    samples: list[Sample], split: str, seed: int
) -> None:
    others = list(draw_samples(split, seed, 20))
    assert all(
        (one.pictures[0].things != other.pictures[0].things)
        for one, other in zip(others, samples, strict=False)
    )


def test_splits_share_no_handwriting() -> None:
    scans = [set(part.tolist()) for part in SPLITS.values()]
    assert sum(map(len, scans)) == len(set.union(*scans)) == 1797


def test_every_kind_is_asked_and_no_answer_wins(samples: list[Sample]) -> None:
    answers: dict[str, collections.Counter[str]] = collections.defaultdict(
        collections.Counter
    )
    for sample in samples:
        answers[sample.questions[0].kind][sample.questions[0].answer] += 1
    assert set(answers) == set(KINDS)
    for kind, counts in answers.items():
        share = max(counts.values()) / counts.total()
        binary = kind in ("exists", "compare", "picture")
        assert share < (0.75 if binary else 0.55), kind
    assert 0.1 < sum(len(s.pictures) == 2 for s in samples) / len(samples) < 0.3


def test_things_do_not_touch_and_are_painted(samples: list[Sample]) -> None:
    for picture in (p for s in samples[:50] for p in s.pictures):
        assert picture.pixels.shape == (SIDE, SIDE, 3)
        for i, one in enumerate(picture.things):
            assert one.radius < min(one.x, one.y, SIDE - one.x, SIDE - one.y)
            for other in picture.things[:i]:
                apart = np.hypot(one.x - other.x, one.y - other.y)
                assert apart > one.radius + other.radius


def _the(things: list[Thing], words: str) -> Thing:
    """The one thing that all words of a name fit."""
    found = [
        thing
        for thing in things
        if all(
            word in (thing.size, thing.colour, thing.noun)
            or (word == "digit" and thing.is_digit)
            for word in words.split()
        )
    ]
    assert len(found) == 1, words
    return found[0]


def test_answers_are_right(samples: list[Sample]) -> None:
    """Answers from the words of the question and the things alone, written anew."""
    checked: collections.Counter[str] = collections.Counter()
    for sample in samples:
        question, things = sample.questions[0], list(sample.pictures[0].things)
        if len(sample.pictures) > 1:
            continue
        asked = question.text.rstrip("?.").split(". ")[-1].split(", then ")[-1]
        words = asked.split(" the ", 1)[-1]
        match question.kind:
            case "colour":
                thing = _the(things, words.removeprefix("colour of the "))
                right = thing.colour
            case "digit":
                right = _the(things, words).noun
            case "where":
                thing = _the(things, words)
                row = ("top", "middle", "bottom")[int(thing.y * 3 / SIDE)]
                column = ("left", "centre", "right")[int(thing.x * 3 / SIDE)]
                right = f"{row} {column}".replace("middle centre", "centre")
            case "compare":
                right = _compared(things, words)
            case _:
                continue
        assert question.answer == right, question
        checked[question.kind] += 1
    assert min(checked.values()) > 20
    assert len(checked) == 4


def _compared(things: list[Thing], words: str) -> str:
    one, other = (_the(things, name) for name in words.split(" larger than the "))
    return "yes" if one.radius > other.radius else "no"


# --------------------------------------------------------------------------- training


def test_a_row_asks_each_question_as_if_it_were_the_only_one() -> None:
    tokenizer = build_tokenizer()
    [batch] = QuestionBatches(tokenizer, 0, range(1), 2)
    seen = batch.attention_mask()[:, 0]
    turns = batch.turns[0]
    second = (turns == 2).nonzero()[:, 0]
    attended = set(turns[seen[0, second[-1]]].tolist())
    assert attended == {PREFIX, 2}
    first = (turns == 1).nonzero()[:, 0]
    assert batch.positions[0, second[0]] == batch.positions[0, first[0]]
    said = batch.labels[0][batch.labels[0] != IGNORED]
    assert tokenizer.decode(said).count("</s>") == int(turns.max())
    assert (batch.labels[batch.turns == PADDING] == IGNORED).all()


def test_a_row_reads_like_the_processors_prompt() -> None:
    tokenizer = build_tokenizer()
    processor: Any = build_processor(tokenizer)
    [batch] = QuestionBatches(tokenizer, 0, range(1), 2)
    ids = batch.ids[0][(batch.turns[0] == PREFIX) | (batch.turns[0] == 1)].tolist()
    text = str(tokenizer.decode(ids)).split(" ASSISTANT:")[0]
    question = text.split("<image>\n")[-1]
    images = text.count("<image>") // VISUAL_TOKENS
    content = [{"type": "image"}] * images + [{"type": "text", "text": question}]
    prompt = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True
    )
    blank = [Image.new("RGB", (SIDE, SIDE))] * images
    expected = processor(images=blank, text=prompt)["input_ids"][0]
    assert ids[: len(expected)] == expected


def test_what_an_answer_needs_is_never_hidden() -> None:
    rng = np.random.default_rng(0)
    shares = []
    for sample in draw_samples("train", 0, 40):
        hidden = hidden_patches(rng, sample)
        assert hidden.shape == (1 + QUESTIONS, VISUAL_TOKENS * len(sample.pictures))
        everyone, asked, *_ = hidden.reshape(
            1 + QUESTIONS, -1, SIDE // PATCH, SIDE // PATCH
        )
        [question] = sample.questions
        for shown, unseen, picture in zip(
            everyone, asked, sample.pictures, strict=True
        ):
            shares.append(np.mean(shown))
            assert (unseen >= shown).all()
            for thing in picture.things:
                middle = int(thing.y // PATCH), int(thing.x // PATCH)
                assert not shown[middle]
                assert not unseen[middle] or thing not in question.about
    assert 0.2 < np.mean(shares) < 0.6
    assert min(shares) == 0


def test_a_question_rests_on_the_things_that_it_names(samples: list[Sample]) -> None:
    for sample in samples:
        [question] = sample.questions
        things = [thing for picture in sample.pictures for thing in picture.things]
        assert set(question.about) <= set(things)
        match question.kind:
            case "count":
                assert len(question.about) == int(question.answer)
            case "exists":
                assert len(question.about) == (question.answer == "yes")
            case "compare":
                assert len(question.about) == 2
            case _:
                assert len(question.about) == 1


def test_nobody_attends_to_what_is_hidden() -> None:
    [batch] = QuestionBatches(build_tokenizer(), 0, range(HIDE_FROM, HIDE_FROM + 1), 2)
    seen = batch.attention_mask()[:, 0]
    for ids, turns, attended, hidden in zip(
        batch.ids, batch.turns, seen, batch.hidden, strict=True
    ):
        assert (ids[hidden.any(0)] == IMAGE_ID).all()
        things = 0
        for turn in range(int(turns.max()) + 1):
            assert not attended[turns == turn][:, hidden[turn]].any()
            things += int((hidden[turn] & ~hidden[PREFIX]).sum())
        assert things > 0
    [before] = QuestionBatches(build_tokenizer(), 0, range(HIDE_FROM - 1, HIDE_FROM), 2)
    assert not before.hidden.any()


def test_patches_are_labelled_where_things_are() -> None:
    [batch] = PatchBatches(0, range(1), 4)
    shown = batch.nouns > 0
    assert 0.05 < shown.float().mean() < 0.6
    assert (batch.colours[shown] != IGNORED).all()
    assert (batch.colours[~shown] == IGNORED).all()
    assert batch.centres.sum(1).min() >= 3


def _losses(folder: Path) -> dict[str, list[float]]:
    losses: dict[str, list[float]] = {"see": [], "talk": []}
    with (folder / "checkpoint" / "training.csv").open() as file:
        for entry in csv.DictReader(file):
            losses[entry["stage"]].append(float(entry["loss"]))
    return losses


@pytest.mark.slow
def test_training_lowers_the_loss(tmp_path: Path) -> None:
    Training(tmp_path, LONGER, CPU).run()
    for stage in _losses(tmp_path).values():
        assert stage[-1] < 0.98 * stage[0]


def test_training_goes_on_where_it_stopped(tmp_path: Path) -> None:
    checkpoint = Training(tmp_path / "whole", SHORT, CPU).run()
    losses = _losses(tmp_path / "whole")  # behind the first step and the last
    assert [len(losses[stage]) for stage in ("see", "talk")] == [2, 2]
    model, processor = open_checkpoint(checkpoint)
    assert model.num_parameters() < 3e6
    assert processor.tokenizer("yes")["input_ids"]

    stopping = Training(tmp_path / "parts", SHORT, CPU)
    talk_loss, steps = stopping._talk_loss, 0

    def stop_at_two(batch: Any) -> torch.Tensor:
        nonlocal steps
        steps += 1
        if steps == 2:
            stopping._save()
            raise KeyboardInterrupt
        return talk_loss(batch)

    stopping._talk_loss = stop_at_two  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        stopping.run()
    Training(tmp_path / "parts", SHORT, CPU).run()
    for name in ("model.safetensors", "tokenizer.json"):
        one, other = (
            (tmp_path / run / "checkpoint" / name).read_bytes()
            for run in ("whole", "parts")
        )
        assert one == other, name


def test_another_plan_does_not_go_on(tmp_path: Path) -> None:
    Training(tmp_path, SHORT, CPU)._save()
    with pytest.raises(InputError, match="talk_steps=5"):
        Training(tmp_path, dataclasses.replace(SHORT, talk_steps=5), CPU)


# ------------------------------------------------------------------------- checkpoint


def test_the_checkpoint_loads_without_our_code() -> None:
    script = (
        "import sys\n"
        "from transformers import AutoProcessor, LlavaForConditionalGeneration\n"
        f"folder = {str(CHECKPOINT)!r}\n"
        "model = LlavaForConditionalGeneration.from_pretrained(folder)\n"
        "processor = AutoProcessor.from_pretrained(folder)\n"
        "assert not any(n.split('.')[0] == 'vtprune_fx' for n in sys.modules)\n"
        "print(type(processor).__name__, model.dtype, model.training)\n"
    )
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["LlavaProcessor", "torch.float32", "False"]


def test_the_checkpoint_is_small_and_deep() -> None:
    assert sum(file.stat().st_size for file in CHECKPOINT.iterdir()) < 12e6
    model, _ = open_checkpoint(CHECKPOINT)
    text = model.config.get_text_config()
    assert text.num_hidden_layers >= 8
    assert text.num_attention_heads == text.num_key_value_heads >= 4
    assert VISUAL_TOKENS >= 144
    assert {file.suffix for file in CHECKPOINT.iterdir()} <= {
        ".json",
        ".jinja",
        ".md",
        ".csv",
        ".png",
        ".safetensors",
    }
