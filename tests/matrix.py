"""Write ``docs/models.md``: what works with which model, found by running it.

``python -m tests.matrix`` runs everything; with names of models it runs those and keeps
the other rows. A column is one function, which raises what is wrong.
"""

from __future__ import annotations

import functools
import logging
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir
import onnxruntime
import torch
from transformers.exporters.utils import onnx_feed

import vtprune_fx
from tests.zoo import (
    ZOO,
    Prompt,
    assert_generates_like_the_oracle,
    batch,
    placeholders,
    recipe_of,
    shared,
    tiny,
)
from vtprune_fx import oracle
from vtprune_fx.errors import VtpruneError
from vtprune_fx.export import export_onnx, prefill_inputs
from vtprune_fx.export.tensorrt_profile import EngineSizes, Span
from vtprune_fx.export.to_tensorrt import build_engines
from vtprune_fx.models.arguments import cache_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers.exporters import ExportedModel

PAGE = Path(__file__).parents[1] / "docs" / "models.md"

HEAD = """# Models

Written by `python -m tests.matrix`, which runs what it says: a **tiny model with
random weights** of each family, in float32, on a CPU, with two cuts. Configurations
are those of `tests/zoo.py`: three layers, width 32. No released checkpoint of these
families was run.

Configurations that differ from released ones:

* **Gemma 3** and **Aya Vision** were run with all layers set to full attention. As
  released they have sliding-window layers, and **are refused**, with the reason.
* **Mistral** decoders (LLaVA-NeXT (Mistral), Mistral 3) were run with
  `sliding_window=None`. A checkpoint with a window is refused.
* **LLaVA-HR** is not in transformers: `examples/llava_hr.py` is a stand-in with two
  vision towers.

Columns:

* *prefill*: a prompt with an image, compiled by inductor.
* *generate*: two prompts in a batch; 8 new tokens, prompt and decode steps compiled by
  Dynamo and run operator by operator. *several images*: one of the two has two.
  *padding*: the other is shorter.
* *video*: the same as *generate* with a video, beside an image. *-*: the family takes
  none.
* *ONNX*: the batch of *generate* on ONNX Runtime's CPU provider, prefill and 8 decode
  steps.
* *TensorRT*: both engines built by TensorRT for RTX, without a GPU. None was run.

Cells:

* *yes*: agreement with [the oracle](glossary.md), the eager pruner: logits within
  1e-4, after the prompt and after each new token; in `torch.compile` also the same
  kept tokens at each cut, and as many cached in each layer. For *TensorRT*: engines
  were built, of networks with the sizes that the graphs have.
* *refused*: an error before any run, quoted below the table.
* *fails*: what is quoted there went wrong.
* *not run*: not tried. Exports take long, so they are made of the models that pruning
  papers report on.

"""

ONE: tuple[Prompt, ...] = ((3, "image", 6),)
IMAGES: tuple[Prompt, ...] = (*ONE, (2, "image", 1, "image", 9))
VIDEOS: tuple[Prompt, ...] = ((3, "video", 6), (2, "image", 1, "video", 9))

NEW = 8
"""New tokens."""

NOT_RUN = "not run"


def prefill(name: str) -> str:
    """One prompt by inductor."""
    model, recipe = tiny(name), recipe_of(name)
    inputs = batch(name, model, *ONE)
    [sample] = oracle.split_batch(model, **inputs)
    expected = oracle.prefill(model, recipe, sample)
    torch.compiler.reset()
    with torch.no_grad():
        found: Any = vtprune_fx.compile(model, recipe)(**inputs)
    torch.testing.assert_close(found.logits[0], expected.logits, atol=1e-4, rtol=0)
    held = [layer.held() for layer in cache_of(found).layers]
    assert held == [keys.shape[1] for keys in expected.keys], "tokens that layers hold"
    return "yes"


@functools.lru_cache(maxsize=1)
def generate(name: str) -> str:
    """``vtprune_fx.compile`` and ``generate``, on what three columns are about."""
    assert_generates_like_the_oracle(name, IMAGES, recipe_of(name), NEW)
    return "yes"


def video(name: str) -> str:
    """A video beside an image."""
    if ZOO[name].video is None:
        return "-"
    assert_generates_like_the_oracle(name, VIDEOS, recipe_of(name), NEW)
    return "yes"


def onnx(name: str) -> str:
    """Both graphs on ONNX Runtime, where a paper reports on the model."""
    if not ZOO[name].papers:
        return NOT_RUN
    assert_onnx_is_the_oracle(name)
    return "yes"


