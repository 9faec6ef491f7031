"""What an export's precision costs: tokens equal to the oracle's, pruned and dense.

    python benchmarks/precision.py FOLDER [--limit 100] [--json FILE]

Questions about one picture, of the reference model. Each export, pruned and dense,
answers them greedily on ONNX Runtime's CPU; so does the oracle in float32, pruned and
dense. An answer's tokens are equal as long as all ahead of them are.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

import onnx_ir
import torch
from rich.console import Console
from rich.table import Table
from transformers.exporters import ExportFormat, OnnxExporter

from vtprune_fx import oracle
from vtprune_fx.evaluate import BATCH, NEW_TOKENS, inputs_of
from vtprune_fx.export import load, manifest, write_onnx
from vtprune_fx.export.quantize import Quantized, WeightOnly
from vtprune_fx.inputs import open_checkpoint
from vtprune_fx.recipe import Recipe, load_recipe
from vtprune_fx.reference import CHECKPOINT
from vtprune_fx.reference.questions import Sample, draw_samples

RECIPE = "fitprune-reference-55"
PRECISIONS = ("float32", "float16")
"""Those that ONNX Runtime's CPU provider runs."""

Answers = list[list[int]]


def main() -> None:
    """Export what is not there yet, ask, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="where files go")
    parser.add_argument("--limit", type=int, default=100)
    parser.add_argument("--json", type=Path, help="file for all numbers")
    arguments = parser.parse_args()
    drawn = (s for s in draw_samples("test", 0, 10**9) if len(s.pictures) == 1)
    samples = list(itertools.islice(drawn, arguments.limit))
    result = measure(arguments.folder, samples)
    Console().print(table(result, len(samples)))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


def measure(folder: Path, samples: Sequence[Sample]) -> dict[str, dict[str, float]]:
    """Shares of equal tokens and of equal answers, by export."""
    _, processor = open_checkpoint(CHECKPOINT)
    batches = [
        inputs_of(processor, samples[at : at + BATCH])
        for at in range(0, len(samples), BATCH)
    ]
    found: dict[str, dict[str, float]] = {}
    recipe = load_recipe(RECIPE)
    for name, cuts in (("pruned", recipe), ("dense", recipe.keep_all())):
        expected = _oracles(cuts, batches)
        for variant, path in _exports(folder, name, cuts, batches[0]):
            shares = _shares(expected, _answers(path, batches))
            found[f"{name}, {variant}"] = shares
            print(f"{name}, {variant}: {shares}", flush=True)
    return found


def _exports(
    folder: Path, name: str, recipe: Recipe, example: dict[str, Any]
) -> Iterator[tuple[str, Path]]:
    """An export for each precision, and for each type that weights are rounded to."""
    for precision in PRECISIONS:
        path = folder / f"{name}-{precision}"
        if not path.exists():
            parts = open_checkpoint(CHECKPOINT, getattr(torch, precision))
            visual = (example["input_ids"] == parts[0].config.image_token_id).sum(1)
            two = {"input_ids": example["input_ids"][:2]}
            two["attention_mask"] = example["attention_mask"][:2]
            two["pixel_values"] = example["pixel_values"][:2].to(parts[0].dtype)
            write_onnx(*parts, recipe.bound(int(visual[0])), path, two)
        yield precision, path
    whole = folder / f"{name}-float32"
    for to in get_args(Quantized):
        path = folder / f"{name}-{to}"
        if not path.exists():
            _round(whole, path, to)
        yield to, path


def _round(whole: Path, path: Path, to: Quantized) -> None:
    """What ``--quantize`` writes, from an export instead of from the model."""
    shutil.copytree(whole, path)
    (path / manifest.FILE).unlink()
    for name in ("prefill.onnx", "decode.onnx"):
        graph = OnnxExporter.load_program(whole / name)
        onnx_ir.external_data.load_to_model(graph)
        rounded = WeightOnly(to).quantize(graph, {}, ExportFormat.ONNX)
        OnnxExporter.save_program(rounded, path / name)
    changes = {"quantize": to, "files": manifest.hashes(path)}
    manifest.read(whole).model_copy(update=changes).write(path)


def _answers(path: Path, batches: Sequence[dict[str, Any]]) -> Answers:
    model: Any = load(path, device="cpu")
    answers: Answers = []
    for inputs in batches:
        ids = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
        answers += ids[:, inputs["input_ids"].shape[1] :].tolist()
    return answers


def _oracles(recipe: Recipe, batches: Sequence[dict[str, Any]]) -> Answers:
    model: Any
    processor: Any
    model, processor = open_checkpoint(CHECKPOINT)
    ends = (processor.tokenizer.eos_token_id,)
    answers: Answers = []
    for inputs in batches:
        positions = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
        samples = oracle.split_batch(model, **inputs, position_ids=positions)
        answers += [
            oracle.generate(model, recipe, sample, NEW_TOKENS, ends)
            for sample in samples
        ]
    return answers


def _shares(expected: Answers, answers: Answers) -> dict[str, float]:
    equal = whole = 0
    for right, found in zip(expected, answers, strict=True):
        same = [a == b for a, b in zip(right, found, strict=False)]
        ahead = len(list(itertools.takewhile(bool, same)))
        equal += ahead
        whole += ahead == len(right)
    total = sum(map(len, expected))
    return {"tokens": equal / total, "answers": whole / len(expected)}


def table(result: dict[str, dict[str, float]], questions: int) -> Table:
    """Pruned beside dense."""
    shown = Table(title=f"Equal to the oracle's, {questions} questions")
    shown.add_column("weights")
    for title in ("tokens", "answers"):
        shown.add_column(f"pruned,\n{title}", justify="right")
        shown.add_column(f"dense,\n{title}", justify="right")
    for variant in (*PRECISIONS, *get_args(Quantized)):
        pruned, dense = result[f"pruned, {variant}"], result[f"dense, {variant}"]
        shares = [
            f"{100 * of[kind]:.1f} %"
            for kind in ("tokens", "answers")
            for of in (pruned, dense)
        ]
        shown.add_row(variant, *shares)
    return shown


if __name__ == "__main__":
    main()
