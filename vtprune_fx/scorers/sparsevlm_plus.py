"""SparseVLM+'s score (code of version 2.0 of arXiv:2410.04417).

Attention decays with rotary distance, so it is divided, pair by pair, by what a vector
of ones would have got: ``g = rope(1) @ rope(1)^T / sqrt(D)``. The heads with the
largest sum from raters to visual tokens are averaged. Raters are SparseVLM's.

g can come near zero and change sign where heads are narrow (the published code divides
all the same). Here it keeps its sign and is at least 1e-5 in size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vtprune_fx.errors import PlanError
from vtprune_fx.scorers.evidence import Evidence, logits
from vtprune_fx.scorers.roles import INSTRUCTION, VISUAL
from vtprune_fx.scorers.sparsevlm import raters

__all__ = ["rate", "raters"]

_LEAST = 1e-5


def rate(seen: Evidence, *, heads: int = 14) -> Tensor:
    """[B, S] float32.

    Args:
        seen: The evidence, rotary tables included.
        heads: How many heads are averaged; all of them where there are fewer.

    Raises:
        PlanError: The graph does not show the rotary tables.
    """
    corrected = logits(seen).softmax(dim=3) / _gravity(seen)[:, None]
    rows = (seen.roles == INSTRUCTION)[:, None, :, None]
    by_head = corrected.masked_fill(~rows, 0).sum(dim=2)
    visual = (seen.roles == VISUAL)[:, None]
    sums = by_head.masked_fill(~visual, 0).sum(dim=2)
    best = sums.sort(dim=1, descending=True, stable=True).indices[:, :heads]
    samples = torch.arange(best.shape[0], device=best.device)
    raters_of = rows.sum(dim=2).clamp(min=1)[:, 0]
    return by_head[samples[:, None], best].mean(dim=1) / raters_of


def _gravity(seen: Evidence) -> Tensor:
    """[B or 1, S, S]: the logits of vectors of ones."""
    if seen.cos is None or seen.sin is None:
        raise PlanError(
            "score 'sparsevlm-plus'",
            expected="queries rotated by q * cos + rotate_half(q) * sin",
            found="another form in the graph, or no rotary embedding",
            fix="Use the score 'sparsevlm', which does not need the rotary tables.",
        )
    width = seen.cos.shape[2]
    signs = torch.arange(width, device=seen.cos.device) >= width // 2
    turned = seen.sin.float() * (2 * signs.float() - 1)
    ones = seen.cos.float() + turned
    gravity = ones @ ones.transpose(1, 2) / width**0.5
    size: Tensor = gravity.abs().clamp(min=_LEAST)
    return torch.where(gravity < 0, -size, size)
