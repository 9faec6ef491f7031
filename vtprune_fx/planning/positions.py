"""The values of a graph that depend on a token's place alone."""

from __future__ import annotations

from torch.fx import Graph, Node

from vtprune_fx.analysis.anatomy import Anatomy
from vtprune_fx.analysis.residual import seen_through
from vtprune_fx.errors import PlanError
from vtprune_fx.graph.sizes import size_expr
from vtprune_fx.graph.values import tensor_of
from vtprune_fx.recipes.schema import Recipe


def values_of_place(recipe: Recipe, graph: Graph, anatomy: Anatomy) -> frozenset[str]:
    """Values that depend on a token's place alone: rotary tables and what makes them.

    Raises:
        PlanError: A layer does not show what it rotates by.
    """
    named = {node.name: node for node in graph.nodes}
    found: set[Node] = set()
    for layer in anatomy.layers:
        if layer.stream.cos is None or layer.stream.sin is None:
            raise PlanError(
                f"recipe {recipe.name}, field positions",
                expected="queries rotated by q * cos + rotate_half(q) * sin",
                found=f"in layer {layer.layer}: {layer.stream.no_rotary}",
                fix="Use a recipe with 'positions': 'kept'.",
            )
        found |= {named[layer.stream.cos], named[layer.stream.sin]}
    tables = frozenset(found)
    _check_one_axis(recipe, tables, anatomy)
    for node in reversed(graph.nodes):
        # What nothing but the tables is made of.
        if node.users and all(user in found for user in node.users):
            found.add(node)
    views = (n for n in graph.nodes if any(v in tables for v in seen_through(n)))
    return frozenset(node.name for node in (*found, *views))


def _check_one_axis(recipe: Recipe, tables: frozenset[Node], anatomy: Anatomy) -> None:
    """Refuse to renumber tokens whose positions count along several axes."""
    sources = {node for table in tables for node in seen_through(table)}
    for _ in range(_STEPS_TO_POSITIONS):
        sources |= {source for node in sources for source in node.all_input_nodes}
    if any(_has_axes(node, anatomy) for node in sources):
        raise PlanError(
            f"recipe {recipe.name}, field positions",
            expected="positions along one axis, to compact them",
            found="rotary positions along several: time, height and width",
            fix="Use a recipe with 'positions': 'kept', such as SparseVLM+'s.",
        )


_STEPS_TO_POSITIONS = 12
"""Operators between rotary tables and positions: cast, scale, cosine, recomposition."""


def _has_axes(node: Node, anatomy: Anatomy) -> bool:
    """[axes, B, S, ...]."""
    value = tensor_of(node)
    if value is None or value.dim() < 3:
        return False
    _, batch, tokens, *_ = map(size_expr, value.shape)
    return bool(batch == anatomy.batch and tokens == anatomy.tokens)
