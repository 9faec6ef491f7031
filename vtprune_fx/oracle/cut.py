"""The oracle's cut: who is rated how, who stays, and what dropped tokens become.

Letters in shapes are those of ``pruner``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vtprune_fx.errors import PlanError
from vtprune_fx.oracle import tower
from vtprune_fx.oracle.decoder import Heads
from vtprune_fx.oracle.recycling import merge
from vtprune_fx.oracle.scores import Seen, attention_rank, rate

if TYPE_CHECKING:
    from vtprune_fx.recipes.schema import Cut, Recipe, Recycle


@dataclass(frozen=True, eq=False)
class Row:
    """The tokens of one sample that are present.

    Attributes:
        hidden: The residual stream. [m, h]
        present: Which tokens of the sample they are. [m]
        visual: Which of them are visual. [m] bool
        instruction: Which of them are the text that rates those. [m] bool
        positions: Their rotary positions. [m]
        patches: What the tower made of them, zeros for text. [m, 1 + w], or [m, 0]
            where the recipe does not look at it.
        mask: Which of them each may attend to, None for those ahead. [m, m] bool
    """

    hidden: Tensor
    present: Tensor
    visual: Tensor
    instruction: Tensor
    positions: Tensor
    patches: Tensor
    mask: Tensor | None

    def heads(self) -> Heads:
        """An attention to be filled in."""
        count = len(self.hidden)
        causal = torch.ones(count, count, dtype=torch.bool, device=self.hidden.device)
        return Heads(causal.tril() if self.mask is None else self.mask)

    def only(self, stay: Tensor) -> Row:
        """Some of the tokens: [m] bool."""
        return Row(
            self.hidden[stay],
            self.present[stay],
            self.visual[stay],
            self.instruction[stay],
            self.positions[..., stay],
            self.patches[stay],
            None if self.mask is None else self.mask[stay][:, stay],
        )


@dataclass(frozen=True, eq=False)
class Rated:
    """What a cut went by.

    Attributes:
        scores: Of the visual tokens. [v present]
        rank: Of the attention, where the count follows it.
    """

    scores: Tensor
    rank: int | None


def cut_row(
    recipe: Recipe, cut: Cut, row: Row, seen: Seen, staying: Tensor | None
) -> tuple[Row, Tensor, Rated]:
    """Let the lowest rated visual tokens leave.

    Returns:
        Who is left, which of the tokens those are [m] bool, and what that went by.
    """
    scores, rank = rate(recipe, seen), None
    if cut.by_rank is not None:
        rank = attention_rank(seen)
        drop = cut.by_rank.drop(rank, seen.count)
        cut = cut.model_copy(update={"drop": drop})
    if staying is None:
        stay = _stay(scores, row.visual, cut.drop)
    else:
        stay = torch.isin(row.present, staying)
    left = row.only(stay)
    if recipe.recycle is not None and cut.drop:
        left = _recycled(recipe.recycle, cut, row, left, scores)
    if recipe.positions == "compacted":
        positions = row.positions[..., : left.positions.shape[-1]]
        left = replace(left, positions=positions)
    return left, stay, Rated(scores, rank)


def _recycled(
    recycle: Recycle, cut: Cut, before: Row, left: Row, scores: Tensor
) -> Row:
    """The tokens left, and new ones made of dropped ones behind the last visual token.

    A new token has the position of the visual token that stood last ahead of the cut,
    and that one's patch.
    """
    if before.mask is not None:
        raise PlanError(
            "oracle",
            expected="tokens that attend to those ahead of them, to make new ones",
            found="images that attend to themselves both ways",
            fix="Use a recipe without the field 'recycle'.",
        )
    chosen, clusters = recycle.counts(cut.drop)
    places = before.visual.nonzero()[:, 0]
    dropped = torch.argsort(scores, stable=True)[: cut.drop]
    best_first = places[dropped.flip(0)[:chosen]]
    if recycle.form == "contextual":
        merged = best_first.sort().values
        keys = before.patches[merged, 1:]
        new = tower.merge(before.hidden[merged], keys, clusters)
    else:
        new = merge(before.hidden[best_first], clusters, paper=recycle.form == "paper")
    last = int(places[-1])
    # Where the new tokens go: behind all of those left that stood up to there.
    stood = torch.arange(len(before.visual), device=places.device)
    gone = torch.zeros_like(before.visual)
    gone[places[dropped]] = True
    at = int((stood[~gone] <= last).sum())
    own = torch.full((clusters,), -1, device=places.device)
    yes = torch.ones(clusters, dtype=torch.bool, device=places.device)
    position = before.positions[..., last, None].expand(
        *before.positions.shape[:-1], clusters
    )
    return Row(
        _insert(left.hidden, at, new),
        _insert(left.present, at, own),
        _insert(left.visual, at, yes),
        _insert(left.instruction, at, ~yes),
        torch.cat((left.positions[..., :at], position, left.positions[..., at:]), -1),
        _insert(left.patches, at, before.patches[last].expand(clusters, -1)),
        None,
    )


def _insert(values: Tensor, at: int, new: Tensor) -> Tensor:
    return torch.cat((values[:at], new, values[at:]))


def _stay(scores: Tensor, visual: Tensor, drop: int) -> Tensor:
    """Who stays when the ``drop`` lowest leave; of equals the earlier leaves first.

    Shapes: scores [v present], visual [m] bool -> [m] bool
    """
    lowest = torch.argsort(scores, stable=True)[:drop]
    leaving = visual.nonzero()[:, 0][lowest]
    stay = torch.ones_like(visual)
    stay[leaving] = False
    return stay
