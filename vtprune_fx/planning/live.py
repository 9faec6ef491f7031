"""The values that are made before a cut and read after it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeGuard

import sympy
import torch
from torch import Tensor
from torch.fx import Graph, Node

from vtprune_fx.analysis.anatomy import Anatomy
from vtprune_fx.analysis.residual import module_path
from vtprune_fx.errors import PlanError
from vtprune_fx.graph.sizes import axes_of, mentions, size_expr
from vtprune_fx.graph.values import tensor_of
from vtprune_fx.planning.plan import LiveValue
from vtprune_fx.recipes.schema import Cut, Recipe

aten = torch.ops.aten

_NUMBERS = {
    aten.arange.default,
    aten.arange.start,
    aten.arange.start_step,
    aten.linspace.default,
}


_INDICES = {
    aten.index.Tensor: (1,),
    aten.index_put.default: (1,),
    aten.index_put_.default: (1,),
    aten.index_select.default: (2,),
    aten.index_add.default: (2,),
    aten.gather.default: (2,),
}
"""Operators that take indices, and the places of these among the arguments."""

_WRITES = {aten.index_put_.default}

_MOVES = {
    aten.view.default: (0,),
    aten.reshape.default: (0,),
    aten.expand.default: (0,),
    aten.unsqueeze.default: (0,),
    aten.clone.default: (0,),
    aten.index.Tensor: (0,),
    aten.index_put.default: (0, 2),
    aten.index_put_.default: (0, 2),
}
"""Operators that only move numbers, and the places of these."""


class Uses:
    """Where each node stands, and where it is last read by anything but the output.

    Args:
        graph: The graph.
        tokens: Length of the prompt.
    """

    def __init__(self, graph: Graph, tokens: sympy.Symbol) -> None:
        self.tokens = tokens
        self.nodes: list[Node] = list(graph.nodes)
        self.order = {node: i for i, node in enumerate(self.nodes)}
        self.named = {node.name: node for node in self.nodes}
        self.last = {
            node: max(
                (self.order[u] for u in node.users if u.op != "output"), default=-1
            )
            for node in self.nodes
        }

    def check_complete(self, name: str, recipe: Recipe, cut: Cut) -> None:
        """Refuse a cut before later features that a mask places once more.

        There is one for each visual token of the prompt: they would no longer fit.
        """
        edge = self.order[self.named[name]]
        later = [n for n in self.nodes[edge + 1 :] if _takes_features(n)]
        if later:
            raise PlanError(
                f"recipe {recipe.name}, cut at layer {cut.layer}",
                expected="a cut after all layers that visual features enter",
                found=f"features that enter {module_path(later[-1])} after it, node "
                f"{later[-1].name}",
                fix="Cut in later layers, after the model's deep-stacked features.",
            )

    def check_not_numbered(self, name: str, recipe: Recipe, cut: Cut) -> None:
        """Refuse a cut before layers that number the prompt's tokens themselves.

        Kept tokens keep their positions; numbers made of a length would be new ones.
        """
        edge = self.order[self.named[name]]
        later = [n for n in self.nodes[edge + 1 :] if _numbers_tokens(n, self.tokens)]
        if later:
            raise PlanError(
                f"recipe {recipe.name}, cut at layer {cut.layer}",
                expected="layers after it that get positions as an input",
                found=f"{module_path(later[0])} numbers the tokens that it gets, node "
                f"{later[0].name}",
                fix="Cut after that layer, or turn this off in the configuration "
                "(attn_temperature_tuning = False in Llama 4) if answers allow it.",
            )

    def across(self, name: str) -> list[Node]:
        """Nodes that stand at or before ``name`` and are read after it."""
        edge = self.order[self.named[name]]
        return [n for n in self.nodes[: edge + 1] if self.last[n] > edge]


def _takes_features(node: Node) -> bool:
    """Whether rows are put where a mask says."""
    if node.target == aten.masked_scatter.default:
        return True
    if node.target not in {aten.index_put.default, aten.index_put_.default}:
        return False
    indices = node.args[1]
    assert isinstance(indices, (list, tuple))
    masks = (tensor_of(n) for n in indices if isinstance(n, Node))
    return any(m is not None and m.dtype == torch.bool for m in masks)


def _numbers_tokens(node: Node, tokens: sympy.Symbol) -> bool:
    """Whether a node makes 0, 1, ... up to the prompt's length."""
    numbered = node.target in _NUMBERS and mentions(node.meta.get("val"), tokens)
    return numbered and not _only_indexes(node)


