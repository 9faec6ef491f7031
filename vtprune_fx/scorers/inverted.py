"""FitPrune's score the wrong way round: the best are dropped first. A baseline."""

from __future__ import annotations

from torch import Tensor

from vtprune_fx.scorers import fitprune
from vtprune_fx.scorers.evidence import Evidence


def rate(seen: Evidence) -> Tensor:
    """[B, S] float32."""
    return -fitprune.rate(seen)
