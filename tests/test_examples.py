"""Every example runs."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent / "examples"
SERVING = FOLDER / "ray_serve.py"
EXAMPLES = sorted(set(FOLDER.glob("*.py")) - {SERVING})


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_example_runs(example: Path) -> None:
    answer = runpy.run_path(str(example))["main"]("eager")
    assert answer.split("? ")[-1], "an answer behind the question"


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # Ray's own
def test_the_serving_example_answers() -> None:
    pytest.importorskip("ray.serve", reason="needs vtprune-fx[serve]")
    assert runpy.run_path(str(SERVING))["main"]()
