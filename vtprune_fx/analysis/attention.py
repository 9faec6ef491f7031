"""The forms in which a graph shows attention. Reads only.

* Fused: ``scaled_dot_product_attention(query, key, value, mask, scale=...)``.
* Written out, as eager attention is: ``softmax(query @ key^T * scale + mask) @ value``.

Other forms are one operator (flash and flex attention), whose mask is no tensor that
could be cut: they are not found.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch.fx import Graph, Node

from vtprune_fx.analysis.no_match import NoMatch
from vtprune_fx.graph.nodes import walk_back
from vtprune_fx.graph.sizes import size_hint
from vtprune_fx.graph.values import tensor_of

aten = torch.ops.aten

_AFTER_SOFTMAX: frozenset[object] = frozenset(
    {
        # What does not change probabilities, outside of training.
        aten.dropout.default,
        aten.to.dtype,
    }
)


@dataclass(frozen=True)
class Logits:
    """What an attention's logits are made of.

    Attributes:
        output: The attention's output, [B, H, S, D].
        query: [B, H, S, D], rotated.
        key: [B, G, N, D], rotated.
        mask: [B or 1, 1, S, N], or None.
        scale: What logits are multiplied by.
    """

    output: Node
    query: Node
    key: Node
    mask: Node | None
    scale: float


def attentions(graph: Graph) -> Iterator[Logits]:
    """Every attention of a graph, in order."""
    return (found for _, found in _matched(graph) if isinstance(found, Logits))


def failed_matches(graph: Graph) -> Iterator[tuple[Node, NoMatch]]:
    """Every product of matrices that is no attention, and why not."""
    for node, found in _matched(graph):
        if isinstance(found, NoMatch):
            yield node, found


def _matched(graph: Graph) -> Iterator[tuple[Node, Logits | NoMatch]]:
    for node in graph.nodes:
        if match := _FORMS.get(node.target):
            yield node, match(node)


def _fused(node: Node) -> Logits:
    query, key = map(_node, node.args[:2])
    mask = node.args[3] if len(node.args) > 3 else node.kwargs.get("attn_mask")
    value = tensor_of(query)
    assert value is not None
    scale = node.kwargs.get("scale") or size_hint(value.shape[-1]) ** -0.5
    assert isinstance(scale, float)
    return Logits(node, query, key, None if mask is None else _node(mask), scale)


def _written_out(node: Node) -> Logits | NoMatch:
    *_, softmax = walk_back(_node(node.args[0]), _AFTER_SOFTMAX)
    if softmax.target != aten.softmax.int:
        return NoMatch("a product of other values", node.name, "probabilities @ value")
    logits, mask, scale = _node(softmax.args[0]), None, 1.0
    if logits.target == aten.add.Tensor:
        logits, mask = map(_node, logits.args)
    factor = logits.args[-1]
    if logits.target == aten.mul.Tensor and isinstance(factor, float):
        logits, scale = _node(logits.args[0]), factor
    if logits.target != aten.matmul.default:
        return NoMatch("a softmax of other values", logits.name, "query @ key^T")
    query, turned = map(_node, logits.args)
    if turned.target != aten.transpose.int:
        return NoMatch("a query times other values", turned.name, "a transposed key")
    return Logits(node, query, _node(turned.args[0]), mask, scale)


_FORMS: dict[object, Callable[[Node], Logits | NoMatch]] = {
    aten.scaled_dot_product_attention.default: _fused,
    aten.matmul.default: _written_out,
}


def _node(argument: object) -> Node:
    assert isinstance(argument, Node)
    return argument
