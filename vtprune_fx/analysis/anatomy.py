"""Finding the parts of a traced vision-language model that pruning needs. Reads only.

Nothing is found by a model's name or by counting nodes:

* The *visual tokens* are where image features are placed into the embeddings with
  ``masked_scatter``; its mask says which positions are visual. Images and videos are
  placed one after the other, each with a separate mask.
* The *token axis* is the symbol of that mask's second dimension: a dimension of any
  other value whose size is the same symbol runs over the same tokens.
* The *decoder layers* are the attention nodes whose queries carry the token axis; their
  numbers come from the module path (``...language_model.layers.7.self_attn``).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import sympy
import torch
from torch import Tensor
from torch.fx import Graph, Node

from vtprune_fx.analysis.attention import Logits, attentions, failed_matches
from vtprune_fx.analysis.no_match import NoMatch
from vtprune_fx.analysis.residual import Stream, module_path, read_streams
from vtprune_fx.analysis.vision_tower import Tower, read_tower
from vtprune_fx.errors import AnatomyError
from vtprune_fx.graph.nodes import walk_back
from vtprune_fx.graph.sizes import size_expr, size_hint
from vtprune_fx.graph.values import tensor_of

aten = torch.ops.aten

_VIEWS_OF_A_MASK: frozenset[object] = frozenset(
    {
        # Each repeats, reshapes or retypes a boolean mask without changing which
        # positions it marks, and reads it as its first argument.
        aten.unsqueeze.default,
        aten.expand.default,
        aten.expand_as.default,
        aten.reshape.default,
        aten.view.default,
        aten.clone.default,
        aten.alias.default,
        aten.contiguous.default,
        aten.to.device,
        aten.to.dtype,
        aten.to.dtype_layout,
    }
)

_PLACES_OF_FEATURES: frozenset[object] = frozenset(
    {
        # The steps from a flat mask to the number of marked positions before each, by
        # which exporters spell masked_scatter for runtimes that lack it.
        aten.to.dtype,
        aten.cumsum.default,
        aten.sub.Tensor,
        aten.clamp.default,
    }
)


_VIEWS_OF_A_KEY: frozenset[object] = frozenset(
    {
        # How grouped keys are repeated for all heads.
        aten.unsqueeze.default,
        aten.expand.default,
        aten.reshape.default,
        aten.slice.Tensor,
    }
)


@dataclass(frozen=True)
class Attention:
    """The attention of one decoder layer. Nodes are given by name.

    Attributes:
        layer: Index of the layer.
        path: Path of the module that the node came from.
        node: The attention's output, [B, H, S, D].
        query: [B, H, S, D], rotated.
        key: [B, G, S, D], rotated.
        mask: [B or 1, 1, S, S], or None where the attention is plainly causal.
        scale: What logits are multiplied by.
        stream: The layer's input and output, and its rotary tables.
    """

    layer: int
    path: str
    node: str
    query: str
    key: str
    mask: str | None
    scale: float
    stream: Stream


@dataclass(frozen=True)
class Anatomy:
    """What a pruning plan needs to know of a graph.

    Attributes:
        tokens: The symbol that is the prompt's length.
        batch: The number of samples.
        visual: Names of the masks that together mark the visual tokens, [B, S] or
            [B, S, 1]: one for each kind of visual input.
        visual_tokens: Visual tokens of a sample that has any, in the example the graph
            was traced with; those of all samples where they cannot be alike.
        layers: The decoder layers' attentions, in order.
        tower: The vision tower's last attention before the image features, or None
            where the graph does not show it.
        no_tower: Why ``tower`` is None.
    """

    tokens: sympy.Symbol
    batch: sympy.Expr
    visual: tuple[str, ...]
    visual_tokens: int
    layers: tuple[Attention, ...]
    tower: Tower | None = None
    no_tower: NoMatch | None = None

    @property
    def not_found(self) -> dict[str, NoMatch]:
        """What recipes may need and the graph does not show, and why, by its name."""
        failed = [("vision tower", self.no_tower)]
        for layer in self.layers:
            stream, at = layer.stream, f"of layer {layer.layer}"
            failed += [
                (f"input {at}", stream.no_entry),
                (f"output {at}", stream.no_output),
                (f"rotary tables {at}", stream.no_rotary),
            ]
        return {name: reason for name, reason in failed if reason is not None}


def read(graph: Graph, visual_tokens: int | None = None) -> Anatomy | None:
    """Find the parts, or None where there is nothing to prune.

    That is a graph that places no image (a text-only prompt, a decode step), and a
    prompt on a filled cache: what the model has seen before is not touched.

    Args:
        graph: The graph.
        visual_tokens: Of a sample that has any, if the graph's sizes need not say it.

    Raises:
        AnatomyError: An image is placed, but something that pruning needs is missing or
            ambiguous.
    """
    placements = list(_placements(graph))
    if not placements:
        return None
    masks = [_token_mask(found.mask) for found in placements]
    visual = masks[0]
    batch, tokens = (size_expr(size) for size in _shape(visual)[:2])
    _check_symbols(visual, batch, tokens)
    if any(not _has_axis(found.key, tokens) for found in _attentions(graph, tokens)):
        # There are keys of earlier tokens before the prompt's.
        return None
    for found in _attentions(graph, tokens):
        _check_sees_all(found)
    tower = _tower(graph, placements)
    if visual_tokens is None:
        visual_tokens = _visual_tokens(placements, size_hint(_shape(visual)[0]))
    return Anatomy(
        tokens=tokens,
        batch=batch,
        visual=tuple(mask.name for mask in masks),
        visual_tokens=visual_tokens,
        layers=tuple(_decoder(graph, tokens)),
        tower=None if isinstance(tower, NoMatch) else tower,
        no_tower=tower if isinstance(tower, NoMatch) else None,
    )


@dataclass(frozen=True)
class _Placement:
    """Features placed into embeddings where a mask says."""

    mask: Node
    features: Node
    embeddings: Node

    @property
    def rows(self) -> int:
        """Visual tokens in the example batch: [rows, width], perhaps flattened."""
        [*_, source] = walk_back(self.embeddings, _VIEWS_OF_A_MASK)
        # Not Size.numel: it would make constants of symbolic sizes.
        elements = math.prod(map(size_hint, _shape(self.features)))
        return elements // size_hint(_shape(source)[-1])


def _tower(graph: Graph, placements: list[_Placement]) -> Tower | NoMatch:
    """Where all visual tokens come from, if they are of one kind."""
    if len(placements) > 1:
        second = placements[1].mask.name
        return NoMatch("images and videos", second, "one kind of visual tokens")
    return read_tower(graph, placements[0].features)


def _placements(graph: Graph) -> Iterator[_Placement]:
    """Every masked_scatter, in either spelling."""
    for node in graph.nodes:
        if node.target == aten.masked_scatter.default:
            embeddings, mask, features = node.args
            yield _Placement(mask, features, embeddings)
        elif node.target == aten.where.self and (found := _spelled_out(node)):
            yield found


def _spelled_out(where: Node) -> _Placement | None:
    """Match ``where(mask, features[cumsum(mask) - 1], embeddings)``, all flat."""
    mask, picked, embeddings = where.args
    if not isinstance(mask, Node) or not isinstance(picked, Node):
        return None
    if picked.target != aten.index.Tensor:
        return None
    features, indices = picked.args
    assert isinstance(features, Node)
    assert isinstance(indices, (list, tuple))
    if len(indices) != 1 or not isinstance(indices[0], Node):
        return None
    counted = mask in walk_back(indices[0], _PLACES_OF_FEATURES)
    if not counted or not isinstance(embeddings, Node):
        return None
    return _Placement(mask, features, embeddings)


def _token_mask(mask: Node) -> Node:
    """The mask of tokens, found from the one that covers the embeddings' width too.

    An input [B, S, 1] where Dynamo broke the graph before the placement.
    """
    for node in walk_back(mask, _VIEWS_OF_A_MASK):
        value = tensor_of(node)
        if value is not None and value.dtype == torch.bool and _is_per_token(value):
            return node
    raise AnatomyError(
        f"mask of the image placeholders, node {mask.name}",
        expected="a view of a boolean mask [batch, prompt] or [batch, prompt, 1]",
        found="none",
        fix="If the graph was broken into parts, compile with fullgraph=True.",
    )


def _is_per_token(mask: Tensor) -> bool:
    return mask.dim() == 2 or (mask.dim() == 3 and size_expr(mask.shape[2]) == 1)


def _check_symbols(visual: Node, batch: sympy.Expr, tokens: sympy.Expr) -> None:
    if not isinstance(tokens, sympy.Symbol):
        raise AnatomyError(
            f"prompt length, node {visual.name}",
            expected="a dynamic dimension",
            found=f"the constant {tokens}",
            fix="Mark it before the first call, for each input that has it: "
            "torch._dynamo.mark_dynamic(inputs['input_ids'], 1).",
        )
    if batch == tokens:
        raise AnatomyError(
            f"prompt length, node {visual.name}",
            expected="one symbol for the batch, another for the prompt length",
            found=f"{tokens} for both",
            fix="Mark the prompt length dynamic, and not the batch.",
        )


def _visual_tokens(placements: list[_Placement], samples: int) -> int:
    """Visual tokens of a sample that has any."""
    rows = sum(found.rows for found in placements)
    each, rest = divmod(rows, samples)
    if rest:
        return rows
    if len(placements) > 1:
        return each
    # Less than an image has: a sample is text alone, the others have complete images.
    return max(each, _smallest_image(placements[0].features))


def _smallest_image(features: Node) -> int:
    """Visual tokens of the smallest image, 0 where the graph does not show images.

    transformers takes the images' features apart, one ``select`` each, and joins them.
    """
    *_, source = walk_back(features, _VIEWS_OF_A_MASK)
    parts = source.args[0] if source.target == aten.cat.default else ()
    assert isinstance(parts, (list, tuple))
    images = [n for n in parts if isinstance(n, Node) and n.target == aten.select.int]
    if len(images) < len(parts):
        return 0
    return min((size_hint(_shape(image)[0]) for image in images), default=0)


def _shape(node: Node) -> torch.Size:
    value = tensor_of(node)
    assert value is not None, f"{node.name} is not a tensor"
    return value.shape


def _decoder(graph: Graph, tokens: sympy.Symbol) -> list[Attention]:
    found = list(_attentions(graph, tokens))
    if not found:
        raise AnatomyError(
            "decoder",
            expected="attention over the prompt's tokens, fused or written out",
            found=_why_none(graph, tokens),
            fix="Load the model with attn_implementation='sdpa' or 'eager'.",
        )
    paths = [_layer_path(each.output, layer) for layer, each in enumerate(found)]
    queries = [(p, f.query, f.key) for p, f in zip(paths, found, strict=True)]
    streams = read_streams(graph, queries, tokens)
    return [
        Attention(
            layer=layer,
            path=paths[layer],
            node=each.output.name,
            query=each.query.name,
            key=each.key.name,
            mask=each.mask.name if each.mask is not None else None,
            scale=each.scale,
            stream=streams[layer],
        )
        for layer, each in enumerate(found)
    ]


def _why_none(graph: Graph, tokens: sympy.Symbol) -> str:
    """Where each reason first applied to a product over the prompt's tokens."""
    failed: dict[str, NoMatch] = {}
    for node, found in failed_matches(graph):
        if _has_axis(node, tokens):
            failed.setdefault(found.reason, found)
    return "; ".join(map(str, failed.values())) or "none"


