"""The residual stream and the rotary tables of a decoder's layers. Reads only.

* A layer's *output* is the one value [B, S, E] that is made in the layer's module and
  read outside of it. It is what the next layer gets.
* What *enters* the first layer is the one value [B, S, E] that is made outside and read
  in it, rotary tables apart.
* *Rotary tables* are what a query was rotated by: ``q * cos + rotate_half(q) * sin``.

Where a graph does not show one of them, it is None, and why is kept beside it: a recipe
that needs it is refused with that reason when it is placed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import sympy
import torch
from torch import Tensor
from torch.fx import Graph, Node

from vtprune_fx.analysis.no_match import NoMatch
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
        start: The last node before the layer.
        entry: The residual stream at the layer's input, [B, S, E].
        output: The residual stream at its output, [B, S, E].
        cos: What its queries were rotated by, [B or 1, S, D].
        sin: As ``cos``.
        cached: The keys that the graph returns, [B, G, S, D].
        no_start: Why ``start`` is None.
        no_entry: Why ``entry`` is None.
        no_output: Why ``output`` is None.
        no_rotary: Why ``cos`` and ``sin`` are None.
    """

    start: str | None
    entry: str | None
    output: str | None
    cos: str | None
    sin: str | None
    cached: str | None
    no_start: NoMatch | None = None
    no_entry: NoMatch | None = None
    no_output: NoMatch | None = None
    no_rotary: NoMatch | None = None


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
    if isinstance(tables[0], tuple):
        entries = [node for node in entries if node not in tables[0]]
    starts = [node.prev for node in graph.nodes if home[node] == 0][:1]
    values = [
        _only(entries, "one value before the first layer that it reads"),
        *(_only(found, "one value that the layer returns") for found in outputs),
    ]
    return [
        _stream(
            values[layer] if layer else _only(starts, "a node before the first layer"),
            (values[layer], values[layer + 1]),
            tables[layer],
            _returned(key),
        )
        for layer, (_, _, key) in enumerate(queries)
    ]


def _stream(
    start: Node | NoMatch,
    ends: tuple[Node | NoMatch, Node | NoMatch],
    tables: tuple[Node, Node] | NoMatch,
    cached: Node | None,
) -> Stream:
    """What one layer shows: ``ends`` are its input and its output."""
    entry, output = ends
    cos, sin = (None, None) if isinstance(tables, NoMatch) else tables
    return Stream(
        start=_name(start),
        entry=_name(entry),
        output=_name(output),
        cos=_name(cos),
        sin=_name(sin),
        cached=_name(cached),
        no_start=_why(start),
        no_entry=_why(entry),
        no_output=_why(output),
        no_rotary=_why(tables),
    )


def _why(found: object) -> NoMatch | None:
    return found if isinstance(found, NoMatch) else None


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


def rotary(query: Node) -> tuple[Node, Node] | NoMatch:
    """(cos, sin) of ``q * cos + rotate_half(q) * sin``."""
    *_, rotated = seen_through(query)
    if rotated.target != aten.add.Tensor:
        return NoMatch("a query that is no sum", rotated.name, _ROTATED)
    products = [n for n in rotated.args if isinstance(n, Node)]
    if len(products) != 2 or any(n.target != aten.mul.Tensor for n in products):
        return NoMatch("a sum of other terms than two products", rotated.name, _ROTATED)
    (_, cos), (turned, sin) = (product.args for product in products)
    if not isinstance(turned, Node) or turned.target != aten.cat.default:
        return NoMatch("no rotate_half in the second term", products[1].name, _ROTATED)
    tables = _table(cos), _table(sin)
    if tables[0] is None or tables[1] is None:
        product = products[0 if tables[0] is None else 1]
        return NoMatch("a factor that is no table", product.name, _TABLE)
    return tables[0], tables[1]


_ROTATED = "q * cos + rotate_half(q) * sin"
_TABLE = "a view of a table [batch or 1, prompt, head width]"


def _table(factor: object) -> Node | None:
    """The table [B or 1, S, D] that a factor [B or 1, 1, S, D] is a view of."""
    if not isinstance(factor, Node):
        return None
    for node in seen_through(factor):
        value = value_at_full_length(node)
        if isinstance(value, Tensor) and value.dim() == 3:
            return node
    return None


def _returned(key: Node) -> Node | None:
    """A layer's keys, or what they are a view of, as the graph returns them."""
    for node in seen_through(key):
        if any(user.op == "output" for user in node.users):
            return node
    return None


def _only(found: Sequence[Node], expected: str) -> Node | NoMatch:
    if len(found) == 1:
        return found[0]
    if not found:
        return NoMatch("none", None, expected)
    names = ", ".join(node.name for node in found)
    return NoMatch(f"{len(found)} ({names})", found[0].name, expected)


def _name(node: Node | NoMatch | None) -> str | None:
    return node.name if isinstance(node, Node) else None
