"""What pruning did to a graph, as data and as text."""

from __future__ import annotations

from dataclasses import dataclass

from vtprune_fx.plan import PrunePlan


@dataclass(frozen=True)
class PassRecord:
    """One pass of a run: its name, whether it changed the graph, seconds it took."""

    name: str
    modified: bool
    seconds: float
    verify_seconds: float


@dataclass(frozen=True)
class PruneReport:
    """What was cut where.

    Attributes:
        plan: The plan that was carried out, or None where the graph has no image.
        passes: The passes that ran, in order.
        nodes_before: Nodes of the graph as it came.
        nodes_after: Nodes of the pruned graph.
    """

    plan: PrunePlan | None
    passes: tuple[PassRecord, ...]
    nodes_before: int
    nodes_after: int

    @property
    def visual_tokens(self) -> list[int]:
        """Visual tokens left after each decoder layer; empty if nothing is pruned."""
        if self.plan is None:
            return []
        plan = self.plan
        return plan.recipe.tokens_per_layer(plan.visual_tokens, plan.layers)

    @property
    def seconds(self) -> float:
        """Time of all passes, verification included."""
        return sum(record.seconds + record.verify_seconds for record in self.passes)

    def __str__(self) -> str:
        if self.plan is None:
            return "not pruned: the graph places no image"
        cuts = len(self.plan.cuts)
        return (
            f"{self.plan.recipe.name}: {self.plan.visual_tokens} visual tokens, "
            f"{self.visual_tokens[-1]} after the last of {self.plan.layers} layers, "
            f"{cuts} cuts, {self.nodes_before} nodes -> {self.nodes_after}, "
            f"{self.seconds:.2f} s"
        )
