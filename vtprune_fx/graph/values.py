"""What a node's value is, also after a cut.

A value after a cut is kept as a ``Shorter``: the fake tensor that it was at full
length, and how many tokens have been dropped since. That is exact and free, while a
fake tensor with a new symbolic length costs milliseconds, thousands of times over in
one graph. ``passes.RefreshValues`` turns them into plain ``val`` where that is needed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.fx import Node

from vtprune_fx.graph.sizes import Count

READ = "vtprune_read"
"""Key of ``node.meta`` of a count that is read from the data: its symbol and None, or
the dropped tokens and the node [B, S] of those that were there, if it counts the
others."""

SHORTER = "vtprune_shorter"
"""Key of ``node.meta`` that stands in for ``val`` after a cut."""


@dataclass(frozen=True)
class Shorter:
    """A value with fewer tokens than the prompt.

    Attributes:
        full: What it would be at full length: a fake tensor, a symbolic int, a tuple.
        dropped: Tokens that have left, or None where its token axes differ in that, or
            sizes are counts that are read from the data.
    """

    full: Any
    dropped: Count | None


def value_at_full_length(node: Node) -> Any:
    """The node's value as if no token had left."""
    shorter = node.meta.get(SHORTER)
    return shorter.full if shorter else node.meta.get("val")


def dropped_tokens(node: Node) -> Count | None:
    """How many tokens the node's value lacks."""
    shorter = node.meta.get(SHORTER)
    return shorter.dropped if shorter else 0


def set_value(node: Node, full: Any, dropped: Count | None) -> None:
    """Record a value: as ``val`` while no token has left."""
    node.meta.pop("val", None)
    node.meta.pop(SHORTER, None)
    if dropped == 0:
        node.meta["val"] = full
    else:
        node.meta[SHORTER] = Shorter(full, dropped)


def tensor_of(node: Node) -> Tensor | None:
    """The node's fake tensor, or None where its value is something else."""
    value = node.meta.get("val")
    return value if isinstance(value, Tensor) else None
