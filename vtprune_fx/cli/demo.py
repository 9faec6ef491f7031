"""``vtprune demo``: prune, compile, export, run and compare the reference model."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import LlavaForConditionalGeneration, ProcessorMixin

from vtprune_fx import oracle
from vtprune_fx.errors import InputError, VerifyError
from vtprune_fx.evaluation.picture import draw_kept, png_of, unnormalise
from vtprune_fx.export import load, require_onnxruntime, write_onnx
from vtprune_fx.export.folder import check_free
from vtprune_fx.files import MARK, check_output, replace_file
from vtprune_fx.generation.compile import pruned
from vtprune_fx.models.loading import open_checkpoint
from vtprune_fx.models.placeholders import is_visual
from vtprune_fx.models.prompts import prompt_inputs
from vtprune_fx.recipes.counting import Geometry, cost
from vtprune_fx.recipes.schema import Recipe
from vtprune_fx.reference.task import Task
from vtprune_fx.timing import first_token_seconds

NEW_TOKENS = 12
"""Tokens of the answer that all runtimes must agree on."""


TOLERANCE = 1e-4
"""Largest difference of the first logits from the oracle's, float32."""


ROUNDS = 5
"""Timed runs of each of dense and pruned, in turn."""


PANELS = 3
"""Layers that the picture shows."""


PICTURE, KEPT, REPORT = "picture.png", "kept.png", "report.json"
"""Files that the demo writes, beside the exports."""


EXPORTS = ("onnx", "onnx-dense")
"""Folders that the demo writes."""


@dataclass
class RuntimeResult:
    """What the demo measured on one runtime.

    Attributes:
        runtime: Its name.
        tokens: The answer's ids.
        difference: Largest difference of the first logits from the oracle's.
        dense: Seconds to the first token, dense, median.
        pruned: Seconds to the first token, pruned, median.
        seconds: Everything measured, by name, in order.
    """

    runtime: str
    tokens: list[int]
    difference: float
    dense: float
    pruned: float
    seconds: dict[str, list[float]] = field(default_factory=dict)


@dataclass(frozen=True)
class _Job:
    """What every step of the demo works on."""

    model: LlavaForConditionalGeneration
    processor: ProcessorMixin
    inputs: dict[str, Tensor]
    recipe: Recipe
    folder: Path
    console: Console

    @contextmanager
    def step(self, what: str) -> Iterator[None]:
        """Show a step while it runs, then its time."""
        start = time.perf_counter()
        with self.console.status(f"{what} ..."):
            yield
        self.console.print(f"{what}: {time.perf_counter() - start:.1f} s")

    def text(self, tokens: list[int]) -> str:
        """An answer in words."""
        text = self.processor.decode(tokens, skip_special_tokens=True)
        return repr(str(text).strip())


def run_demo(
    folder: Path,
    checkpoint: Path,
    recipe: Recipe,
    task: Task,
    inner: str = "inductor",
) -> list[RuntimeResult]:
    """Prune, compile, export, run, compare, draw; print a report.

    Args:
        folder: Where the exports, the pictures and the report go.
        checkpoint: A LLaVA with a Llama decoder.
        recipe: What to cut.
        task: What to ask.
        inner: The ``torch.compile`` backend that compiles dense and pruned graphs.

    Raises:
        VerifyError: A runtime disagrees with the oracle.
        VtpruneError: Anything else that stops it; the subclass says what.
    """
    require_onnxruntime()
    _check_folder(folder)
    console = Console()
    model, processor = _open(checkpoint)
    inputs = prompt_inputs(processor, task.prompt, task.image)
    job = _Job(model, processor, inputs, recipe, folder, console)
    folder.mkdir(parents=True, exist_ok=True)
    replace_file(folder / PICTURE, png_of(task.image))
    with job.step("Oracle, eager, dense and pruned"):
        sample, expected, answer = _ask_oracle(job, recipe)
        _, _, before = _ask_oracle(job, recipe.keep_all())
    outcomes = [_on_torch(job, checkpoint, expected, inner), _on_onnx(job, expected)]
    picture = _draw(job, sample, expected)
    for outcome in outcomes:
        _check(outcome, answer)
    console.print(f"\nQuestion: {task.prompt}")
    if task.answer is not None:
        console.print(f"  right answer:   {task.answer!r}")
    console.print(f"  before pruning: {job.text(before)}")
    console.print(f"  after pruning:  {job.text(answer)}, from every runtime")
    _report(job, outcomes, picture)
    return outcomes


