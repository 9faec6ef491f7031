"""Every example runs."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

from vtprune_fx import scorers
from vtprune_fx.picture import sample_photo

EXAMPLES = Path(__file__).parent.parent / "examples"
SERVING = EXAMPLES / "ray_serve.py"

# What main() is called with; a folder is one of the test's own.
ARGUMENTS = {
    "fit_recipe": "folder",
    "onnx_runtime": "folder",
    "prune_and_compile": "eager",
    "write_scorer": "eager",
}
SLOW = {"onnx_runtime"}


def test_every_example_is_here() -> None:
    there = {path.stem for path in EXAMPLES.glob("*.py")}
    assert there == {SERVING.stem, *ARGUMENTS}


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[pytest.mark.slow] * (n in SLOW)) for n in ARGUMENTS],
)
def test_example_runs(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scorers, "_REGISTERED", {})
    argument = ARGUMENTS[name].replace("folder", str(tmp_path / "out"))
    said = runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"](argument)
    # A question and an answer, or a recipe and what it saves.
    assert said.split("? ")[-1].split(": ")[-1]
    if name == "fit_recipe":
        assert (tmp_path / "out" / "fit.json").is_file()


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # Ray's own
def test_the_serving_example_answers_as_the_folder_does(
    onnx_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Ray gives its HTTP server five seconds, which a busy machine may not keep to.
    monkeypatch.setenv("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", "60")
    serve = pytest.importorskip("ray.serve", reason="needs vtprune-fx[serve]")
    example = runpy.run_path(str(SERVING))
    assert example["main"]()
    alone = example["Answers"](str(onnx_folder))
    serve.run(example["app"]({"folder": str(onnx_folder)}))
    try:
        for image in (sample_photo(), None):
            expected = alone.answer("What is it?", image)
            assert expected
            assert example["ask"]("What is it?", image) == expected
    finally:
        serve.shutdown()
