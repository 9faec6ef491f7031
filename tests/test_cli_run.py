"""The commands that run models: generate, export, demo, and what they refuse."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from tests.test_cli_recipes import Run, io, run
from tests.tiny import recipe_for
from vtprune_fx.cli import answer
from vtprune_fx.cli.demo import run_demo
from vtprune_fx.evaluation.picture import sample_photo
from vtprune_fx.export import write_onnx
from vtprune_fx.models.loading import open_checkpoint
from vtprune_fx.recipes.loading import load_recipe
from vtprune_fx.reference import CHECKPOINT
from vtprune_fx.reference.random_llava import CheckpointSpec, build_checkpoint
from vtprune_fx.reference.task import reference_task

__all__ = ["io"]  # a fixture

LAYERS = 2
SPEC = CheckpointSpec(
    image_size=56, layers=LAYERS, hidden=32, heads=4, intermediate=48, vision_layers=2
)
RECIPE = recipe_for(LAYERS, {0: 5, 1: 3})


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a checkpoint, its export, a recipe and a photograph."""
    folder = tmp_path_factory.mktemp("cli")
    build_checkpoint(folder / "checkpoint", SPEC)
    (folder / "recipe.json").write_text(RECIPE.to_json())
    sample_photo().save(folder / "photo.png")
    write_onnx(*open_checkpoint(folder / "checkpoint"), RECIPE, folder / "onnx")
    return folder


def arguments(root: Path, model: str, *more: str) -> list[str]:
    photo = str(root / "photo.png")
    question = ["--image", photo, "--prompt", "What is on the table?"]
    return ["generate", str(root / model), *question, "--max-new-tokens", "6", *more]


def test_both_runtimes_give_the_same_answer(root: Path, io: Run) -> None:
    recipe = ["--recipe", str(root / "recipe.json"), "--inner", "eager"]
    _, compiled, _ = run(*io, *arguments(root, "checkpoint", *recipe))
    status, exported, _ = run(*io, *arguments(root, "onnx"))
    assert status == 0
    assert len(exported.split()) >= 3
    assert exported == compiled


def test_a_question_without_an_image_is_answered(root: Path, io: Run) -> None:
    texts = ["--prompt", "Why?", "--max-new-tokens", "4"]
    status, out, _ = run(*io, "generate", str(root / "onnx"), *texts)
    assert status == 0
    assert out.strip()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--image", "{root}/recipe.json"], "recipe.json"),
        (["--image", "{root}/nothing.png"], "nothing.png"),
        (["--recipe", "fitprune-llava-1.5-7b-60"], "none for an exported folder"),
    ],
    ids=["an image that is none", "no such image", "a second recipe"],
)
def test_generate_refuses(root: Path, io: Run, more: list[str], message: str) -> None:
    filled = [item.format(root=root) for item in more]
    status, out, err = run(*io, *arguments(root, "onnx", *filled))
    assert (status, out) == (1, "")
    assert message in err
    assert "expected" in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("model", "recipe", "message"),
    [
        ("onnx/processor_config.json", "recipe.json", "checkpoint folder"),
        ("empty", "recipe.json", "config.json"),
        ("checkpoint", "nothing.json", "vtprune recipes"),
        ("checkpoint", "published", "a layer below 2"),
    ],
    ids=["a file", "a folder that is no checkpoint", "no such recipe", "too deep"],
)
def test_export_refuses_and_leaves_nothing_behind(
    root: Path, tmp_path: Path, io: Run, model: str, recipe: str, message: str
) -> None:
    (root / "empty").mkdir(exist_ok=True)
    named = recipe != "published"
    chosen = str(root / recipe) if named else "fitprune-llava-1.5-7b-60"
    output = tmp_path / "new"
    options = ["--recipe", chosen, "--output", str(output)]
    status, _, err = run(*io, "export", "onnx", str(root / model), *options)
    assert status == 1
    assert message in err
    assert list(tmp_path.iterdir()) == []


def test_export_says_at_once_that_a_folder_is_taken(
    root: Path, tmp_path: Path, io: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    opened = "vtprune_fx.models.loading.open_checkpoint"
    monkeypatch.setattr(opened, None)  # not reached
    options = ["--recipe", str(root / "recipe.json"), "--output", str(tmp_path)]
    status, _, err = run(*io, "export", "onnx", str(root / "checkpoint"), *options)
    assert status == 1
    assert "thesis.txt" in err


def test_the_demo_compares_draws_and_reports(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    task = reference_task(0)
    outcomes = run_demo(tmp_path, root / "checkpoint", RECIPE, task, inner="eager")
    out = capsys.readouterr().out
    assert [outcome.runtime for outcome in outcomes] == [
        "torch.compile",
        "ONNX Runtime",
    ]
    assert outcomes[0].tokens == outcomes[1].tokens
    assert "after each layer, of 16: 11 8" in " ".join(out.split())
    assert f"Question: {task.prompt}" in " ".join(out.split())
    assert f"right answer:   {task.answer!r}" in out
    for when in ("before pruning: '", "after pruning:  '"):
        assert when in out
    assert {"onnx", "picture.png", "kept.png", "report.json"} <= {
        path.name for path in tmp_path.iterdir()
    }
    with Image.open(tmp_path / "kept.png") as picture:
        assert picture.format == "PNG"


@pytest.mark.slow
def test_the_demo_on_the_reference_model_answers_right(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    task, recipe = reference_task(0), load_recipe("fitprune-reference-55")
    run_demo(tmp_path, CHECKPOINT, recipe, task, inner="eager")
    out = capsys.readouterr().out
    left = recipe.tokens_per_layer(144, recipe.layers)
    assert " ".join(map(str, left)) in " ".join(out.split())
    for when in ("right answer:   ", "before pruning: ", "after pruning:  "):
        assert f"{when}{task.answer!r}" in out


def test_the_answer_is_greedy(root: Path) -> None:
    photo = root / "photo.png"
    texts = {
        answer.answer(str(root / "onnx"), "What?", photo, None, 5, "") for _ in range(2)
    }
    assert len(texts) == 1