def _check_folder(folder: Path) -> None:
    """Check that nothing in the folder is in the way, or somebody else's."""
    check_output(folder, "folder to fill")
    for name in (PICTURE, KEPT, REPORT):
        check_output(folder / name, "file", mark=MARK)
    for name in EXPORTS:
        check_free(folder / name)


def _open(checkpoint: Path) -> tuple[LlavaForConditionalGeneration, ProcessorMixin]:
    """Open a LLaVA, which is what the oracle reads."""
    model, processor = open_checkpoint(checkpoint)
    if not isinstance(model, LlavaForConditionalGeneration):
        raise InputError(
            f"checkpoint {checkpoint}",
            expected="a LlavaForConditionalGeneration",
            found=f"a {type(model).__name__}",
            fix="Name the folder of a LLaVA.",
        )
    return model, processor


def _ask_oracle(
    job: _Job, recipe: Recipe
) -> tuple[oracle.Sample, oracle.Prefill, list[int]]:
    end = getattr(job.model.generation_config, "eos_token_id", None)
    ends = () if end is None else (end,)
    [sample] = oracle.split_batch(
        job.model,
        job.inputs["input_ids"],
        job.inputs["attention_mask"],
        pixel_values=job.inputs["pixel_values"],
    )
    expected = oracle.prefill(job.model, recipe, sample)
    answer = oracle.generate(job.model, recipe, sample, NEW_TOKENS, ends)
    return sample, expected, answer


def _on_torch(
    job: _Job, checkpoint: Path, expected: oracle.Prefill, inner: str
) -> RuntimeResult:
    # A second model: both stay compiled while they are timed in turn.
    second, _ = _open(checkpoint)
    with (
        pruned(job.model, job.recipe, inner) as model,
        pruned(second, job.recipe.keep_all(), inner) as dense,
    ):
        with job.step("torch.compile, pruned prefill and decode"):
            answer = _generate(model, job.inputs, NEW_TOKENS)
        with job.step("torch.compile, dense prefill"):
            _generate(dense, job.inputs, 1)
        return _result("torch.compile", job, answer, expected, dense, model)


def _on_onnx(job: _Job, expected: oracle.Prefill) -> RuntimeResult:
    folder, without_pruning = (job.folder / name for name in EXPORTS)
    with job.step("ONNX export, pruned prefill and decode"):
        write_onnx(job.model, job.processor, job.recipe, folder)
    with job.step("ONNX export, dense prefill and decode"):
        keep_all = job.recipe.keep_all()
        write_onnx(job.model, job.processor, keep_all, without_pruning)
    with job.step("ONNX Runtime"):
        model, dense = load(folder), load(without_pruning)
        answer = _generate(model, job.inputs, NEW_TOKENS)
        return _result("ONNX Runtime", job, answer, expected, dense, model)


