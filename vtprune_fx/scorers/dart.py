"""DART's score (arXiv:2502.11494): tokens that are like a pivot are duplicates.

Pivots are the few visual tokens and the few instruction tokens with the largest L1 norm
of their keys, all heads taken together. A visual token scores minus the largest cosine
between its key and a pivot's; pivots are kept.

The published code differs: each pivot in turn, in the order of a Python set, takes its
a share of the tokens least like it, and likeness is that of normed hidden states.
Here every token has one score, which depends on no order.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vtprune_fx.scorers.evidence import Evidence
from vtprune_fx.scorers.roles import INSTRUCTION, VISUAL

_PIVOT = 2.0
"""Score of a pivot: above all cosines."""


def rate(seen: Evidence, *, visual_pivots: int = 4, text_pivots: int = 4) -> Tensor:
    """[B, S] float32.

    Args:
        seen: The evidence; keys and roles are read.
        visual_pivots: How many visual tokens are pivots, where a sample has as many.
        text_pivots: How many instruction tokens are.
    """
    keys = seen.key.transpose(1, 2).flatten(2).float()
    length = keys.abs().sum(dim=2)
    directions = keys / keys.norm(dim=2, keepdim=True).clamp(min=1e-12)
    found = [
        _largest(length.masked_fill(seen.roles != role, -1), count)
        for role, count in ((VISUAL, visual_pivots), (INSTRUCTION, text_pivots))
    ]
    pivots = torch.cat([places for places, _ in found], dim=1)
    real = torch.cat([each for _, each in found], dim=1)
    samples = torch.arange(pivots.shape[0], device=pivots.device)[:, None]
    cosines = directions @ directions[samples, pivots].transpose(1, 2)
    likeness: Tensor = cosines.masked_fill(~real[:, None], -_PIVOT).amax(dim=2)
    order = torch.arange(keys.shape[1], device=keys.device)
    itself = ((order[:, None] == pivots[:, None]) & real[:, None]).any(dim=2)
    return (-likeness).masked_fill(itself, _PIVOT)


def _largest(length: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """[B, count] and [B, count] bool: where the largest stand, and which are real."""
    found = length.sort(dim=1, descending=True, stable=True)
    return found.indices[:, :count], found.values[:, :count] >= 0
