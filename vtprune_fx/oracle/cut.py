"""The oracle's cut: ratings, kept tokens, and new tokens made of dropped ones.

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
        present: Their indices in the sample. [m]
        visual: Which of them are visual. [m] bool
        instruction: Which of them are the text that rates visual tokens. [m] bool
        positions: Their rotary positions. [m]
        patches: The tower's values of them, zeros for text. [m, 1 + w], or [m, 0]
            where the recipe does not read them.
        mask: Which of them each may attend to, None for a causal mask. [m, m] bool
    """

    hidden: Tensor
    present: Tensor
    visual: Tensor
    instruction: Tensor
    positions: Tensor
    patches: Tensor
    mask: Tensor | None

    def heads(self) -> Heads:
        """The row's attention, to be filled in by ``Decoder.run``."""
        count = len(self.hidden)
        causal = torch.ones(count, count, dtype=torch.bool, device=self.hidden.device)
        return Heads(causal.tril() if self.mask is None else self.mask)

    def only(self, keep: Tensor) -> Row:
        """The row with some of its tokens: [m] bool."""
        return Row(
            self.hidden[keep],
            self.present[keep],
            self.visual[keep],
            self.instruction[keep],
            self.positions[..., keep],
            self.patches[keep],
            None if self.mask is None else self.mask[keep][:, keep],
        )


@dataclass(frozen=True, eq=False)
class Rated:
    """Ratings that a cut follows.

    Attributes:
        scores: Of the visual tokens. [v present]
        rank: Of the attention, where the count follows it.
    """

    scores: Tensor
    rank: int | None


def cut_row(
    recipe: Recipe, cut: Cut, row: Row, seen: Seen, staying: Tensor | None
) -> tuple[Row, Tensor, Rated]:
    """Drop the visual tokens with the lowest scores.

    Returns:
        The kept tokens, which of the tokens they are [m] bool, and the ratings.
    """
    scores, rank = rate(recipe, seen), None
    if cut.by_rank is not None:
        rank = attention_rank(seen)
        drop = cut.by_rank.drop(rank, seen.count)
        cut = cut.model_copy(update={"drop": drop})
    if staying is None:
        keep = _kept(scores, row.visual, cut.drop)
    else:
        keep = torch.isin(row.present, staying)
    left = row.only(keep)
    if recipe.recycle is not None and cut.drop:
        left = _recycled(recipe.recycle, cut, row, left, scores)
    if recipe.positions == "compacted":
        positions = row.positions[..., : left.positions.shape[-1]]
        left = replace(left, positions=positions)
    return left, keep, Rated(scores, rank)


def _recycled(
    recycle: Recycle, cut: Cut, before: Row, left: Row, scores: Tensor
) -> Row:
    """The kept tokens, and new ones made of dropped ones after the last visual token.

    A new token has the position and the patch of the visual token that was the last one
    before the cut.
    """
    if before.mask is not None:
        raise PlanError(
            "oracle",
            expected="tokens that attend to earlier ones alone, to make new ones",
            found="images whose tokens attend to later ones too",
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
    # Where the new tokens go: after all kept tokens up to there.
    stood = torch.arange(len(before.visual), device=places.device)
    gone = torch.zeros_like(before.visual)
    gone[places[dropped]] = True
    at = int((stood[~gone] <= last).sum())
    no_index = torch.full((clusters,), -1, device=places.device)
    yes = torch.ones(clusters, dtype=torch.bool, device=places.device)
    position = before.positions[..., last, None].expand(
        *before.positions.shape[:-1], clusters
    )
    return Row(
        _insert(left.hidden, at, new),
        _insert(left.present, at, no_index),
        _insert(left.visual, at, yes),
        _insert(left.instruction, at, ~yes),
        torch.cat((left.positions[..., :at], position, left.positions[..., at:]), -1),
        _insert(left.patches, at, before.patches[last].expand(clusters, -1)),
        None,
    )


def _insert(values: Tensor, at: int, new: Tensor) -> Tensor:
    return torch.cat((values[:at], new, values[at:]))


def _kept(scores: Tensor, visual: Tensor, drop: int) -> Tensor:
    """All but the ``drop`` lowest tokens; of equals the earlier is dropped first.

    Shapes: scores [v present], visual [m] bool -> [m] bool
    """
    lowest = torch.argsort(scores, stable=True)[:drop]
    dropped = visual.nonzero()[:, 0][lowest]
    keep = torch.ones_like(visual)
    keep[dropped] = False
    return keep
