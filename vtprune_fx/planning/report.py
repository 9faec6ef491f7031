"""What pruning did to a graph, as data and as text."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from vtprune_fx.analysis.anatomy import Anatomy
from vtprune_fx.errors import VtpruneError
from vtprune_fx.planning.interface import Interface
from vtprune_fx.planning.plan import PrunePlan


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
        plan: The plan that was carried out.
        passes: The passes that ran, in order.
        nodes_before: Nodes of the graph before pruning.
        nodes_after: Nodes of the pruned graph.
        kept: What a run kept at each cut, [B, K]: positions among the tokens that the
            cuts before it kept. Only in the report of a run.
    """

    plan: PrunePlan
    passes: tuple[PassRecord, ...]
    nodes_before: int
    nodes_after: int
    kept: tuple[Tensor, ...] = field(default=(), compare=False, repr=False)

    def of_run(self, keep_sets: Iterable[Tensor]) -> PruneReport:
        """The report of one run of the graph, with its keep sets."""
        return dataclasses.replace(self, kept=tuple(keep_sets))

    @property
    def keep_sets(self) -> dict[int, Tensor]:
        """Keep sets of the run, as ``in_prompt`` returns them; empty without a run."""
        layers = (cut.attention.layer for cut in self.plan.cuts)
        return in_prompt(dict(zip(layers, self.kept, strict=False)))

    @property
    def visual_tokens(self) -> list[int]:
        """Visual tokens left after each decoder layer.

        Empty where the numbers follow each sample's rank.
        """
        if self.plan.recipe.adaptive:
            return []
        plan = self.plan
        return plan.recipe.tokens_per_layer(plan.visual_tokens, plan.layers)

    @property
    def seconds(self) -> float:
        """Time of all passes, verification included."""
        return sum(record.seconds + record.verify_seconds for record in self.passes)

    def __str__(self) -> str:
        cuts = len(self.plan.cuts)
        left = self.visual_tokens[-1] if self.visual_tokens else "by rank"
        return (
            f"{self.plan.recipe.name}: {self.plan.visual_tokens} visual tokens, "
            f"{left} after the last of {self.plan.layers} layers, "
            f"{cuts} cuts, {self.nodes_before} nodes -> {self.nodes_after}, "
            f"{self.seconds:.2f} s"
        )


def in_prompt(keep_sets: Mapping[int, Tensor]) -> dict[int, Tensor]:
    """Keep sets as positions in the original prompt.

    Args:
        keep_sets: For each layer with a cut, [B, K]: positions among the tokens that
            the cuts before it kept.

    Returns:
        For each layer with a cut, [B, K]: positions in the original prompt, -1 for
        new tokens, which were made of dropped ones.
    """
    found: dict[int, Tensor] = {}
    before: Tensor | None = None
    for layer, keep in sorted(keep_sets.items()):
        places = keep.clamp(min=0)
        came = places if before is None else before.gather(1, places)
        before = came.masked_fill(keep < 0, -1)
        found[layer] = before
    return found


@dataclass(frozen=True)
class Explanation:
    """What was found in a model's graph, and what a recipe makes of it.

    Attributes:
        model: The model's class.
        anatomy: The parts that pruning needs, or None where there is nothing to prune.
        plan: The recipe's cuts placed on them, or None where nothing will be cut.
        refused: Why not, where there is something to prune.
        interface: What goes into the pruned graph and comes out, where there is a plan.
    """

    model: str
    anatomy: Anatomy | None
    plan: PrunePlan | None
    refused: VtpruneError | None
    interface: Interface | None = None

    def __str__(self) -> str:
        return "\n".join((*self._heading(), *self._layers(), *self._not_found()))

    def _heading(self) -> list[str]:
        if self.refused is not None:
            return [f"{self.model}: refused. {self.refused}"]
        if self.anatomy is None:
            return [f"{self.model}: not pruned, the graph places no image"]
        assert self.plan is not None
        name, visual = self.plan.recipe.name, " and ".join(self.anatomy.visual)
        count = self.anatomy.visual_tokens
        return [f"{self.model}: {name}, {count} visual tokens, marked by {visual}"]

    def _layers(self) -> list[str]:
        if self.anatomy is None:
            return []
        return [
            f"layer {layer.layer:3}  {layer.path}: {self._fate_of(layer.layer)}"
            for layer in self.anatomy.layers
        ]

    def _not_found(self) -> list[str]:
        failed = self.anatomy.not_found if self.anatomy is not None else {}
        return [f"not found  {name}: {reason}" for name, reason in failed.items()]

    def _fate_of(self, layer: int) -> str:
        cuts = {cut.attention.layer: cut for cut in self.plan.cuts} if self.plan else {}
        if layer not in cuts:
            return "no cut"
        assert self.anatomy is not None
        cut = cuts[layer]
        gathered = ", ".join(value.node for value in cut.live)
        if cut.rule is not None:
            return f"{cut.rule}; gathers {gathered}"
        left = self.anatomy.visual_tokens - cut.dropped
        new = f", {cut.new} of them new" if cut.new else ""
        return f"{cut.drop} dropped, {left} kept{new}; gathers {gathered}"
