"""Pseudo-random visual tokens are dropped, the same in every runtime. A baseline.

Integers modulo the prime p = 65519, so that no two tokens tie and every runtime
agrees: with v visual tokens left, the i-th scores ``(c^3 + v)^3`` with
``c = 251 i + 7919 v + 104729 seed``. Cubing is one to one, as 3 does not divide p - 1.
Which tokens are dropped depends on the seed and on how many there are.
"""

from __future__ import annotations

from torch import Tensor

from vtprune_fx.scorers.evidence import Evidence
from vtprune_fx.scorers.ordinal import by_rank


def rate(seen: Evidence, *, seed: int = 0) -> Tensor:
    """[B, S] float32."""
    prime = 65519

    def hashed(rank: Tensor, count: Tensor) -> Tensor:
        mixed = (251 * rank + 7919 * count + 104729 * seed) % prime
        mixed = (mixed * mixed % prime * mixed + count) % prime
        return mixed * mixed % prime * mixed % prime

    return by_rank(seen.roles, hashed)
