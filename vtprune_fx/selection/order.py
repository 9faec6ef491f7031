"""What a cut does on tensors: the order in which tokens are dropped.

Plain PyTorch, traced into graphs by the passes. Nothing here depends on data for a
shape: no ``nonzero``, no boolean indexing, no ``.item()``. How tokens are rated is in
``scorers``.

Shapes: B samples, S tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vtprune_fx.scorers.roles import CONTEXT, INSTRUCTION, PADDING, VISUAL


def lowest_first(scores: Tensor, roles: Tensor) -> Tensor:
    """[B, S] positions in the order in which they would be dropped.

    Of equal scores the earlier token is dropped first; one without a score (NaN)
    before all. Padding is dropped after the last visual token, text never: a prompt of
    text alone beside one with an image becomes shorter by losing padding.
    """
    most = torch.finfo(torch.float32).max
    scores = scores.float().masked_fill(scores.isnan(), -most)
    scores = scores.clamp(-most, most / 2).masked_fill(roles == PADDING, most)
    text = (roles == CONTEXT) | (roles == INSTRUCTION)
    scores = scores.masked_fill(text, float("inf"))
    return torch.sort(scores, dim=1, stable=True).indices


def enough_to_drop(roles: Tensor, dropped: int, exactly: int | None) -> Tensor:
    """Scalar bool: every sample holds the visual tokens that the cuts count on.

    A sample of text alone holds as much padding as is dropped.

    Args:
        roles: [B, S].
        dropped: How many tokens are dropped in all.
        exactly: How many visual tokens a sample must hold, if not any number from
            ``dropped`` on.
    """
    visual = (roles == VISUAL).sum(dim=1)
    padding = (roles == PADDING).sum(dim=1)
    enough = visual >= dropped if exactly is None else visual == exactly
    return (enough | ((visual == 0) & (padding >= dropped))).all()
