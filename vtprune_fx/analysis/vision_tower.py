"""The vision tower's last attention before the image features. Reads only.

The search goes back from the image features that are placed into the prompt:
through what treats every token alike (the projector) and what lists or joins complete
images, to the output of one layer of the tower. The attention of that layer, found by
its module's path, is what VisionZip rates by. Tokens that are left out on the way come
before the patches: the class token.

Other towers are not found: features of several layers, patches that are joined or put
in another order. ``NoMatch`` says at which node the search ended.
"""

from __future__ import annotations

import operator
import sys
from dataclasses import dataclass

import sympy
import torch
from torch.fx import Graph, Node

from vtprune_fx.analysis.attention import Logits, attentions
from vtprune_fx.analysis.no_match import NoMatch
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
        # Keep the order of rows where the last dimension stays.
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
        leading: Tokens before the patches, the class token first; N less these are the
            visual tokens of an image.
    """

    path: str
    query: str
    key: str
    scale: float
    leading: int


def read_tower(graph: Graph, features: Node) -> Tower | NoMatch:
    """Find it, or say why the graph does not show it.

    Args:
        graph: The graph.
        features: The image features, all images in a row.
    """
    source, leading = _source(features)
    layer = layer_path(module_path(source))
    if not layer:
        made = f"made by {source.target}" if _is_call(source) else "that are an input"
        return NoMatch(f"image features {made}", source.name, _OUTPUT)
    inside = [
        found
        for found in attentions(graph)
        if layer_path(module_path(found.output)) == layer
    ]
    if len(inside) != 1:
        expected = f"one attention in {layer}, whose output the image features are"
        return NoMatch(str(len(inside)), source.name, expected)
    [found] = inside
    if not _is_of(found, source):
        return NoMatch(
            "a masked, windowed or grouped attention",
            found.output.name,
            "one of all tokens of an image to all, which the image features come from",
        )
    names = found.query.name, found.key.name
    return Tower(module_path(found.output), *names, found.scale, leading)


_OUTPUT = "the output of one layer of a vision tower"


def _source(features: Node) -> tuple[Node, int]:
    """What the features are made of token by token, and how many tokens lead there."""
    node, leading = features, 0
    while (before := _before(node)) is not None:
        node, left_out = before
        leading += left_out
    return node, leading


def _before(node: Node) -> tuple[Node, int] | None:
    """What a node has the tokens of, in their order, and how many it lacks in front."""
    if not _is_call(node):
        return None
    if node.target == aten.cat.default:
        images = _all_images(node)
        return None if images is None else (images, 0)
    first = node.args[0]
    if not isinstance(first, Node):
        return None
    if node.target == aten.slice.Tensor:
        left_out = _left_out(node)
        return None if left_out is None else (first, left_out)
    alike = node.target in _EACH_TOKEN_ALIKE
    alike = alike or (node.target in _SHAPES and _same_rows(first, node))
    return (first, 0) if alike else None


def _is_call(node: Node) -> bool:
    return node.op == "call_function"


def _same_rows(before: Node, after: Node) -> bool:
    """Whether a change of shape keeps rows, or flattens them one after the other."""
    shape = _shape(after)
    return shape[-1:] == _shape(before)[-1:] or len(shape) == 1


def _left_out(part: Node) -> int | None:
    """How many tokens a slice lacks in front; None where it lacks others."""
    given, defaults = list(part.args[1:]), [0, 0, None, 1]
    dim, start, end, step = given + defaults[len(given) :]
    to_the_end = step == 1 and end in (None, sys.maxsize)
    if not to_the_end or not isinstance(start, int) or start < 0:
        return None
    return start if (dim, min(start, 1)) in {(0, 0), (1, 0), (1, 1)} else None


def _all_images(joined: Node) -> Node | None:
    """What was taken apart into just the images that are joined, in their order."""
    parts = joined.args[0]
    assert isinstance(parts, (list, tuple))
    images = [_image(part) for part in parts if isinstance(part, Node)]
    source = images[0][0] if images else None
    if source is None or images != [(source, number) for number in range(len(parts))]:
        return None
    first = joined.args[1:] in ((), (0,))
    return source if first and _shape(source)[0] == len(parts) else None


def _image(part: Node) -> tuple[Node | None, object]:
    """All images' features, and the number of the one that a node is."""
    source, *where = part.args or (None,)
    if not isinstance(source, Node):
        return None, None
    if part.target == aten.select.int and where[0] == 0:
        return source, where[1]
    if part.target == operator.getitem and source.target == aten.unbind.int:
        images, *axis = source.args
        if isinstance(images, Node) and axis in ([], [0]):
            return images, where[0]
    return None, None


def _is_of(found: Logits, source: Node) -> bool:
    """Whether an attention is one of a head's queries each to all tokens of images."""
    query, key, shape = _shape(found.query), _shape(found.key), _shape(source)
    images = len(shape) == 3 and (query[0], query[2]) == shape[:2]
    return images and query == key and found.mask is None


def _shape(node: Node) -> tuple[sympy.Expr, ...]:
    value = tensor_of(node)
    return () if value is None else tuple(map(size_expr, value.shape))
