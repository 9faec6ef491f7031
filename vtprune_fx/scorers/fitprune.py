"""FitPrune's score (arXiv:2409.10197, published code).

With M the maximum over heads of the attention probabilities, V the visual rows and T
the instruction rows, token i scores ``sum(M[T, i]) * sum(M[V, i]) / |V|``.
"""

from __future__ import annotations

from torch import Tensor

from vtprune_fx.scorers.evidence import Evidence, logits
from vtprune_fx.scoring import INSTRUCTION, VISUAL


def rate(seen: Evidence) -> Tensor:
    """[B, S] float32, the score of each visual token.

    exp is monotone, so the head-maximum of probabilities is the exp of the head-maximum
    of ``logit - logsumexp(logits)``: one exp a pair instead of one a pair and head.
    """
    found = logits(seen)
    relative = found - found.logsumexp(dim=3, keepdim=True)
    strongest = relative.amax(dim=1).exp()
    visual = seen.roles == VISUAL
    instruction = seen.roles == INSTRUCTION
    cross, own = (_sum_rows(strongest, rows) for rows in (instruction, visual))
    return cross * own / visual.sum(dim=1, keepdim=True).clamp(min=1)


def _sum_rows(pairs: Tensor, rows: Tensor) -> Tensor:
    """[B, S]: the sum over some rows of [B, S, S].

    No matrix product, which autocast would round to half precision.
    """
    return pairs.masked_fill(~rows[:, :, None], 0).sum(dim=1)
