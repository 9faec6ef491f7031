"""Prefill on ONNX Runtime, dense against pruned: time, realisation, and a profile.

    python -m benchmarks.prefill --runtime onnx [--preset cpu-mid] [--threads 2]

Model, prompt, recipes and realisation are those of ``benchmarks.prefill``; dense and
pruned graphs run in turn.

A profile of each then shows where the time goes, by part of the graph and by kind of
operator, and what is missing to 1: the time beyond the dense graph's, less the share of
MACs that is saved. With ``--fused`` the graphs also run after transformers' ONNX
Runtime fusions.
"""

from __future__ import annotations

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
from rich.table import Table
from transformers import PreTrainedModel
from transformers.exporters import OnnxConfig, OnnxExporter
from transformers.exporters.onnxruntime_fusions import fuse_for_onnxruntime

from benchmarks.presets import (
    TEXT_AFTER,
    TEXT_BEFORE,
    build,
    coalesced_recipe,
    prompt,
    realisation,
)
from vtprune_fx.capture.aten import dynamic_shapes, images_as_one_sequence
from vtprune_fx.export.to_onnx import OPSET, PrunedOnnxExporter
from vtprune_fx.models.encoding import prefill_inputs
from vtprune_fx.recipes.counting import Geometry, cost
from vtprune_fx.recipes.default import default_recipe
from vtprune_fx.recipes.schema import Recipe

ROUNDS = 9
PROFILED = 3

Feed = dict[str, Any]


def measure(
    folder: Path, preset: str, recipe: Recipe | None, threads: int, fused: bool
) -> dict[str, Any]:
    """Export what is not in the folder yet, run, profile."""
    folder = folder / preset
    folder.mkdir(parents=True, exist_ok=True)
    paths, feed, saved = prepared(folder, preset, recipe)
    if fused:
        paths |= {f"{name}, fused": _fused(path) for name, path in paths.items()}
    return {
        "onnxruntime": onnxruntime.__version__,
        "preset": preset,
        "threads": threads,
        "tokens": feed["input_ids"].shape[1],
        "macs_saved": saved,
        **_seconds(paths, feed, threads),
        "profiles": {
            name: _profile(path, feed, threads, folder) for name, path in paths.items()
        },
    }


# -------------------------------------------------------------------------- the graphs


def prepared(
    folder: Path, preset: str, recipe: Recipe | None
) -> tuple[dict[str, Path], Feed, dict[str, float]]:
    """Graphs by name, what they take, and the share of MACs that each saves."""
    model = build(preset, "cpu", torch.float32)
    # Two prompts, since one would be traced as the only number there is.
    inputs = prefill_inputs(model, prompt(model, 2, None))
    geometry = Geometry.from_config(model.config)
    visual = inputs["input_ids"].shape[1] - TEXT_BEFORE - TEXT_AFTER
    recipe = recipe or default_recipe(geometry.layers, visual)
    few = coalesced_recipe(recipe, geometry, visual)
    recipes = {"dense": recipe.keep_all()}
    recipes |= {f"{len(each.cuts)} cuts": each for each in (recipe, few)}
    paths = {name: folder / f"{name}.onnx" for name in recipes}
    for name, path in paths.items():
        if not path.exists():
            _export(model, inputs, recipes[name], path)
    feed = {name: value[:1].numpy() for name, value in inputs.items()}
    saved = {
        name: cost(each, geometry, visual, TEXT_BEFORE + TEXT_AFTER).total.saved
        for name, each in recipes.items()
    }
    return paths, feed, saved


def _export(
    model: PreTrainedModel, inputs: dict[str, Any], recipe: Recipe, path: Path
) -> None:
    """What ``export_onnx`` makes of a prompt with images; no decode graph."""
    shapes = dynamic_shapes(inputs)
    config = OnnxConfig(dynamic_shapes=shapes, opset_version=OPSET, optimize=False)
    with images_as_one_sequence(model):
        exporter = PrunedOnnxExporter(recipe)
        graph, _ = exporter.export_program(model, inputs, config)
    OnnxExporter.save_program(graph, path)


