"""Every example runs."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

from vtprune_fx.evaluation.picture import sample_photo
from vtprune_fx.scorers import registry

EXAMPLES = Path(__file__).parent.parent / "examples"
SERVING = EXAMPLES / "ray_serve.py"
CHECK = EXAMPLES / "check_installation.py"
"""Run by tests/test_compatibility.py."""

# What main() is called with; a folder is one of the test's own.
ARGUMENTS = {
    "build_engine": ["folder", "8.9"],
    "fit_recipe": ["folder"],
    "llava_hr": ["tiny", "eager"],
    "onnx_runtime": ["folder"],
    "prune_and_compile": ["eager"],
    "video": ["eager"],
    "write_scorer": ["eager"],
}
SLOW = {"build_engine", "onnx_runtime", "prune_and_compile"}
"""The last does what docs/getting-started.md does, which is run."""
WRITES = {"build_engine": "prefill.engine", "fit_recipe": "fit.json"}
SAYS = {
    "llava_hr": "16 visual tokens, 5 after",  # int(16 n / 576) of 449 leave: see video
    "video": "80 visual tokens, 19 after",
}


def test_every_example_is_here() -> None:
    there = {path.stem for path in EXAMPLES.glob("*.py")}
    assert there == {SERVING.stem, CHECK.stem, *ARGUMENTS}


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[pytest.mark.slow] * (n in SLOW)) for n in ARGUMENTS],
)
def test_example_runs(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "_REGISTERED", {})
    out = str(tmp_path / "out")
    arguments = [out if given == "folder" else given for given in ARGUMENTS[name]]
    said = runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"](*arguments)
    # A question and an answer, or what was made and what it saves.
    assert said.split("? ")[-1].split(": ")[-1]
    assert SAYS.get(name, "") in said
    if name in WRITES:
        assert (tmp_path / "out" / WRITES[name]).is_file()


@pytest.mark.slow
def test_llava_hr_of_full_size_takes_the_published_recipe() -> None:
    """The authors' 60 % for 1,024 visual tokens: 42 leave in the first layer."""
    said = runpy.run_path(str(EXAMPLES / "llava_hr.py"))["main"]("full")
    assert "fitprune-llava-hr-7b-60, 1024 visual tokens" in said
    assert "42 dropped, 982 kept" in said


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