def _attentions(graph: Graph, tokens: sympy.Symbol) -> Iterator[Logits]:
    """The attentions whose queries carry the token axis."""
    return (found for found in attentions(graph) if _has_axis(found.query, tokens))


def _check_sees_all(found: Logits) -> None:
    """Refuse layers that cache only the last keys.

    That is a sliding window: it counts tokens, and a cut changes the count.
    """
    for node in walk_back(found.key, _VIEWS_OF_A_KEY):
        for user in node.users:
            if user.target == aten.slice.Tensor and _from_the_end(user):
                raise AnatomyError(
                    f"keys of attention {found.output.name}, node {user.name}",
                    expected="attention to all that came before",
                    found="a sliding window: only the last keys are cached",
                    fix="Where no prompt is longer than the window, load the model "
                    "with text_config.sliding_window = None.",
                )


def _from_the_end(part: Node) -> bool:
    start = part.args[2] if len(part.args) > 2 else None
    return isinstance(start, int) and start < 0


def _has_axis(node: Node, tokens: sympy.Symbol) -> bool:
    return tokens in map(size_expr, _shape(node))


def _layer_path(node: Node, layer: int) -> str:
    """Path of the module that an attention node came from, its number checked."""
    path = module_path(node)
    numbers = [int(part) for part in path.split(".") if part.isdigit()]
    if not numbers or numbers[-1] != layer:
        raise AnatomyError(
            f"attention node {node.name}, from module {path or 'unknown'}",
            expected=f"decoder layer {layer}",
            found=f"layer {numbers[-1]}" if numbers else "no layer number in the path",
            fix="The decoder's layers must run in order, one attention each.",
        )
    return path