def _generate(
    model: Any, inputs: dict[str, Tensor], count: int
) -> tuple[list[int], Tensor]:
    """Greedy ids, and the logits [vocabulary] that gave the first of them."""
    answer = model.generate(
        **inputs,
        max_new_tokens=count,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    new = answer.sequences[0, inputs["input_ids"].shape[1] :]
    return new.tolist(), answer.logits[0][0]


def _result(
    runtime: str,
    job: _Job,
    answer: tuple[list[int], Tensor],
    expected: oracle.Prefill,
    dense: object,
    model: object,
) -> RuntimeResult:
    tokens, logits = answer
    difference = float((logits - expected.logits[-1]).abs().max())
    timed = {"dense": dense, "pruned": model}
    seconds = first_token_seconds(timed, job.inputs, ROUNDS)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return RuntimeResult(runtime, tokens, difference, **medians, seconds=seconds)


def _check(outcome: RuntimeResult, answer: list[int]) -> None:
    """Compare a runtime with the oracle."""
    fix = "This is a defect of vtprune_fx; please report it with the folder's report."
    if outcome.tokens != answer:
        raise VerifyError(
            f"answer of {outcome.runtime}",
            expected=f"the oracle's {answer}",
            found=str(outcome.tokens),
            fix=fix,
        )
    if outcome.difference > TOLERANCE:
        raise VerifyError(
            f"logits of {outcome.runtime}",
            expected=f"the oracle's within {TOLERANCE}",
            found=f"a difference of {outcome.difference:.2e}",
            fix=fix,
        )


def _draw(job: _Job, sample: oracle.Sample, expected: oracle.Prefill) -> Path:
    """The photograph with dropped patches faded, after a few layers."""
    config = job.model.config
    vision: Any = config.vision_config  # typed as what LlavaConfig takes, dicts too
    side = vision.image_size // vision.patch_size
    visual = is_visual(sample.input_ids, config).nonzero()[:, 0]
    patches = {int(position): patch for patch, position in enumerate(visual)}
    cuts = [cut.layer for cut in job.recipe.cuts]
    shown = [cuts[i * (len(cuts) - 1) // (PANELS - 1)] for i in range(PANELS)]
    kept = {
        layer: [patches[int(p)] for p in expected.kept[layer] if int(p) in patches]
        for layer in dict.fromkeys(shown)
    }
    seen = unnormalise(job.inputs["pixel_values"][0], job.processor)
    return draw_kept(seen, kept, (side, side), job.folder / KEPT, title=job.recipe.name)


def _report(job: _Job, outcomes: list[RuntimeResult], picture: Path) -> None:
    """Print the results, and write them to ``report.json``."""
    ids = job.inputs["input_ids"][0]
    visual = int(is_visual(ids, job.model.config).sum())
    geometry = Geometry.from_config(job.model.config)
    spent = cost(job.recipe, geometry, visual, len(ids) - visual)
    console = job.console
    console.print(f"\nVisual tokens after each layer, of {visual}:")
    console.print("  " + " ".join(map(str, spent.after)))
    console.print(
        f"Language model's MACs saved: {spent.total.saved:.1%} "
        f"({spent.visual.saved:.1%} over the visual tokens alone)"
    )
    console.print(_table(outcomes))
    facts = {
        "written_by": MARK.decode(),
        "recipe": job.recipe.name,
        "answer": job.text(outcomes[0].tokens),
        "visual_tokens_after_each_layer": spent.after,
        "macs_saved": spent.total.saved,
        "runtimes": [asdict(outcome) for outcome in outcomes],
    }
    report = job.folder / REPORT
    replace_file(report, (json.dumps(facts, indent=2) + "\n").encode())
    for what, where in (
        ("ONNX export", job.folder / EXPORTS[0]),
        ("picture", picture),
        ("measurements", report),
    ):
        console.print(f"{what:>12}: {where}")


def _table(outcomes: list[RuntimeResult]) -> Table:
    table = Table(
        title="Prefill, up to the first token, vision tower included",
        caption=f"Medians of {ROUNDS} runs in turn. Difference: of the first token's "
        "logits, from the oracle's.",
    )
    for title in ("runtime", "dense", "pruned", "time saved", "difference"):
        table.add_column(title, justify="left" if title == "runtime" else "right")
    for outcome in outcomes:
        table.add_row(
            outcome.runtime,
            f"{outcome.dense * 1000:.0f} ms",
            f"{outcome.pruned * 1000:.0f} ms",
            f"{1 - outcome.pruned / outcome.dense:.1%}",
            f"{outcome.difference:.1e}",
        )
    return table
