"""What the baselines share: scores by a token's number alone."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from vtprune_fx.scorers.roles import VISUAL


def by_rank(roles: Tensor, score: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Score visual tokens by their number, from 0, and how many a sample has."""
    visual = roles == VISUAL
    rank = visual.long().cumsum(dim=1) - 1
    return score(rank, visual.long().sum(dim=1, keepdim=True)).float()
