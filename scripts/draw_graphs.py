"""Draw one decoder layer's graph before and after pruning, for docs/concepts.md.

    python scripts/draw_graphs.py

A tiny LLaVA is traced and pruned. A box is a run of operators of one module, or of one
kind that a pass inserted, with the shape of its output; a line is a value that one box
makes and another reads. Nothing is drawn by hand.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

import sympy
import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig
from transformers import LlavaForConditionalGeneration as Llava

from vtprune_fx.analysis.anatomy import Anatomy, read
from vtprune_fx.analysis.residual import module_path
from vtprune_fx.capture.aten import export
from vtprune_fx.graph.sizes import size_expr
from vtprune_fx.graph.stamps import STAMP, StampKind
from vtprune_fx.graph.values import dropped_tokens, value_at_full_length
from vtprune_fx.pruning import prune_graph
from vtprune_fx.recipes.loading import load_recipe
from vtprune_fx.recipes.schema import Cut, Recipe

FOLDER = Path(__file__).parent.parent / "docs" / "images"
LAYER = "language_model.layers.1."
WIDTH, HEIGHT, GAP, REACH = 330, 40, 14, 16
INSERTED = {
    StampKind.CHECK: ("check", "#fdd"),
    StampKind.SCORE: ("score", "#ffe9b8"),
    StampKind.ROLES: ("score", "#ffe9b8"),
    StampKind.CHOICE: ("keep", "#ffd37a"),
    StampKind.KEEP: ("keep", "#ffd37a"),
    StampKind.GATHER: ("gather", "#cfe8ff"),
}
"""Label and colour of what is inserted."""


@dataclass
class Box:
    """Operators that stand for one thing.

    Attributes:
        label: The module in the layer, or what was inserted.
        fill: Its colour.
        nodes: The operators.
        reads: Boxes whose values they read.
    """

    label: str
    fill: str
    nodes: list[Node] = field(default_factory=list)
    reads: list[int] = field(default_factory=list)


def main() -> None:
    """Draw both pictures."""
    module, recipe = traced(), one_cut()
    anatomy = read(module.graph)
    assert anatomy is not None
    FOLDER.mkdir(parents=True, exist_ok=True)
    write("layer-before", boxes(module), anatomy)
    prune_graph(module, recipe)
    write("layer-after", boxes(module), anatomy)


def traced() -> GraphModule:
    """The graph of a LLaVA of two layers, 16 visual tokens an image."""
    sizes: dict[str, Any] = {"num_hidden_layers": 2, "num_attention_heads": 2}
    text = LlamaConfig(
        vocab_size=100, hidden_size=32, intermediate_size=48, head_dim=16, **sizes
    )
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, image_size=56, patch_size=14, **sizes
    )
    config = LlavaConfig(text_config=text, vision_config=vision, image_token_index=99)
    model = Llava(config)
    model.train(mode=False)
    ids = torch.tensor([[1, 2, *[99] * 16, 3, 4]] * 2)
    pixels = torch.zeros(2, 3, 56, 56)
    mask = torch.ones_like(ids)
    inputs = {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels}
    module: GraphModule = copy.deepcopy(export(model, inputs).graph_module)
    return module


def one_cut() -> Recipe:
    """Four visual tokens are dropped in the middle of the second layer."""
    published = load_recipe("fitprune-llava-1.5-7b-60")
    changes = {"layers": 2, "visual_tokens": 16, "cuts": (Cut(layer=1, drop=4),)}
    return published.model_copy(update=changes)


def boxes(module: GraphModule) -> list[Box]:
    """The second layer's operators, runs of one kind together."""
    graph: Iterable[Node] = module.graph.nodes
    inside = [node for node in graph if LAYER in f"{module_path(node)}."]
    found: list[Box] = []
    for (label, fill), run in itertools.groupby(inside, key=kind):
        found.append(Box(label, fill, list(run)))
    home = {node: i for i, box in enumerate(found) for node in box.nodes}
    for index, box in enumerate(found):
        sources = {home.get(n, -1) for node in box.nodes for n in tensors(node)}
        box.reads = sorted(sources - {index})
    return found


def kind(node: Node) -> tuple[str, str]:
    """Label and colour of the box that a node belongs to."""
    stamp = node.meta.get(STAMP)
    if stamp is not None:
        label, fill = INSERTED[stamp.kind]
        return f"inserted: {label}", fill
    _, _, inner = f"{module_path(node)}.".partition(LAYER)
    return inner.rstrip(".") or "residual stream", "#f4f4f4"


def tensors(node: Node) -> Iterator[Node]:
    """Inputs that are tensors."""
    for source in node.all_input_nodes:
        if isinstance(value_at_full_length(source), Tensor):
            yield source


def write(name: str, found: list[Box], anatomy: Anatomy) -> None:
    """Write one picture as SVG."""
    height = len(found) * (HEIGHT + GAP) + GAP
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH + 90}" '
        f'height="{height}" font-family="sans-serif" font-size="12">'
    )
    parts = [head]
    for index, box in enumerate(found):
        parts += [line(source, index) for source in box.reads if source >= 0]
    for index, box in enumerate(found):
        top = index * (HEIGHT + GAP) + GAP
        count = f"{len(box.nodes)} operator{'s' * (len(box.nodes) > 1)}"
        last = escape(shape(box.nodes[-1], anatomy))
        frame = f'width="{WIDTH}" height="{HEIGHT}" rx="5" stroke="#666"'
        parts += [
            f'<rect x="4" y="{top}" {frame} fill="{box.fill}"/>',
            f'<text x="14" y="{top + 16}">{escape(box.label)} ({count})</text>',
            f'<text x="14" y="{top + 32}" fill="#555">{last}</text>',
        ]
    text = "\n".join((*parts, "</svg>\n"))
    (FOLDER / f"{name}.svg").write_text(text, encoding="utf-8")


def line(source: int, target: int) -> str:
    """A value from one box to another: straight to the next, around all others."""
    step = HEIGHT + GAP
    start, end = (source + 1) * step, target * step + GAP
    if target == source + 1:
        return f'<path d="M{WIDTH // 2} {start}V{end}" stroke="#666"/>'
    far = WIDTH + 4 + min(80, REACH + 6 * (target - source))
    start, end = start - HEIGHT // 2, end + HEIGHT // 2
    return (
        f'<path d="M{WIDTH + 4} {start}C{far} {start} {far} {end} {WIDTH + 4} {end}" '
        'fill="none" stroke="#999"/>'
    )


def shape(node: Node, anatomy: Anatomy) -> str:
    """The shape of a node's value, in words for what varies."""
    value = value_at_full_length(node)
    if not isinstance(value, Tensor):
        return ""
    names = {anatomy.tokens: sympy.Symbol("S"), anatomy.batch: sympy.Symbol("B")}
    gone = dropped_tokens(node) or 0
    left = {sympy.Symbol("S"): sympy.Symbol("S") - gone}
    sizes = (size_expr(size).subs(names).subs(left) for size in value.shape)
    return f"[{', '.join(map(str, sizes))}]"


if __name__ == "__main__":
    main()
