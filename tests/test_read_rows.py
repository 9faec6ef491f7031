"""Rows that nobody reads are not computed."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.nn.functional import layer_norm, linear, silu

from tests.tiny import batch, planned, recipe_for, tiny_llava
from vtprune_fx import vtprune_backend
from vtprune_fx.graph.nodes import readable
from vtprune_fx.graph.sizes import size_expr
from vtprune_fx.passes import ReadRows
from vtprune_fx.passes.verify import Verifier

WIDTH = 8


class Tail(NamedTuple):
    """The end of a decoder.

    Attributes:
        run: Of the residual stream [B, S, E] and a weight [E, E].
        rows: How many are computed by the linear operator; None for all.
        moves: Whether the slice moves at all.
    """

    run: Callable[[Tensor, Tensor], Any]
    rows: int | None
    moves: bool


def mlp(stream: Tensor, weight: Tensor) -> Tensor:
    normal = layer_norm(stream, (WIDTH,))
    scaled = stream * (stream.pow(2).mean(-1, keepdim=True) + 1).rsqrt()
    return stream + silu(linear(normal, weight)) * scaled


def two_tails(stream: Tensor, weight: Tensor) -> Tensor:
    return torch.cat((mlp(stream, weight)[:, -1:], stream.exp()[:, -2:]), dim=1)


def over_tokens(stream: Tensor, weight: Tensor) -> Tensor:
    """All that linear gives is read; of the sum behind it one row is."""
    return (linear(stream, weight).softmax(dim=1) + stream)[:, -1:]


def mean_of_tokens(stream: Tensor, weight: Tensor) -> Tensor:
    return (linear(stream, weight) + stream.mean(dim=1, keepdim=True))[:, -1:]


def norm_over_both(stream: Tensor, weight: Tensor) -> Tensor:
    normal = layer_norm(linear(stream, weight), tuple(stream.shape[1:]))
    return normal[:, -1:]


def by_places(stream: Tensor, weight: Tensor) -> Tensor:
    """[S, E] beside [B, S, E]: the tokens are on another axis."""
    return (linear(stream, weight) + stream[0])[:, -1:]


TAILS = {
    "last row": Tail(lambda x, w: mlp(x, w)[:, -1:], 1, moves=True),
    "last three": Tail(lambda x, w: mlp(x, w)[:, -3:], 3, moves=True),
    "two slices": Tail(two_tails, 1, moves=True),
    "beside a mean of tokens": Tail(mean_of_tokens, 1, moves=True),
    "read as a whole, too": Tail(
        lambda x, w: (y := mlp(x, w), y[:, -1:]), None, moves=False
    ),
    "first row": Tail(lambda x, w: mlp(x, w)[:, :1], None, moves=False),
    "all but the last": Tail(lambda x, w: mlp(x, w)[:, :-1], None, moves=False),
    "softmax over tokens": Tail(over_tokens, None, moves=True),
    "norm over tokens": Tail(norm_over_both, None, moves=False),
    "tokens on another axis": Tail(by_places, None, moves=False),
}


@pytest.mark.parametrize("name", TAILS)
def test_rows_that_nobody_reads_are_not_computed(name: str) -> None:
    run, rows, moves = TAILS[name]
    generator = torch.Generator().manual_seed(0)
    stream = torch.randn(2, 7, WIDTH, generator=generator)
    weight = torch.randn(WIDTH, WIDTH, generator=generator)
    module, pass_, verifier = exported(run, stream, weight)
    text, expected = readable(module), module(stream, weight)
    modified = pass_(module).modified
    verifier.check(module, pass_.name)
    torch.testing.assert_close(module(stream, weight), expected)
    assert computed(module) == (rows or "S")
    assert modified == moves
    assert modified == (readable(module) != text)
    assert not pass_(module).modified


def exported(
    run: Callable[[Tensor, Tensor], Any], stream: Tensor, weight: Tensor
) -> tuple[GraphModule, ReadRows, Verifier]:
    """A graph, a pass on a plan for its prompts, and what checks what it writes."""

    class Decoder(torch.nn.Module):
        def forward(self, stream: Tensor, weight: Tensor) -> Any:
            return run(stream, weight)

    tokens = torch.export.Dim("tokens", min=4, max=100)
    program = torch.export.export(
        Decoder(), (stream, weight), dynamic_shapes=({1: tokens}, {})
    )
    module = program.graph_module
    [node, _] = module.graph.find_nodes(op="placeholder")
    symbol = size_expr(node.meta["val"].shape[1])
    _, plan = planned({0: 3})
    plan = dataclasses.replace(plan, tokens=symbol)
    return module, ReadRows(plan), Verifier(module, symbol, 0, {})


def computed(module: GraphModule) -> int | str:
    """How many rows the linear operator gives."""
    [node] = module.graph.find_nodes(
        op="call_function", target=torch.ops.aten.linear.default
    )
    rows = node.meta["val"].shape[1]
    return rows if isinstance(rows, int) else "S"


def test_without_cuts_nothing_moves() -> None:
    stream, weight = torch.randn(2, 7, WIDTH), torch.randn(WIDTH, WIDTH)
    module, _, _ = exported(TAILS["last row"].run, stream, weight)
    _, plan = planned({})
    assert not ReadRows(plan)(module).modified


@pytest.mark.parametrize("keep", [1, 2])
def test_the_last_layer_behind_its_attention_computes_what_logits_are_asked_of(
    keep: int,
) -> None:
    model, graphs = tiny_llava(layers=2), []

    def inner(module: GraphModule, _: Any) -> GraphModule:
        graphs.append(module.graph)
        return module

    inputs = batch(model, (3, 6), (9, 1))
    for name in ("input_ids", "attention_mask"):
        torch._dynamo.mark_dynamic(inputs[name], 1)
    told: dict[str, Any] = {"recipe": recipe_for(2, {0: 3, 1: 5}), "inner": inner}
    compiled: Any = torch.compile(
        model, backend=vtprune_backend, options=told, fullgraph=True
    )
    with torch.no_grad():
        few = compiled(**inputs, logits_to_keep=keep)
        every = compiled(**inputs)
    torch.testing.assert_close(few.logits, every.logits[:, -keep:])
    widths = {layer: mlp_rows(graphs[0], layer) for layer in (0, 1)}
    assert widths == {0: {"S"}, 1: {keep}}
    assert mlp_rows(graphs[1], 1) == {"S"}, "all logits are asked for"


def mlp_rows(graph: Any, layer: int) -> set[int | str]:
    """How many rows the linear operators of an MLP give."""
    found: set[int | str] = set()
    for node in graph.nodes:
        path = str(node.meta.get("nn_module_stack", ""))
        if re.search(rf"language_model\.layers(\.|\[){layer}\]?\.mlp", path):
            found |= rows_of(node)
    return found


def rows_of(node: Node) -> set[int | str]:
    if node.target != torch.ops.aten.linear.default:
        return set()
    rows = node.meta["val"].shape[1] if "val" in node.meta else "S"
    return {rows if isinstance(rows, int) else "S"}
