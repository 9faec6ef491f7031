"""The commands ``vtprune recipes`` and ``vtprune cost``."""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
from typing import TYPE_CHECKING, Any, get_args

import pytest
import typer
from transformers import LlavaConfig

from vtprune_fx import cli
from vtprune_fx.recipes.loading import load_recipe, recipe_names
from vtprune_fx.recipes.methods import METHODS
from vtprune_fx.recipes.schema import Method

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

STYLE = re.compile(r"\x1b\[[0-9;]*m")  # some CI systems make rich print colours
NAME = "fitprune-llava-1.5-7b-60"


def run(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    *arguments: str,
) -> tuple[int, str, str]:
    """Exit status, standard output and standard error of one call."""
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(sys, "argv", ["vtprune", *arguments])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    out, err = capsys.readouterr()
    return int(caught.value.code or 0), STYLE.sub("", out), STYLE.sub("", err)


Run = tuple[pytest.CaptureFixture[str], pytest.MonkeyPatch]


@pytest.fixture
def io(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    return capsys, monkeypatch


def test_recipes_lists_every_shipped_recipe_in_80_columns(io: Run) -> None:
    status, out, _ = run(*io, "recipes")
    assert status == 0
    lines = [line.split() for line in out.splitlines()]
    # Published: 449 of 576 tokens deleted, 0.403 of the MACs left.
    assert [NAME, "LLaVA-1.5-7B", "32", "576", "449", "59.7%"] in lines
    assert {row[0] for row in lines if row} >= set(recipe_names())
    assert max(map(len, out.splitlines())) <= 80
    assert "…" not in out


def test_every_method_is_explained_with_its_source(io: Run) -> None:
    _, out, _ = run(*io, "recipes")
    assert set(METHODS) == set(get_args(Method))
    text = " ".join(out.split())
    for name, method in METHODS.items():
        assert f"{method.title} ({name}, {method.source}) {method.explanation}" in text
    _, shown, _ = run(*io, "recipes", "show", "vtw-llava-1.5-7b")
    assert METHODS["vtw"].explanation in shown


def test_show_draws_the_tokens_of_each_layer(io: Run) -> None:
    status, out, _ = run(*io, "recipes", "show", NAME)
    assert status == 0
    rows = [line.split() for line in out.splitlines()]
    # Published: layer 0 deletes 14 of 576, all layers together 449.
    assert rows[4][:3] == ["0", "14", "562"]
    assert rows[-1][:3] == ["31", "0", "127"]
    assert len(rows[4][3]) > len(rows[-1][3])


def test_show_json_is_a_recipe_file(io: Run, tmp_path: Path) -> None:
    status, out, _ = run(*io, "recipes", "show", NAME, "--json")
    (tmp_path / "copy.json").write_text(out, encoding="utf-8")
    assert status == 0
    assert load_recipe(tmp_path / "copy.json") == load_recipe(NAME)


def test_show_leaves_whole_tiles_if_told(io: Run) -> None:
    tile = ("--tile", "64", "--text-tokens", "64", "--json")
    status, out, _ = run(*io, "recipes", "show", NAME, *tile)
    assert status == 0
    gone = itertools.accumulate(cut["drop"] for cut in json.loads(out)["cuts"])
    assert {(576 + 64 - count) % 64 for count in gone} == {0}


def test_cost_prints_both_counts(io: Run) -> None:
    status, out, _ = run(*io, "cost", "--recipe", NAME)
    assert status == 0
    assert "576 visual, 75 text tokens" in out
    rows = [line.split() for line in out.splitlines()]
    visual = next(row for row in rows if row[:3] == ["TMACs,", "visual", "tokens"])
    assert (visual[3], visual[5]) == ("3.817", "59.7%")
    assert any(row[:3] == ["TFLOPs,", "all", "tokens"] for row in rows)
    # Published: layers 0 to 2 delete 14, 33 and 89 of 576, all together 449.
    left = " ".join(out.split("after each layer:")[1].split())
    assert left.startswith("562 529 440 ")
    assert left.endswith(" 127")


def test_cost_json(io: Run) -> None:
    status, out, _ = run(*io, "cost", "--recipe", NAME, "--text-tokens", "0", "--json")
    fields = json.loads(out)
    assert status == 0
    assert fields["recipe"] == NAME
    assert round(fields["visual"]["dense_macs"] / 1e12, 3) == 3.817
    assert round(fields["visual"]["ratio"], 3) == 0.403
    assert fields["total"] == fields["visual"]
    assert (fields["entering"][0], fields["after"][-1]) == (576, 127)


@pytest.mark.parametrize("file", ["", "config.json"])
def test_cost_reads_a_config_folder_or_file(io: Run, tmp_path: Path, file: str) -> None:
    LlavaConfig().save_pretrained(tmp_path)
    config = str(tmp_path / file)
    _, default, _ = run(*io, "cost", "--recipe", NAME, "--json")
    status, out, _ = run(*io, "cost", "--recipe", NAME, "--config", config, "--json")
    assert status == 0
    assert out == default


def test_cost_takes_the_number_of_visual_tokens(io: Run) -> None:
    next_60 = "fitprune-llava-next-7b-60"
    _, out, _ = run(*io, "cost", "--recipe", next_60, "--visual-tokens", "0", "--json")
    assert json.loads(out)["visual"]["ratio"] == 1


@pytest.mark.parametrize("content", [None, "not json", "{}", '{"model_type": "no"}'])
def test_bad_config_is_one_message(
    io: Run, tmp_path: Path, content: str | None
) -> None:
    path = tmp_path / "config.json"
    if content is not None:
        path.write_text(content, encoding="utf-8")
    status, out, err = run(*io, "cost", "--recipe", NAME, "--config", str(path))
    assert (status, out) == (1, "")
    assert err.startswith(f"vtprune: --config {path}: expected a model folder")
    assert err.rstrip().endswith("Pass a folder that save_pretrained() wrote.")
    assert err.count("\n") == 1


@pytest.mark.parametrize("command", [("recipes", "show"), ("cost", "--recipe")])
def test_unknown_recipe_is_one_message(io: Run, command: tuple[str, str]) -> None:
    status, out, err = run(*io, *command, "nope")
    assert (status, out) == (1, "")
    assert err.startswith("vtprune: recipe 'nope': expected the name")
    assert err.count("\n") == 1


def test_rules_are_shown_and_have_no_cost(io: Run) -> None:
    by_rank = "sparsevlm-rank-llava-1.5-7b-128"
    status, out, _ = run(*io, "recipes", "show", by_rank)
    assert status == 0
    rows = [line.split(maxsplit=1) for line in out.splitlines()[4:]]
    rule = "int(9 r + 6) kept, v - 1 at most"
    assert rows == [[layer, rule] for layer in ("2", "6", "15", "19")]
    status, out, err = run(*io, "cost", "--recipe", by_rank)
    assert (status, out) == (1, "")
    assert err.startswith(f"vtprune: recipe {by_rank}: expected a number of tokens")
    assert "Calibrate it first: `vtprune calibrate MODEL" in err
    assert err.count("\n") == 1


COMMANDS = [
    *([], ["recipes"], ["recipes", "show"], ["cost"], ["explain"]),
    *(["export"], ["export", "onnx"], ["export", "tensorrt"], ["export", "triton"]),
    *(["verify"], ["generate"], ["eval"], ["fit"], ["calibrate"], ["demo"]),
]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_gives_an_example(io: Run, command: list[str]) -> None:
    status, out, _ = run(*io, *command, "--help")
    assert status == 0
    assert "Example: vtprune" in out


def subcommands(command: Any, path: tuple[str, ...] = ()) -> Iterator[list[str]]:
    yield list(path)
    for name, below in getattr(command, "commands", {}).items():
        yield from subcommands(below, (*path, name))


def test_every_command_is_in_the_list_above() -> None:
    found = subcommands(typer.main.get_command(cli.app))
    assert sorted(found) == sorted(COMMANDS)


@pytest.mark.parametrize(
    ("command", "default"),
    [
        (["export", "onnx"], "float32"),
        (["export", "tensorrt"], "float16"),
        (["fit"], "float32"),
        (["calibrate"], "float32"),
    ],
)
def test_a_type_of_weights_has_the_same_words_everywhere(
    io: Run, command: list[str], default: str
) -> None:
    status, _, err = run(*io, *command, "--dtype", "fp16")
    assert status == 2
    assert re.findall(r"'(\w+)'", err)[-3:] == ["float32", "float16", "bfloat16"]
    found: Any = typer.main.get_command(cli.app)
    for name in command:
        found = found.commands[name]
    [option] = [option for option in found.params if option.name == "dtype"]
    assert option.default == default


def test_help_does_not_wait_for_torch() -> None:
    code = (
        "import sys; from vtprune_fx.cli import app; app(['--help'], "
        "standalone_mode=False); print({'torch', 'transformers'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout.rstrip().endswith("set()")
