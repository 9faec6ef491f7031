"""Nodes and their inputs; a graph as text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch.fx import GraphModule, Node, map_arg

from vtprune_fx.graph.trace import Operator


def walk_back(node: Node, through: frozenset[object]) -> Iterator[Node]:
    """``node``, then the first input again and again while the op is in ``through``."""
    yield node
    while node.op == "call_function" and node.target in through:
        first = node.args[0]
        assert isinstance(first, Node)
        node = first
        yield node


def operator_of(node: Node) -> Operator:
    """What a node calls: an operator or a function.

    Args:
        node: A ``call_function``.
    """
    assert callable(node.target), node.format_node()
    return node.target


def readable(module: GraphModule) -> str:
    """The graph as text, with shapes: for logs, docstrings and golden files."""
    return str(module.print_readable(print_output=False))


def replace_inputs(node: Node, current: Mapping[Node, Node]) -> None:
    """Let ``node`` read the current version of each of its inputs."""
    if current.keys().isdisjoint(node.all_input_nodes):
        return
    node.args = map_arg(node.args, lambda n: current.get(n, n))
    node.kwargs = map_arg(node.kwargs, lambda n: current.get(n, n))
