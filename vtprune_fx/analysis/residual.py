"""The residual stream and the rotary tables of a decoder's layers. Reads only.

* A layer's *output* is the one value [B, S, E] that is made in the layer's module and
  read outside of it. It is what the next layer gets.
* What *enters* the first layer is the one value [B, S, E] that is made outside and read
  in it, rotary tables apart.
* *Rotary tables* are what a query was rotated by: ``q * cos + rotate_half(q) * sin``.

Where a graph does not show one of them, it is None, and a recipe that needs it is
refused when it is placed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import sympy
import torch
from torch import Tensor
from torch.fx import Graph, Node

from vtprune_fx.graph.nodes import walk_back
from vtprune_fx.graph.sizes import size_expr
from vtprune_fx.graph.values import tensor_of, value_at_full_length

aten = torch.ops.aten

_VIEWS: frozenset[object] = frozenset(
    {
        # What stands between a rotated key and where it is used, or between a rotary
        # table and its product: the same numbers, perhaps repeated.
        aten.unsqueeze.default,
        aten.expand.default,
        aten.slice.Tensor,
        aten.reshape.default,
        aten.view.default,
        aten.clone.default,
        aten.contiguous.default,
        aten.to.dtype,
        aten.to.device,
        aten.to.dtype_layout,
    }
)


@dataclass(frozen=True)
class Stream:
    """What one layer shows. Nodes are given by name.

    Attributes:
        start: The last node ahead of the layer.
        entry: The residual stream that enters the layer, [B, S, E].
        output: The residual stream that leaves it, [B, S, E].
        cos: What its queries were rotated by, [B or 1, S, D].
        sin: As ``cos``.
        cached: The keys that the graph hands out, [B, G, S, D].
    """

    start: str | None
    entry: str | None
    output: str | None
    cos: str | None
    sin: str | None
    cached: str | None


def read_streams(
    graph: Graph, queries: Sequence[tuple[str, Node, Node]], tokens: sympy.Symbol
) -> list[Stream]:
    """Read the streams of all layers.

    Args:
        graph: The graph.
        queries: For each layer, the path of its attention's module, its rotated query
            and its keys.
        tokens: The symbol of the prompt's length.
    """
    prefixes = {layer_path(path): i for i, (path, _, _) in enumerate(queries)}
    home = {node: _layer_of(node, prefixes) for node in graph.nodes}
    outputs: list[list[Node]] = [[] for _ in queries]
    entries: list[Node] = []
    for node in graph.nodes:
        layer = home[node]
        readers = {home[user] for user in node.users if user.op != "output"}
        if not _is_stream(node, tokens) or readers <= {layer}:
            continue
        if layer is not None:
            outputs[layer].append(node)
        elif 0 in readers:
            entries.append(node)
    tables = [rotary(query) for _, query, _ in queries]
    entries = [node for node in entries if node not in tables[0]]
    first = next((node for node in graph.nodes if home[node] == 0), None)
    ends = [None if first is None else first.prev, *map(_only, outputs)]
    enters = [_only(entries), *map(_only, outputs)]
    return [
        Stream(
            start=_name(ends[layer]),
            entry=_name(enters[layer]),
            output=_name(enters[layer + 1]),
            cos=_name(tables[layer][0]),
            sin=_name(tables[layer][1]),
            cached=_name(_handed_out(key)),
        )
        for layer, (_, _, key) in enumerate(queries)
    ]


def layer_path(path: str) -> str:
    """``model.layers.7`` of ``model.layers.7.self_attn``: up to the last number."""
    parts = path.split(".")
    while parts and not parts[-1].isdigit():
        parts.pop()
    return ".".join(parts)


def module_path(node: Node) -> str:
    """Path of the innermost module that the node was traced in."""
    stack = node.meta.get("nn_module_stack") or {}
    return str(list(stack.values())[-1][0]) if stack else ""


def _layer_of(node: Node, prefixes: dict[str, int]) -> int | None:
    """The decoder layer that a node was traced in."""
    stack = node.meta.get("nn_module_stack") or {}
    layers = (prefixes.get(str(path)) for path, *_ in stack.values())
    return next((layer for layer in layers if layer is not None), None)


def seen_through(node: Node) -> Iterator[Node]:
    """``node``, and what it is a view of."""
    return walk_back(node, _VIEWS)


def _is_stream(node: Node, tokens: sympy.Symbol) -> bool:
    value = tensor_of(node)
    return (
        value is not None
        and value.dim() == 3
        and value.is_floating_point()
        and size_expr(value.shape[1]) == tokens
    )


def rotary(query: Node) -> tuple[Node | None, Node | None]:
    """(cos, sin) of ``q * cos + rotate_half(q) * sin``."""
    *_, rotated = seen_through(query)
    if rotated.target != aten.add.Tensor:
        return None, None
    products = [n for n in rotated.args if isinstance(n, Node)]
    if len(products) != 2 or any(n.target != aten.mul.Tensor for n in products):
        return None, None
    (_, cos), (turned, sin) = (product.args for product in products)
    if not isinstance(turned, Node) or turned.target != aten.cat.default:
        return None, None
    return _table(cos), _table(sin)


def _table(factor: object) -> Node | None:
    """The table [B or 1, S, D] behind a factor [B or 1, 1, S, D]."""
    if not isinstance(factor, Node):
        return None
    for node in seen_through(factor):
        value = value_at_full_length(node)
        if isinstance(value, Tensor) and value.dim() == 3:
            return node
    return None


def _handed_out(key: Node) -> Node | None:
    """The value behind a layer's keys that the graph returns."""
    for node in seen_through(key):
        if any(user.op == "output" for user in node.users):
            return node
    return None


def _only(found: Sequence[Node]) -> Node | None:
    return found[0] if len(found) == 1 else None


def _name(node: Node | None) -> str | None:
    return None if node is None else node.name
