"""What an export's precision costs: tokens equal to the oracle's, pruned and dense.

    python benchmarks/precision.py FOLDER [--limit 100] [--json FILE]

Questions about one picture, of the reference model. Each export, pruned and dense,
answers them greedily on ONNX Runtime's CPU; so does the oracle in float32, pruned and
dense. An answer's token counts as equal only if all tokens before it are.

That CPU provider has no bfloat16 kernels. So in an export of bfloat16 every operator is
made to compute in float32, what it reads widened and what it gives rounded back to
bfloat16: what kernels with a float32 accumulator give, all but the order of sums.
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
from onnx_ir.passes.common import ShapeInferencePass
from rich.console import Console
from rich.table import Table
from transformers.exporters import ExportFormat, OnnxExporter

from vtprune_fx import oracle
from vtprune_fx.evaluation.evaluate import BATCH, NEW_TOKENS, inputs_of
from vtprune_fx.export import load, manifest, write_onnx
from vtprune_fx.export.quantize import Quantized, WeightOnly
from vtprune_fx.models.encoding import counted_positions
from vtprune_fx.models.loading import open_checkpoint
from vtprune_fx.recipes.loading import load_recipe
from vtprune_fx.recipes.schema import Recipe
from vtprune_fx.reference import CHECKPOINT
from vtprune_fx.reference.questions import Sample, draw_samples

RECIPE = "fitprune-reference-55"
PRECISIONS = ("float32", "float16", "bfloat16")

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
            if precision == "bfloat16":
                _compute_in_float32(path)
        yield precision, path
    full = folder / f"{name}-float32"
    for to in get_args(Quantized):
        path = folder / f"{name}-{to}"
        if not path.exists():
            _round(full, path, to)
        yield to, path


def _round(full: Path, path: Path, to: Quantized) -> None:
    """What ``--quantize`` writes, from an export instead of from the model."""
    shutil.copytree(full, path)
    (path / manifest.FILE).unlink()
    for name in ("prefill.onnx", "decode.onnx"):
        graph = OnnxExporter.load_program(full / name)
        onnx_ir.external_data.load_to_model(graph)
        rounded = WeightOnly(to).quantize(graph, {}, ExportFormat.ONNX)
        OnnxExporter.save_program(rounded, path / name)
    changes = {"quantize": to, "files": manifest.hashes(path)}
    manifest.read(full).model_copy(update=changes).write(path)


def _compute_in_float32(path: Path) -> None:
    """Let operators of an export in bfloat16 compute in float32, and round."""
    for name in ("prefill.onnx", "decode.onnx"):
        graph = OnnxExporter.load_program(path / name)
        onnx_ir.external_data.load_to_model(graph)
        # Some values between two operators come without a type.
        graph = ShapeInferencePass()(graph).model
        for node in list(graph.graph):
            if node.op_type != "Cast":  # which the provider has
                _widen(graph.graph, node)
        OnnxExporter.save_program(graph, path / name)
    contents = manifest.read(path)
    (path / manifest.FILE).unlink()
    contents.model_copy(update={"files": manifest.hashes(path)}).write(path)


def _widen(graph: onnx_ir.Graph, node: onnx_ir.Node) -> None:
    """Put casts before and after a node that reads bfloat16."""
    narrow, wide = onnx_ir.DataType.BFLOAT16, onnx_ir.DataType.FLOAT
    read = [i for i, v in enumerate(node.inputs) if v is not None and v.dtype == narrow]
    if not read:
        return
    for index in read:
        cast = onnx_ir.node("Cast", [node.inputs[index]], {"to": wide})
        cast.outputs[0].dtype = wide
        graph.insert_before(node, cast)
        node.replace_input_with(index, cast.outputs[0])
    for value in node.outputs:
        if value.dtype != narrow:
            continue
        cast = onnx_ir.node("Cast", [value], {"to": narrow})
        rounded = cast.outputs[0]
        value.replace_all_uses_with(rounded, replace_graph_outputs=True)
        cast.replace_input_with(0, value)
        value.name, rounded.name = f"{value.name}.wide", value.name
        rounded.type, rounded.shape = onnx_ir.TensorType(narrow), value.shape
        value.type = onnx_ir.TensorType(wide)
        graph.insert_after(node, cast)


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
        positions = counted_positions(inputs["attention_mask"])
        samples = oracle.split_batch(model, **inputs, position_ids=positions)
        answers += [
            oracle.generate(model, recipe, sample, NEW_TOKENS, ends)
            for sample in samples
        ]
    return answers


def _shares(expected: Answers, answers: Answers) -> dict[str, float]:
    equal = complete = 0
    for right, found in zip(expected, answers, strict=True):
        same = [a == b for a, b in zip(right, found, strict=False)]
        prefix = len(list(itertools.takewhile(bool, same)))
        equal += prefix
        complete += prefix == len(right)
    total = sum(map(len, expected))
    return {"tokens": equal / total, "answers": complete / len(expected)}


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
