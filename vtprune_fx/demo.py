"""``vtprune demo``: the main job, end to end, on a model that it builds itself."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import LlavaForConditionalGeneration, ProcessorMixin

from vtprune_fx import oracle
from vtprune_fx.checkpoint import CheckpointSpec, build_checkpoint
from vtprune_fx.cost import Geometry, cost
from vtprune_fx.errors import InputError, VerifyError
from vtprune_fx.export import load, require_onnxruntime, write_onnx
from vtprune_fx.generation import pruned
from vtprune_fx.inputs import open_checkpoint, prompt_inputs
from vtprune_fx.picture import draw_kept, sample_photo, unnormalise
from vtprune_fx.recipe import Recipe

NEW_TOKENS = 12
"""Tokens of the answer that all runtimes must agree on."""

TOLERANCE = 1e-4
"""Largest difference of the first logits from the oracle's, float32."""

ROUNDS = 5
"""Timed runs of each of dense and pruned, in turn."""

PANELS = 3
"""Layers that the picture shows."""


@dataclass
class Outcome:
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

    @property
    def nothing(self) -> Recipe:
        """A recipe that keeps all tokens, for what pruning is compared with."""
        return self.recipe.model_copy(update={"name": "keep-all", "cuts": ()})

    @contextmanager
    def step(self, what: str) -> Iterator[None]:
        """Show what is going on, and how long it took."""
        start = time.perf_counter()
        with self.console.status(f"{what} ..."):
            yield
        self.console.print(f"{what}: {time.perf_counter() - start:.1f} s")


def run_demo(
    folder: Path,
    recipe: Recipe,
    prompt: str,
    spec: CheckpointSpec | None = None,
    inner: str = "inductor",
) -> list[Outcome]:
    """Build, prune, compile, export, run, compare, draw; print a report.

    Args:
        folder: Where the checkpoint, the export, the picture and the report go.
        recipe: What to cut.
        prompt: The question.
        spec: The model; LLaVA-1.5's geometry with narrow layers if left out.
        inner: The ``torch.compile`` backend that compiles dense and pruned graphs.

    Raises:
        VerifyError: A runtime disagrees with the oracle.
        VtpruneError: Anything else that stops it; the subclass says what.
    """
    require_onnxruntime()
    console = Console()
    checkpoint = build_checkpoint(folder / "checkpoint", spec)
    model, processor = _open(checkpoint)
    inputs = prompt_inputs(processor, prompt, sample_photo())
    job = _Job(model, processor, inputs, recipe, folder, console)
    with job.step("Oracle, eager"):
        sample, expected, answer = _ask_oracle(job)
    outcomes = [_on_torch(job, expected, inner), _on_onnx(job, expected)]
    picture = _draw(job, sample, expected)
    for outcome in outcomes:
        _check(outcome, answer)
    _report(job, answer, outcomes, picture)
    return outcomes


def _open(checkpoint: Path) -> tuple[LlavaForConditionalGeneration, ProcessorMixin]:
    """Open what ``build_checkpoint`` wrote: a LLaVA, which is what the oracle reads."""
    model, processor = open_checkpoint(checkpoint)
    if not isinstance(model, LlavaForConditionalGeneration):
        raise InputError(
            f"checkpoint {checkpoint}",
            expected="a LlavaForConditionalGeneration",
            found=f"a {type(model).__name__}",
            fix="Choose a new folder, for the demo to build its own model in.",
        )
    return model, processor


def _ask_oracle(job: _Job) -> tuple[oracle.Sample, oracle.Prefill, list[int]]:
    with torch.no_grad():
        [sample] = oracle.split_batch(
            job.model,
            job.inputs["input_ids"],
            job.inputs["attention_mask"],
            pixel_values=job.inputs["pixel_values"],
        )
        expected = oracle.prefill(job.model, job.recipe, sample)
        answer = oracle.generate(job.model, job.recipe, sample, NEW_TOKENS)
    return sample, expected, answer


def _on_torch(job: _Job, expected: oracle.Prefill, inner: str) -> Outcome:
    # A model of its own for each: both stay compiled while they are timed in turn.
    whole, _ = _open(job.folder / "checkpoint")
    with (
        pruned(job.model, job.recipe, inner) as model,
        pruned(whole, job.nothing, inner) as dense,
    ):
        with job.step("torch.compile, pruned prefill and decode"):
            answer = _generate(model, job.inputs, NEW_TOKENS)
        with job.step("torch.compile, dense prefill"):
            _generate(dense, job.inputs, 1)
        return _outcome("torch.compile", job, answer, expected, dense, model)


