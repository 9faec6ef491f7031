"""Sizes of traced values: expressions, hints, and the axes of a size."""

from __future__ import annotations

from typing import TypeAlias

import sympy
import torch
from torch import Tensor
from torch.fx import Graph

Count: TypeAlias = int | sympy.Expr
"""A number of tokens: known when the graph is made, or a symbol where it is read from
the data."""


def size_expr(size: int | torch.SymInt) -> sympy.Expr:
    """A size as a sympy expression, aliases resolved by the shape environment."""
    if isinstance(size, int):
        return sympy.Integer(size)
    return size.node.expr


def size_hint(size: int | torch.SymInt) -> int:
    """The value of a size for the example that the graph was traced with."""
    if isinstance(size, int):
        return size
    hint = size.node.hint
    assert isinstance(hint, int), f"{size} has no hint"
    return hint


def axes_of(value: Tensor, symbol: sympy.Symbol) -> tuple[int, ...]:
    """The dimensions of ``value`` whose size is exactly ``symbol``."""
    return tuple(i for i, s in enumerate(value.shape) if size_expr(s) == symbol)


def mentions(value: object, symbol: sympy.Symbol) -> bool:
    """Whether a size in ``value`` (tensor, symbolic int, tuple) holds ``symbol``."""
    if isinstance(value, Tensor):
        return mentions(tuple(value.shape), symbol)
    if isinstance(value, (tuple, list)):
        return any(mentions(item, symbol) for item in value)
    return isinstance(value, torch.SymInt) and symbol in value.node.expr.free_symbols


def assume_at_least(graph: Graph, symbol: sympy.Symbol, least: int) -> None:
    """Let the shape environment know a lower bound of a size that an input has."""
    for node in graph.find_nodes(op="placeholder"):
        value = node.meta.get("val")
        sizes = value.shape if isinstance(value, Tensor) else (value,)
        for size in sizes:
            if isinstance(size, torch.SymInt) and size_expr(size) == symbol:
                torch._check(size >= least)
                return