def _only_indexes(numbers: Node) -> bool:
    """Whether nothing is computed with numbers: tokens are only put in an order.

    So do layers of experts, which sort tokens by expert and back.
    """
    holders, seen = [numbers], set[Node]()
    while holders:
        holder = holders.pop()
        seen.add(holder)
        for reader in holder.users:
            if reader.op == "output" or _takes(reader, _INDICES, holder):
                continue
            if not _takes(reader, _MOVES, holder):
                return False
            written = [n for n in reader.args[:1] if reader.target in _WRITES]
            moved = [n for n in (reader, *written) if isinstance(n, Node)]
            holders += [n for n in moved if n not in seen]
    return True


def _takes(node: Node, places: Mapping[Any, tuple[int, ...]], value: Node) -> bool:
    """Whether an operator takes a value at one of some places, perhaps in a list."""
    for place in places.get(node.target, ()):
        taken = node.args[place]
        if taken is value or (isinstance(taken, (list, tuple)) and value in taken):
            return True
    return False


def live_values(
    uses: Uses, edge: str, anatomy: Anatomy, lengths: frozenset[str]
) -> tuple[LiveValue, ...]:
    """What has to be gathered at a cut: values across it with a token axis.

    Args:
        uses: Of the graph's nodes.
        edge: Name of the node after which tokens are dropped.
        anatomy: The graph's.
        lengths: Names of the nodes that are the prompt's length.

    Raises:
        PlanError: A value cannot be gathered.
    """
    found: list[LiveValue] = []
    for node in uses.across(edge):
        value = node.meta.get("val")
        if node.name in lengths or not mentions(value, anatomy.tokens):
            continue
        if _is_size_of(value, anatomy.tokens):
            continue  # ``sizes_across`` has it
        found.append(LiveValue(node.name, _token_axes(node, edge, anatomy)))
    return tuple(found)


def sizes_across(
    uses: Uses, edge: str, anatomy: Anatomy, lengths: frozenset[str]
) -> tuple[str, ...]:
    """Sizes that depend on the prompt's length, made before a cut and read after it.

    Layers of experts have such: tokens times experts of a token, ``2*s27``.

    Args:
        uses: Of the graph's nodes.
        edge: Name of the node after which tokens are dropped.
        anatomy: The graph's.
        lengths: Names of the nodes that are the prompt's length.

    Raises:
        PlanError: A size depends on more than the lengths of prompt and batch.
    """
    found = []
    for node in uses.across(edge):
        value = node.meta.get("val")
        if node.name in lengths or not _is_size_of(value, anatomy.tokens):
            continue
        if not size_expr(value).free_symbols <= {anatomy.tokens, anatomy.batch}:
            raise _cannot_cut(node, edge, "a size of batch and prompt alone")
        found.append(node.name)
    return tuple(found)


def _is_size_of(value: object, tokens: sympy.Symbol) -> TypeGuard[torch.SymInt]:
    return isinstance(value, torch.SymInt) and mentions(value, tokens)


def _token_axes(node: Node, edge: str, anatomy: Anatomy) -> tuple[int, ...]:
    value = node.meta["val"]
    axes = axes_of(value, anatomy.tokens) if isinstance(value, Tensor) else ()
    others = [
        s
        for s in getattr(value, "shape", ())
        if mentions(s, anatomy.tokens) and size_expr(s) != anatomy.tokens
    ]
    per_sample = axes and axes[0] > 0 and _is_batch(value.shape[0], anatomy.batch)
    if not per_sample or others:
        raise _cannot_cut(node, edge, "a tensor [batch or 1, ..., prompt, ...]")
    return axes


def _cannot_cut(node: Node, edge: str, expected: str) -> PlanError:
    value = node.meta["val"]
    return PlanError(
        f"node {node.name}, live across the cut at {edge}",
        expected=expected,
        found=str(getattr(value, "shape", value)).replace("torch.Size", ""),
        fix="This graph cannot be cut here; move the cut, or report the model.",
    )


def _is_batch(size: int, batch: sympy.Expr) -> bool:
    return size_expr(size) in (batch, sympy.Integer(1))


def is_length(value: object, tokens: sympy.Symbol) -> bool:
    """Whether a value is the symbolic int of the prompt's length."""
    return isinstance(value, torch.SymInt) and size_expr(value) == tokens
