"""Stamps of inserted nodes: what wrote a node, for which cut, and what it is.

Passes find what other passes inserted by its stamp. Names of nodes are for readers and
for exported graphs, whose outputs are known by them.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from torch.fx import Graph, Node

STAMP = "vtprune"
"""Key of ``node.meta`` under which inserted nodes carry their ``Stamp``."""

ALL_CUTS = -1
"""Layer in the stamp of a node that serves all cuts."""


class StampKind(Enum):
    """What an inserted node is for.

    ``ROLES``, ``CLASS_ATTENTION``, ``KEEP``, ``KEYS``, ``STAND_IN`` and ``NEW`` are
    results that ``cut_nodes`` finds. All others are steps on the way.
    """

    CHECK = "check"
    SCORE = "score"
    ROLES = "roles"
    CLASS_ATTENTION = "class_attention"
    CHOICE = "choice"
    KEEP = "keep"
    KEYS = "keys"
    STAND_IN = "stand_in"
    NEW = "new"
    GATHER = "gather"
    IN_PROMPT = "in_prompt"
    SHIFT = "shift"
    ROWS = "rows"


@dataclass(frozen=True)
class Stamp:
    """What an inserted node is for, and where.

    Attributes:
        kind: What it is for.
        layer: Decoder layer of the cut, ``ALL_CUTS`` where the node serves all cuts.
    """

    kind: StampKind
    layer: int = ALL_CUTS


@dataclass(frozen=True)
class CutNodes:
    """The nodes of one cut that other passes read.

    Attributes:
        keep: The keep set, [B, K]: positions of the kept tokens, ascending. Negative
            numbers are new tokens, or tokens that became padding.
        roles: Roles of the prompt's tokens, [B, S]. The same node for all cuts.
        class_attention: What the vision tower's class token attends to, [B, S], if the
            scorer reads it. The same node for all cuts.
        keys: Where a keep set has negative numbers: the sorted keys, [B, K], that it is
            computed from.
        stand_in: Where a keep set has negative numbers: positions, [B, K]. A new token
            has those of another token, a token that became padding has its position.
        new: The new tokens, [B, C, E], that the cut makes of dropped ones.
    """

    keep: Node
    roles: Node
    class_attention: Node | None = None
    keys: Node | None = None
    stand_in: Node | None = None
    new: Node | None = None

    @property
    def positions(self) -> Node:
        """[B, K]: what live values are gathered by, the last node of the choice."""
        return self.keep if self.stand_in is None else self.stand_in


def stamp_result(node: Node, kind: StampKind, layer: int = ALL_CUTS) -> Node:
    """Stamp a node as a result, and name it after its stamp: ``vtprune_keep_3``."""
    node.meta[STAMP] = Stamp(kind, layer)
    node._rename(f"vtprune_{kind.value}{'' if layer == ALL_CUTS else f'_{layer}'}")
    return node


def stamped(graph: Graph, kind: StampKind) -> dict[int, Node]:
    """By layer, the last node of a kind: a pass may have put another in its place."""
    stamps = ((node, node.meta.get(STAMP)) for node in graph.nodes)
    return {s.layer: node for node, s in stamps if s is not None and s.kind is kind}


def cut_nodes(graph: Graph) -> dict[int, CutNodes]:
    """The nodes of each cut that passes wrote into a graph, by the cut's layer.

    Empty where ``InsertScores`` did not run, or wrote nothing.
    """
    keys = stamped(graph, StampKind.KEYS)
    stand_ins = stamped(graph, StampKind.STAND_IN)
    new = stamped(graph, StampKind.NEW)
    roles = stamped(graph, StampKind.ROLES)
    class_attention = stamped(graph, StampKind.CLASS_ATTENTION).get(ALL_CUTS)
    return {
        layer: CutNodes(
            keep=keep,
            roles=roles[ALL_CUTS],
            class_attention=class_attention,
            keys=keys.get(layer),
            stand_in=stand_ins.get(layer),
            new=new.get(layer),
        )
        for layer, keep in stamped(graph, StampKind.KEEP).items()
    }
