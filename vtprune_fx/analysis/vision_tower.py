"""The vision tower's attention behind which image features leave it. Reads only.

From the image features that are placed into the prompt back to where they come from:
through what treats every token alike (the projector) and what lists or joins whole
images, to the output of one layer of the tower. The attention of that layer, found by
its module's path, is what VisionZip rates by. Tokens that are left out on the way stand
ahead of the patches: the class token.

What goes another way is not found: features of several layers, patches that are joined
or put in another order.
"""

from __future__ import annotations

import operator
import sys
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch.fx import Graph, Node

from vtprune_fx.analysis.attention import Logits, attentions
from vtprune_fx.analysis.residual import layer_path, module_path
from vtprune_fx.graph.sizes import size_expr
from vtprune_fx.graph.values import tensor_of

aten = torch.ops.aten

_EACH_TOKEN_ALIKE: frozenset[object] = frozenset(
    {
        # Read the tokens as their first argument, and work on the last dimension.
        aten.linear.default,
        aten.layer_norm.default,
        aten.gelu.default,
        aten.silu.default,
        aten.relu.default,
        aten.dropout.default,
        aten.clone.default,
        aten.contiguous.default,
        aten.to.device,
        aten.to.dtype,
        aten.to.dtype_layout,
    }
)

_SHAPES: frozenset[object] = frozenset(
    {
        # Leave the order of rows as it is where the last dimension stays.
        aten.flatten.using_ints,
        aten.reshape.default,
        aten.view.default,
        aten.unsqueeze.default,
    }
)


@dataclass(frozen=True)
class Tower:
    """The attention of the layer whose output is the image features. Nodes by name.

    Attributes:
        path: Path of the module that the attention came from.
        query: [I, H, N, D], I images of N tokens.
        key: As ``query``.
        scale: What logits are multiplied by.
        leading: Tokens ahead of the patches, the class token first; N less these are
            the visual tokens of an image.
    """

    path: str
    query: str
    key: str
    scale: float
    leading: int


def read_tower(graph: Graph, features: Node) -> Tower | None:
    """Find it, or None where the graph does not show it.

    Args:
        graph: The graph.
        features: The image features, all images in a row.
    """
    source, leading = _source(features)
    layer = layer_path(module_path(source))
    if not layer:
        return None
    inside = [
        found
        for found in attentions(graph)
        if layer_path(module_path(found.output)) == layer
    ]
    if len(inside) != 1 or not _is_of(inside[0], source):
        return None
    [found] = inside
    names = found.query.name, found.key.name
    return Tower(module_path(found.output), *names, found.scale, leading)


def _source(features: Node) -> tuple[Node, int]:
    """What the features are made of token by token, and how many tokens lead there."""
    node, leading = features, 0
    while (before := _before(node)) is not None:
        node, left_out = before
        leading += left_out
    return node, leading


def _before(node: Node) -> tuple[Node, int] | None:
    """What a node has the tokens of, in their order, and how many it leaves out."""
    if node.op != "call_function":
        return None
    if node.target == aten.cat.default:
        whole = _whole(node)
        return None if whole is None else (whole, 0)
    first = node.args[0]
    if not isinstance(first, Node):
        return None
    if node.target == aten.slice.Tensor:
        left_out = _left_out(node)
        return None if left_out is None else (first, left_out)
    alike = node.target in _EACH_TOKEN_ALIKE
    alike = alike or (node.target in _SHAPES and _same_rows(first, node))
    return (first, 0) if alike else None


def _same_rows(before: Node, after: Node) -> bool:
    """Whether a change of shape leaves rows whole, or one behind the other in all."""
    shape = _shape(after)
    return shape[-1:] == _shape(before)[-1:] or len(shape) == 1


def _left_out(part: Node) -> int | None:
    """How many tokens a slice leaves out in front; None where it leaves out others."""
    given, defaults = list[Any](part.args[1:]), list[Any]((0, 0, None, 1))
    dim, start, end, step = given + defaults[len(given) :]
    whole = step == 1 and end in (None, sys.maxsize) and isinstance(start, int)
    if not whole or start < 0 or (dim, min(start, 1)) not in {(0, 0), (1, 0), (1, 1)}:
        return None
    return int(start)


def _whole(joined: Node) -> Node | None:
    """What was taken apart into just the images that are joined, in their order."""
    parts: Any = joined.args[0]
    images = [_image(part) for part in parts]
    whole = images[0][0]
    if whole is None or images != [(whole, number) for number in range(len(parts))]:
        return None
    first = joined.args[1:] in ((), (0,))
    return whole if first and _shape(whole)[0] == len(parts) else None


def _image(part: Node) -> tuple[Node | None, object]:
    """All images' features, and the number of the one that a node is."""
    args: tuple[Any, ...] = part.args
    if part.target == aten.select.int and args[1] == 0:
        return args[0], args[2]
    if part.target == operator.getitem and args[0].target == aten.unbind.int:
        taken: tuple[Any, ...] = args[0].args
        return (taken[0] if taken[1:] in ((), (0,)) else None), args[1]
    return None, None


def _is_of(found: Logits, source: Node) -> bool:
    """Whether an attention is one of a head's queries each to all tokens of images."""
    query, key, shape = _shape(found.query), _shape(found.key), _shape(source)
    images = len(shape) == 3 and (query[0], query[2]) == shape[:2]
    return images and query == key and found.mask is None


def _shape(node: Node) -> tuple[sympy.Expr, ...]:
    value = tensor_of(node)
    return () if value is None else tuple(map(size_expr, value.shape))
