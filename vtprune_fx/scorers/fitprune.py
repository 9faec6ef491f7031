"""FitPrune's score (arXiv:2409.10197, published code).

With M the maximum over heads of the attention probabilities, V the visual rows and T
the instruction rows, token i scores ``sum(M[T, i]) * sum(M[V, i]) / |V|``.
"""

from __future__ import annotations

from torch import Tensor

from vtprune_fx.scorers.evidence import Evidence, strongest_from
from vtprune_fx.scorers.roles import INSTRUCTION, VISUAL


def rate(seen: Evidence) -> Tensor:
    """[B, S] float32, the score of each visual token."""
    visual = seen.roles == VISUAL
    both = strongest_from(seen, seen.roles == INSTRUCTION, visual)
    return both.prod(dim=1) / visual.sum(dim=1, keepdim=True).clamp(min=1)
