"""Nothing of the user's is overwritten; a wrong output is refused before the work."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from vtprune_fx.cli import demo as demo_steps
from vtprune_fx.cli.entry import app
from vtprune_fx.errors import InputError
from vtprune_fx.evaluation.curve import check_curve
from vtprune_fx.export import load, write_triton
from vtprune_fx.export.folder import check_free, written_at_once
from vtprune_fx.recipes import load_recipe
from vtprune_fx.reference import CHECKPOINT
from vtprune_fx.reference.task import reference_task


def contents(folder: Path) -> dict[str, bytes | str | None]:
    """All that is in a folder, at any depth: content of files, targets of links."""
    return {
        str(path.relative_to(folder)): (
            os.readlink(path)
            if path.is_symlink()
            else path.read_bytes()
            if path.is_file()
            else None
        )
        for path in sorted(folder.rglob("*"))
    }


def refuse_work(*_: object, **__: object) -> Any:
    pytest.fail("the work began")


# ----------------------------------------------------------------------------- folders


def test_the_current_folder_is_refused_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with (
        pytest.raises(InputError, match="found the current folder"),
        written_at_once(Path()),
    ):
        refuse_work()


def test_a_link_is_neither_replaced_nor_followed(tmp_path: Path) -> None:
    (tmp_path / "v1").mkdir()
    (tmp_path / "current").symlink_to("v1")
    (tmp_path / "nowhere").symlink_to("v2")
    before = contents(tmp_path)
    for name, found in (("current", "found a link"), ("nowhere", "found a link")):
        with pytest.raises(InputError, match=found):
            check_free(tmp_path / name)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("name", ["file/export", "file", "pipe", "a" * 300, "a\0b"])
def test_what_cannot_be_a_folder_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("mine")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="output folder"):
        check_free(tmp_path / name)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc is Linux's")
def test_a_disk_that_takes_no_files_is_refused() -> None:
    with pytest.raises(InputError, match="takes no files"):
        check_free(Path("/proc/export"))


def test_a_full_disk_is_named(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    with (
        pytest.raises(InputError, match="disk with space"),
        written_at_once(tmp_path / "old"),
    ):
        raise OSError(28, os.strerror(28))
    assert contents(tmp_path) == {"old": None}


def test_what_a_killed_export_left_is_removed_by_the_next(tmp_path: Path) -> None:
    folder = tmp_path / "export"
    with written_at_once(folder) as scratch:
        left = tmp_path / f"{scratch.name[:-3]}xyz"
        shutil.copytree(scratch, left)
        (left / "half").write_text("half")
    shutil.rmtree(folder)
    assert len(contents(tmp_path)) == 2
    with written_at_once(folder) as scratch:
        (scratch / "x").write_text("new")
    assert contents(tmp_path) == {"export": None, "export/x": b"new"}


# ------------------------------------------------------------------------------ Triton


@pytest.mark.parametrize("inside", [".", "models"])
def test_a_triton_repository_in_the_export_is_refused(
    onnx_folder: Path, tmp_path: Path, inside: str
) -> None:
    copy = shutil.copytree(onnx_folder, tmp_path / "onnx")
    before = contents(copy)
    with pytest.raises(InputError, match="found a part of the input"):
        write_triton(copy, copy / inside, 4)
    assert contents(copy) == before
    load(copy)


def test_a_triton_repository_that_is_a_file_is_refused(
    onnx_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InputError, match="found a file"):
        write_triton(onnx_folder, tmp_path / "file", 4)


def test_a_link_in_a_triton_repository_is_not_replaced(
    onnx_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "onnx_decode").symlink_to("nowhere")
    with pytest.raises(InputError, match="a name that is not taken"):
        write_triton(onnx_folder, tmp_path, 4)
    assert contents(tmp_path) == {"onnx_decode": "nowhere"}


# -------------------------------------------------------------------------------- demo


@pytest.mark.parametrize(
    "name", ["picture.png", "kept.png", "report.json", "onnx/mine", "onnx-dense/mine"]
)
def test_the_demo_overwrites_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("mine")
    before = contents(tmp_path)
    monkeypatch.setattr(demo_steps, "_open", refuse_work)
    recipe = load_recipe("fitprune-reference-55")
    with pytest.raises(InputError, match=r"output f|output folder"):
        demo_steps.run_demo(tmp_path, CHECKPOINT, recipe, reference_task(0))
    assert contents(tmp_path) == before


def test_the_demo_replaces_its_own_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class AskedError(Exception):
        pass

    def ask(*_: object) -> None:
        raise AskedError

    monkeypatch.setattr(demo_steps, "_ask_oracle", ask)
    recipe = load_recipe("fitprune-reference-55")
    for _ in range(2):
        with pytest.raises(AskedError):
            demo_steps.run_demo(tmp_path, CHECKPOINT, recipe, reference_task(0))
    assert list(contents(tmp_path)) == ["picture.png"]


# ---------------------------------------------------------------- results and recipes


def refused(*arguments: object) -> str:
    """What a command that is refused says."""
    run = CliRunner().invoke(app, list(map(str, arguments)))
    assert isinstance(run.exception, InputError), run.exception
    return str(run.exception)


@pytest.mark.parametrize(("option", "name"), [("plot", "e.png"), ("plot", "e.csv")])
def test_eval_replaces_no_file_of_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, option: str, name: str
) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr("vtprune_fx.models.loading.open_checkpoint", refuse_work)
    (tmp_path / name).write_text("mine")
    found = refused("eval", "--limit", 1, f"--{option}", tmp_path / "e.png")
    assert "a file that this command did not write" in found
    assert contents(tmp_path) == {name: b"mine"}


def test_a_plot_named_as_its_numbers_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"a name that ends in \.png"):
        check_curve(tmp_path / "e.csv")


@pytest.mark.parametrize("name", ["folder", "mine.json", "mine.json/e.json"])
def test_eval_refuses_a_wrong_output_before_the_questions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr("vtprune_fx.models.loading.open_checkpoint", refuse_work)
    (tmp_path / "folder").mkdir()
    (tmp_path / "mine.json").write_text("{}")
    before = contents(tmp_path)
    assert "output file" in refused("eval", "--limit", 1, "--output", tmp_path / name)
    assert contents(tmp_path) == before


def test_calibrate_replaces_neither_its_recipe_nor_a_file_of_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vtprune_fx.models.loading.open_checkpoint", refuse_work)
    recipe = tmp_path / "rank.json"
    recipe.write_text(load_recipe("sparsevlm-rank-llava-1.5-7b-64").to_json())
    before = contents(tmp_path)
    command = ("calibrate", "m", "--data", "reference", "--recipe", recipe)
    assert "output file" in refused(*command, "--output", recipe)
    (tmp_path / "mine.txt").write_text("mine")
    found = refused(*command, "--output", tmp_path / "mine.txt")
    assert "a file that this command did not write" in found
    assert contents(tmp_path) == before | {"mine.txt": b"mine"}


@pytest.mark.parametrize("device", ["zzz", "cuda:99", "cpu:x"])
def test_a_device_that_is_none_is_refused_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    monkeypatch.setattr("vtprune_fx.models.loading.open_checkpoint", refuse_work)
    name = "sparsevlm-rank-llava-1.5-7b-64"
    command = ("calibrate", "m", "--data", "reference", "--recipe", name)
    output = ("--output", tmp_path / "r.json", "--device", device)
    assert f"found {device!r}" in refused(*command, *output)
