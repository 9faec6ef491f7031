"""Evenly spaced visual tokens are dropped, whatever they show. A baseline.

The i-th visual token scores ``i * 40503 mod 2^16``, Fibonacci hashing with 40503 the
odd number next to 2^16 over the golden ratio: the lowest n of v scores are spread over
the v places with gaps of at most three lengths (Knuth, TAOCP 6.4).
"""

from __future__ import annotations

from torch import Tensor

from vtprune_fx.scorers.evidence import Evidence
from vtprune_fx.scorers.ordinal import by_rank


def rate(seen: Evidence) -> Tensor:
    """[B, S] float32."""
    return by_rank(seen.roles, lambda rank, _: rank * 40503 % 65536)