def tensorrt(name: str) -> str:
    """Both engines, for prompts around those that the other columns run."""
    if not ZOO[name].papers:
        return NOT_RUN
    inputs = batch(name, shared(name), *IMAGES)
    features = prefill_inputs(shared(name), inputs).get("mm_encoder_outputs")
    tokens = inputs["input_ids"].shape[1]
    # What is counted behind the encoders are their features, not images.
    each = 2 if features is None else int(placeholders(inputs).sum(1).max())
    build_engines(
        exported(name),
        EngineSizes(
            Span(1, 1, 2), Span(tokens, tokens, 2 * tokens), Span(each, each, each), NEW
        ),
        "8.9",
    )
    return "yes"


@functools.lru_cache(maxsize=1)
def exported(name: str) -> ExportedModel:
    """The graphs of a model's ONNX export."""
    model = shared(name)
    return export_onnx(model, batch(name, model, *IMAGES), recipe_of(name))[0]


def assert_onnx_is_the_oracle(name: str) -> None:
    """Compare each sample's last logits, behind the prompt and behind each step."""
    model = shared(name)
    inputs = batch(name, model, *IMAGES)
    ready = prefill_inputs(model, inputs)
    # Where a model would count padding, too, steps have to go on from there.
    at = ready["position_ids"]
    samples = oracle.split_batch(model, **inputs, position_ids=at)
    states = [oracle.prefill(model, recipe_of(name), sample) for sample in samples]
    expected = torch.stack([state.logits[-1] for state in states])
    run, step = (_Graph(exported(name), part) for part in ("prefill", "decode"))
    found = run(ready)
    mask = inputs["attention_mask"]
    for _ in range(NEW):
        logits = torch.from_numpy(found["logits"][:, -1])
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)
        tokens = expected.argmax(dim=1, keepdim=True)
        mask = torch.cat((mask, torch.ones_like(tokens)), dim=1)
        at = torch.tensor([state.next_positions[:1] for state in states])
        given = {"input_ids": tokens, "attention_mask": mask, "position_ids": at}
        found = step(given, found)
        pairs = zip(states, tokens, strict=True)
        expected = torch.stack([oracle.step(model, s, int(t)) for s, t in pairs])


class _Graph:
    """One graph on ONNX Runtime."""

    def __init__(self, graphs: ExportedModel, part: str) -> None:
        model = onnx_ir.to_proto(graphs.components[part].program)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        self._session = onnxruntime.InferenceSession(model.SerializeToString(), options)

    def __call__(
        self, inputs: dict[str, Any], before: dict[str, Any] | None = None
    ) -> dict[str, np.ndarray[Any, Any]]:
        """All outputs by name, ``before`` those of the run that left the cache."""
        taken = [each.name for each in self._session.get_inputs()]
        feed = onnx_feed([n for n in taken if "past_key_values" not in n], inputs)
        for name, value in (before or {}).items():
            port = f"input.{name.removeprefix('output.')}"
            feed |= {port: value} if port in taken else {}
        names = [each.name for each in self._session.get_outputs()]
        return dict(zip(names, self._session.run(names, feed), strict=True))


COLUMNS: dict[str, Callable[[str], str]] = {
    "prefill": prefill,
    "generate": generate,
    "several images": generate,
    "padding": generate,
    "video": video,
    "ONNX": onnx,
    "TensorRT": tensorrt,
}

Row = list[str]


def main(names: list[str]) -> None:
    """Run the columns for some models, or all."""
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    rows, reasons = written()
    for name in names or ZOO:
        reasons = [reason for reason in reasons if not reason.startswith(f"* {name}, ")]
        rows[name] = [_cell(name, column, reasons) for column in COLUMNS]
        _write(rows, reasons)
        print(name, rows[name], flush=True)  # noqa: T201 - a run takes long


def _cell(name: str, column: str, reasons: list[str]) -> str:
    try:
        return COLUMNS[column](name)
    except VtpruneError as refusal:
        reasons.append(f"* {name}, {column}: {' '.join(str(refusal).split())}")
        return "refused"
    except Exception as error:  # an operator, a compiler, a comparison
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        reasons.append(f"* {name}, {column}: {first}")
        return "fails"


def written() -> tuple[dict[str, Row], list[str]]:
    """The rows and reasons of the page as it is."""
    lines = PAGE.read_text(encoding="utf-8").splitlines() if PAGE.exists() else []
    cells = [line.strip("| ").split(" | ") for line in lines if line.startswith("| ")]
    rows = {n: own for n, *own in cells if n in ZOO and len(own) == len(COLUMNS)}
    return rows, [line for line in lines if line.startswith("* ") and ", " in line]


def _write(rows: dict[str, Row], reasons: list[str]) -> None:
    lines: list[Any] = [["model", *COLUMNS], ["---"] * (1 + len(COLUMNS))]
    lines += [[name, *rows[name]] for name in ZOO if name in rows]
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    own = {name: [r for r in reasons if r.startswith(f"* {name}, ")] for name in ZOO}
    refusals = "\n".join(reason for found in own.values() for reason in found)
    PAGE.write_text(f"{HEAD}{table}\n\n{refusals}".strip() + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
