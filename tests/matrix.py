"""Write ``docs/models.md``: what works with which model, told by running it.

``python -m tests.matrix`` runs everything; with names of models it runs those and keeps
the other rows. A column is one function, which raises what is wrong.
"""

from __future__ import annotations

import logging
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx_ir
import onnxruntime
import torch
from transformers.exporters.utils import onnx_feed

from tests.zoo import (
    ZOO,
    Prompt,
    assert_generates_like_the_oracle,
    batch,
    recipe_of,
    shared,
)
from vtprune_fx import oracle
from vtprune_fx.errors import VtpruneError
from vtprune_fx.export import export_onnx, prefill_inputs

if TYPE_CHECKING:
    from collections.abc import Callable

PAGE = Path(__file__).parents[1] / "docs" / "models.md"

HEAD = """# Models

Written by `python -m tests.matrix`, which runs what it says: tiny random models of each
architecture, in float32, on a CPU, against the oracle.

* *compile*: two prompts in one batch, one padded, the other with two images: the tokens
  that stay at each cut, the length of every layer's cache, and the logits of the prompt
  and of 8 generated tokens.
* *video*: the same with a video, beside an image.
* *ONNX*: the exported prefill graph on ONNX Runtime, its last logits.

*yes*: that ran and agreed within 1e-4. *-*: the model takes none. *not run*: nobody has
tried. Anything else is the reason of a refusal, below the table.

"""

IMAGES: tuple[Prompt, ...] = ((3, "image", 6), (2, "image", 1, "image", 9))
VIDEOS: tuple[Prompt, ...] = ((3, "video", 6), (2, "image", 1, "video", 9))


def compiled(name: str) -> str:
    """``vtprune_fx.compile`` and ``generate``."""
    assert_generates_like_the_oracle(name, IMAGES, recipe_of(name))
    return "yes"


def video(name: str) -> str:
    """A video beside an image."""
    if ZOO[name].video is None:
        return "-"
    assert_generates_like_the_oracle(name, VIDEOS, recipe_of(name))
    return "yes"


def onnx(name: str) -> str:
    """The exported prefill graph on ONNX Runtime."""
    if not ZOO[name].papers:
        return "not run"
    assert_onnx_is_the_oracle(name)
    return "yes"


def assert_onnx_is_the_oracle(name: str) -> None:
    """Compare the last logits of each sample."""
    model, recipe = shared(name), recipe_of(name)
    inputs = batch(name, model, *IMAGES)
    exported, _ = export_onnx(model, inputs, recipe)
    program = onnx_ir.to_proto(exported.components["prefill"].program)
    session = onnxruntime.InferenceSession(program.SerializeToString())
    taken = [each.name for each in session.get_inputs()]
    feed = onnx_feed(taken, prefill_inputs(model, inputs))
    [logits] = session.run(["logits"], feed)
    for row, sample in enumerate(oracle.split_batch(model, **inputs)):
        expected = oracle.prefill(model, recipe, sample).logits[-1]
        found = torch.from_numpy(logits[row, -1])
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


COLUMNS: dict[str, Callable[[str], str]] = {
    "compile": compiled,
    "video": video,
    "ONNX": onnx,
}

Row = list[str]


def main(names: list[str]) -> None:
    """Run the columns for some models, or all."""
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    rows, reasons = _written()
    for name in names or ZOO:
        reasons = [reason for reason in reasons if not reason.startswith(f"* {name}, ")]
        rows[name] = [_cell(name, column, reasons) for column in COLUMNS]
        _write(rows, reasons)
        print(name, rows[name], flush=True)  # noqa: T201 - a run takes long


def _cell(name: str, column: str, reasons: list[str]) -> str:
    try:
        return COLUMNS[column](name)
    except VtpruneError as refusal:
        reasons.append(f"* {name}, {column}: {refusal}")
        return "refused"
    except Exception as error:  # an operator, a compiler, a comparison
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        reasons.append(f"* {name}, {column}: {first}")
        return "fails"


def _written() -> tuple[dict[str, Row], list[str]]:
    """The rows and reasons of the page as it is."""
    lines = PAGE.read_text(encoding="utf-8").splitlines() if PAGE.exists() else []
    cells = [line.strip("| ").split(" | ") for line in lines if line.startswith("| ")]
    rows = {name: own for name, *own in cells if len(own) == len(COLUMNS)}
    return rows, [line for line in lines if line.startswith("* ") and ", " in line]


def _write(rows: dict[str, Row], reasons: list[str]) -> None:
    lines: list[Any] = [["model", *COLUMNS], ["---"] * (1 + len(COLUMNS))]
    lines += [[name, *rows[name]] for name in ZOO if name in rows]
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    refusals = "\n".join(r for r in reasons if r.split(", ")[0][2:] in ZOO)
    PAGE.write_text(f"{HEAD}{table}\n\n{refusals}".strip() + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
