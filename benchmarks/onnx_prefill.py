"""Prefill on ONNX Runtime, dense against pruned: time, realisation, and a profile.

    python benchmarks/onnx_prefill.py FOLDER [--json FILE]

A LLaVA with random weights (576 visual tokens, 8 decoder layers 512 wide) and the
schedule of ``fitprune-llava-1.5-7b-60``, stretched to its depth. Dense and pruned run
in turn; medians. Realisation is time saved over MACs saved, both as shares of the dense
run's: 1 is the limit. A profile of each then tells where the time goes: by kind of
operator, and in the pruned graph by part, of which scorer and gathers are what pruning
adds. With ``--fused`` both graphs are also run behind transformers' ONNX Runtime
fusions.
"""

from __future__ import annotations

import argparse
import collections
import json
import statistics
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import onnx_ir
import onnxruntime
import torch
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel
from transformers.exporters import OnnxConfig, OnnxExporter
from transformers.exporters.onnxruntime_fusions import fuse_for_onnxruntime

from vtprune_fx import capture
from vtprune_fx.checkpoint import CheckpointSpec, build_checkpoint
from vtprune_fx.cost import Geometry, cost
from vtprune_fx.export.to_onnx import OPSET, PrunedOnnxExporter
from vtprune_fx.inputs import batch_inputs, open_checkpoint
from vtprune_fx.picture import sample_photo
from vtprune_fx.recipe import Recipe, default

SPEC = CheckpointSpec(layers=8, hidden=512, heads=8, intermediate=1408)
QUESTION = "What is on the table? " * 8
ROUNDS = 9
PROFILED = 3

Feed = dict[str, Any]


def main() -> None:
    """Export what is not there yet, run, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="where files go")
    parser.add_argument("--json", type=Path, help="file for all numbers")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--fused", action="store_true", help="ONNX Runtime fusions too")
    arguments = parser.parse_args()
    result = measure(arguments.folder, arguments.threads, arguments.fused)
    Console().print(*tables(result))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


def measure(folder: Path, threads: int, fused: bool) -> dict[str, Any]:
    """Times, what they come to, and where they go."""
    model, processor = open_checkpoint(build_checkpoint(folder / "checkpoint", SPEC))
    recipe = default(SPEC.layers, SPEC.visual_tokens)
    inputs = batch_inputs(processor, [(QUESTION, [sample_photo()])])
    paths = {name: folder / f"{name}.onnx" for name in ("dense", "pruned")}
    for path, cuts in zip(paths.values(), (recipe.keep_all(), recipe), strict=True):
        if not path.exists():
            _export(model, inputs, cuts, path)
    if fused:
        paths |= {f"{name}, fused": _fuse(path) for name, path in paths.items()}
    tokens = inputs["input_ids"].shape[1]
    feed = {name: value.numpy() for name, value in inputs.items()}
    feed["position_ids"] = torch.arange(tokens)[None].numpy()
    visual = SPEC.visual_tokens
    spent = cost(recipe, Geometry.from_config(model.config), visual, tokens - visual)
    seconds = _seconds(paths, feed, threads)
    return {
        "onnxruntime": onnxruntime.__version__,
        "threads": threads,
        "tokens": tokens,
        "recipe": recipe.name,
        "macs_saved": spent.total.saved,
        "seconds": seconds,
        "profiles": {
            name: _profile(path, feed, threads, folder) for name, path in paths.items()
        },
    }


def _export(
    model: PreTrainedModel, inputs: dict[str, Any], recipe: Recipe, path: Path
) -> None:
    """What ``export_onnx`` makes of a prompt with images; no decode graph."""
    example = capture.example(inputs)
    example["position_ids"] = (example["attention_mask"].cumsum(1) - 1).clamp(min=0)
    shapes = capture.dynamic_shapes(example)
    config = OnnxConfig(dynamic_shapes=shapes, opset_version=OPSET, optimize=False)
    with capture.images_as_one_sequence(model):
        exporter = PrunedOnnxExporter(recipe)
        graph, _ = exporter.export_program(model, example, config)
    OnnxExporter.save_program(graph, path)


def _fuse(path: Path) -> Path:
    """A graph behind the fusions that transformers' exporter offers, beside it."""
    fused = path.with_name(f"{path.stem}-fused.onnx")
    model = onnx_ir.load(path)
    fuse_for_onnxruntime(model, "cpu")
    OnnxExporter.save_program(model, fused)
    return fused


def _session(path: Path, threads: int, profile: Path | None = None) -> Any:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    if profile is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(profile / "profile")
    return onnxruntime.InferenceSession(path, options)