def _on_onnx(job: _Job, expected: oracle.Prefill) -> Outcome:
    folder = job.folder / "onnx"
    with job.step("ONNX export, pruned prefill and decode"):
        write_onnx(job.model, job.processor, job.recipe, folder)
    with job.step("ONNX export, dense prefill and decode"):
        write_onnx(job.model, job.processor, job.nothing, job.folder / "onnx-dense")
    with job.step("ONNX Runtime"):
        model, dense = load(folder), load(job.folder / "onnx-dense")
        answer = _generate(model, job.inputs, NEW_TOKENS)
        return _outcome("ONNX Runtime", job, answer, expected, dense, model)


def _generate(
    model: Any, inputs: dict[str, Tensor], count: int
) -> tuple[list[int], Tensor]:
    """Greedy ids, and the logits [vocabulary] behind the first of them."""
    answer = model.generate(
        **inputs,
        max_new_tokens=count,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    new = answer.sequences[0, inputs["input_ids"].shape[1] :]
    return new.tolist(), answer.logits[0][0]


def _outcome(
    runtime: str,
    job: _Job,
    answer: tuple[list[int], Tensor],
    expected: oracle.Prefill,
    dense: Any,
    model: Any,
) -> Outcome:
    tokens, logits = answer
    difference = float((logits - expected.logits[-1]).abs().max())
    seconds: dict[str, list[float]] = {"dense": [], "pruned": []}
    for _ in range(ROUNDS):
        # In turn, so that both see the same machine.
        for name, timed in (("dense", dense), ("pruned", model)):
            start = time.perf_counter()
            _generate(timed, job.inputs, 1)
            seconds[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return Outcome(runtime, tokens, difference, **medians, seconds=seconds)


def _check(outcome: Outcome, answer: list[int]) -> None:
    """Hold a runtime against the oracle."""
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
    visual = (sample.input_ids == config.image_token_id).nonzero()[:, 0]
    patches = {int(position): patch for patch, position in enumerate(visual)}
    cuts = [cut.layer for cut in job.recipe.cuts]
    shown = [cuts[i * (len(cuts) - 1) // (PANELS - 1)] for i in range(PANELS)]
    kept = {
        layer: [patches[int(p)] for p in expected.kept[layer] if int(p) in patches]
        for layer in dict.fromkeys(shown)
    }
    seen = unnormalise(job.inputs["pixel_values"][0], job.processor)
    return draw_kept(
        seen, kept, (side, side), job.folder / "kept.png", title=job.recipe.name
    )


def _report(
    job: _Job, answer: list[int], outcomes: list[Outcome], picture: Path
) -> None:
    """Print what was found, and write it down."""
    ids = job.inputs["input_ids"][0]
    visual = int((ids == job.model.config.image_token_id).sum())
    geometry = Geometry.from_config(job.model.config)
    spent = cost(job.recipe, geometry, visual, len(ids) - visual)
    text = job.processor.decode(answer, skip_special_tokens=True)
    console = job.console
    console.print(f"\nVisual tokens after each layer, of {visual}:")
    console.print("  " + " ".join(map(str, spent.after)))
    console.print(
        f"Language model's MACs saved: {spent.total.saved:.1%} "
        f"({spent.visual.saved:.1%} over the visual tokens alone)"
    )
    console.print(_table(outcomes))
    console.print(f"Answer, the same from all runtimes and the oracle: {text!r}")
    console.print(
        "(The weights are random: the words mean nothing, the agreement does.)"
    )
    facts = {
        "recipe": job.recipe.name,
        "visual_tokens_after_each_layer": spent.after,
        "macs_saved": spent.total.saved,
        "runtimes": [asdict(outcome) for outcome in outcomes],
    }
    report = job.folder / "report.json"
    report.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    for what, where in (
        ("checkpoint", job.folder / "checkpoint"),
        ("ONNX export", job.folder / "onnx"),
        ("picture", picture),
        ("measurements", report),
    ):
        console.print(f"{what:>12}: {where}")


def _table(outcomes: list[Outcome]) -> Table:
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