def _fused(path: Path) -> Path:
    """A copy of a graph beside it, with the fusions of transformers' exporter."""
    fused = path.with_name(f"{path.stem}, fused.onnx")
    if not fused.exists():
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
) -> dict[str, dict[str, list[float]]]:
    """Of each graph's runs, all in turn in every round, the first not counted.

    By the clock, and of the processor: with one thread these are equal where nothing
    else runs.
    """
    sessions = {name: _session(path, threads) for name, path in paths.items()}
    clocks = {"seconds": time.perf_counter, "processor_seconds": time.process_time}
    found: dict[str, dict[str, list[float]]] = {
        kind: {name: [] for name in paths} for kind in clocks
    }
    for turn in range(ROUNDS + 1):
        for name, session in sessions.items():
            starts = {kind: clock() for kind, clock in clocks.items()}
            session.run(["logits"], feed)
            for kind, clock in clocks.items():
                if turn:
                    found[kind][name].append(clock() - starts[kind])
    return found


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
    """All nodes that values are computed from, without looking beyond some."""
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


def _dense(name: str) -> str:
    """The graph that another one is compared with."""
    return "dense, fused" if name.endswith(", fused") else "dense"


def tables(result: dict[str, Any]) -> tuple[Table, Table, Table]:
    """Times; then where they go."""
    times = Table(
        title=f"Prefill of {result['tokens']} tokens, {result['preset']}, "
        f"{result['threads']} threads"
    )
    titles = ("graph", "ms", "spread", "processor", "MACs saved", "time saved")
    for title in (*titles, "realisation", "of processor's"):
        times.add_column(title, justify="left" if title == "graph" else "right")
    clock, processor = result["seconds"], result["processor_seconds"]
    for name, seconds in clock.items():
        median = statistics.median(seconds)
        row = [
            name,
            f"{1e3 * median:.0f}",
            f"{1e3 * min(seconds):.0f}-{1e3 * max(seconds):.0f}",
            f"{1e3 * statistics.median(processor[name]):.0f}",
        ]
        if saved := result["macs_saved"][name.removesuffix(", fused")]:
            reached = [
                realisation(of[_dense(name)], of[name], saved)
                for of in (clock, processor)
            ]
            row += [f"{saved:.1%}", f"{saved * reached[0]:.1%}"]
            row += [f"{share:.2f}" for share in reached]
        times.add_row(*row)
    times.caption = "MACs of the decoder's layers; time of all."
    return times, _profiles(result, "parts"), _profiles(result, "operators")


def _profiles(result: dict[str, Any], kind: str) -> Table:
    """Milliseconds; for pruned graphs also what is missing to a realisation of 1."""
    profiles = {name: found[kind] for name, found in result["profiles"].items()}
    table = Table(title=f"By {kind}: ms a run; realisation lost")
    table.add_column(kind)
    for name in profiles:
        table.add_column(name, justify="right")
    rows = sorted(
        {row for found in profiles.values() for row in found},
        key=lambda row: -max(found.get(row, 0) for found in profiles.values()),
    )
    for row in [*rows[:20], None]:
        cells = (_cell(result, profiles, name, row) for name in profiles)
        table.add_row(row or "all", *cells)
    return table


def _cell(
    result: dict[str, Any],
    profiles: dict[str, dict[str, float]],
    name: str,
    row: str | None,
) -> str:
    """One row's time in one graph, of all rows' if it is None."""
    pruned, dense = (
        sum(found.values()) if row is None else found.get(row, 0.0)
        for found in (profiles[name], profiles[_dense(name)])
    )
    saved = result["macs_saved"][name.removesuffix(", fused")]
    if not saved:
        return f"{pruned:.1f}"
    total = sum(profiles[_dense(name)].values())
    return f"{pruned:.1f}; {(pruned - (1 - saved) * dense) / (saved * total):+.3f}"