def _seconds(
    paths: Mapping[str, Path], feed: Feed, threads: int
) -> dict[str, list[float]]:
    """Of each graph's runs, all in turn in every round, the first not counted.

    Of the processor: with one thread as long as a run takes where nothing else runs.
    """
    sessions = {name: _session(path, threads) for name, path in paths.items()}
    seconds: dict[str, list[float]] = {name: [] for name in paths}
    for _ in range(ROUNDS + 1):
        for name, session in sessions.items():
            start = time.process_time()
            session.run(["logits"], feed)
            seconds[name].append(time.process_time() - start)
    return {name: times[1:] for name, times in seconds.items()}


# ------------------------------------------------------------------------- the profile


def _profile(
    path: Path, feed: Feed, threads: int, folder: Path
) -> dict[str, dict[str, float]]:
    """Milliseconds of a run by kind of operator, and by part."""
    session = _session(path, threads, folder)
    for _ in range(PROFILED):
        session.run(None, feed)
    file = Path(session.end_profiling())
    events = json.loads(file.read_text())
    file.unlink()
    parts = dict(_parts(onnx_ir.load(path)))
    kinds: collections.Counter[str] = collections.Counter()
    shares: collections.Counter[str] = collections.Counter()
    for event in events:
        if event.get("cat") != "Node" or not event["name"].endswith("_kernel_time"):
            continue
        name = event["name"].removesuffix("_kernel_time")
        milliseconds = event["dur"] / 1000 / PROFILED
        kinds[event["args"]["op_name"]] += milliseconds
        shares[parts.get(name, "fused")] += milliseconds
    return {"operators": dict(kinds.most_common()), "parts": dict(shares)}


def _parts(model: onnx_ir.Model) -> Iterator[tuple[str, str]]:
    """Which part each node belongs to, by its name.

    The scorer is what only keep sets are computed from; gathers are what takes rows by
    them, and the indices for it.
    """
    keeps = [
        value
        for node in model.graph
        for value in node.outputs
        if (value.name or "").startswith("keep_sets.")
    ]
    results = [v for v in model.graph.outputs if v not in keeps]
    needed = _sources(results, stop=keeps)
    scorer = _sources(keeps, stop=[]) - needed
    places = set(keeps)
    for node in model.graph:
        yield str(node.name), _part(node, scorer, places)


def _part(
    node: onnx_ir.Node, scorer: set[onnx_ir.Node], places: set[onnx_ir.Value]
) -> str:
    """A node's part; ``places`` grows by what is computed from places alone."""
    if node in scorer:
        return "scorer"
    if any(value in places for value in node.inputs if value is not None):
        if node.op_type != "GatherND":
            places.update(node.outputs)
        return "gathers"
    scopes = node.metadata_props.get("namespace", "")
    for part in ("vision_tower", "multi_modal_projector", "lm_head"):
        if part in scopes:
            return part
    return "layers"


def _sources(
    values: list[onnx_ir.Value], stop: list[onnx_ir.Value]
) -> set[onnx_ir.Node]:
    """All nodes that values are computed from, not looking behind some."""
    found: set[onnx_ir.Node] = set()
    waiting = [value.producer() for value in values if value not in stop]
    while waiting:
        node = waiting.pop()
        if node is None or node in found:
            continue
        found.add(node)
        inputs = (v for v in node.inputs if v is not None and v not in stop)
        waiting += [value.producer() for value in inputs]
    return found


# ------------------------------------------------------------------------- the tables


def tables(result: dict[str, Any]) -> tuple[Table, Table, Table]:
    """Times; then where they go."""
    times = Table(title=f"Prefill of {result['tokens']} tokens, {result['recipe']}")
    for title in ("graph", "median, ms", "spread, ms", "time saved", "realisation"):
        times.add_column(title, justify="left" if title == "graph" else "right")
    dense = statistics.median(result["seconds"]["dense"])
    for name, seconds in result["seconds"].items():
        median = statistics.median(seconds)
        saved = 1 - median / dense
        ratio = f"{saved / result['macs_saved']:.2f}" if "pruned" in name else ""
        spread = f"{1e3 * min(seconds):.0f}-{1e3 * max(seconds):.0f}"
        times.add_row(name, f"{1e3 * median:.0f}", spread, f"{saved:.1%}", ratio)
    times.caption = f"MACs saved: {result['macs_saved']:.1%} of the language model's"
    return times, _profiles(result, "operators"), _profiles(result, "parts")


def _profiles(result: dict[str, Any], kind: str) -> Table:
    profiles = {name: found[kind] for name, found in result["profiles"].items()}
    table = Table(title=f"By {kind}, ms a run")
    table.add_column(kind)
    for name in profiles:
        table.add_column(name, justify="right")
    rows = sorted(
        {row for found in profiles.values() for row in found},
        key=lambda row: -max(found.get(row, 0) for found in profiles.values()),
    )
    for row in rows[:14]:
        table.add_row(row, *(f"{found.get(row, 0):.1f}" for found in profiles.values()))
    return table


if __name__ == "__main__":
    main()
