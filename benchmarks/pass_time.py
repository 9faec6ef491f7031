"""How long the pass takes, and how that grows with the number of layers.

    python benchmarks/pass_time.py [--layers 4 8 16 32] [--json FILE]

Exports a tiny LLaVA of each depth (its width does not matter: no arithmetic is done),
prunes the graph with as many cuts as there are layers, and prints the time of planning,
of each pass and of each verification, as the median of several runs.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import statistics
import time
from pathlib import Path

import torch
from torch.fx import GraphModule
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig
from transformers import LlavaForConditionalGeneration as Llava

from vtprune_fx.capture.aten import export
from vtprune_fx.pruning import prune_graph
from vtprune_fx.recipes.schema import Cut, Provenance, Recipe

VISUAL_TOKENS = 576
RUNS = 5


def tiny_llava(layers: int) -> Llava:
    """LLaVA-1.5's geometry with narrow layers."""
    vision = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=336,
        patch_size=14,
    )
    text = LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=4,
        vocab_size=64,
    )
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=60)
    model = Llava(config)
    model.train(mode=False)
    return model


def cuts_everywhere(layers: int) -> Recipe:
    """A recipe that drops a different number of tokens at every layer."""
    return Recipe(
        schema_version=1,
        name=f"cuts-{layers}",
        method="fitprune",
        score="fitprune",
        positions="kept",
        layers=layers,
        visual_tokens=VISUAL_TOKENS,
        cuts=tuple(Cut(layer=i, drop=1 + i % 16) for i in range(layers)),
        provenance=Provenance(source="benchmarks/pass_time.py"),
    )


def traced(layers: int) -> GraphModule:
    """The graph that is pruned."""
    ids = torch.randint(0, 50, (2, 35 + VISUAL_TOKENS + 40))
    ids[:, 35 : 35 + VISUAL_TOKENS] = 60
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.randn(2, 3, 336, 336),
    }
    module: GraphModule = export(tiny_llava(layers), inputs).graph_module
    return module


def measure(layers: int) -> dict[str, float]:
    """Median seconds by step."""
    module, recipe = traced(layers), cuts_everywhere(layers)
    runs: list[dict[str, float]] = []
    for _ in range(RUNS):
        fresh = copy.deepcopy(module)
        start = time.perf_counter()
        report = prune_graph(fresh, recipe)
        assert report is not None, "the prompt has an image"
        steps = {"all": time.perf_counter() - start}
        for record in report.passes:
            steps[record.name] = record.seconds
            steps[f"{record.name}, verified"] = record.verify_seconds
        steps["nodes before"] = report.nodes_before
        steps["nodes after"] = report.nodes_after
        runs.append(steps)
    return {step: statistics.median(run[step] for run in runs) for step in runs[0]}


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 8, 16, 32])
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    results = {layers: measure(layers) for layers in options.layers}
    steps = list(next(iter(results.values())))
    print(f"{'':28}" + "".join(f"{layers:>9} layers" for layers in results))
    for step in steps:
        cells = (f"{result[step]:16.3f}" for result in results.values())
        print(f"{step:28}" + "".join(cells))
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
