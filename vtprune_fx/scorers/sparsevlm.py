"""SparseVLM's score and raters (arXiv:2410.04417, code of versions 1.0 and 1.5).

Raters: with ``R = softmax over text of (visual @ text^T)`` of the embeddings that enter
the decoder and r its mean over visual tokens, the text with ``r > mean(r)`` rates. (The
paper has ``>=``. Where all are equal, to rounding, all rate.)

Score: the attention that a visual token gets from the raters, mean over them and over
heads.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vtprune_fx.scorers.evidence import Evidence, mean_from
from vtprune_fx.scorers.roles import CONTEXT, INSTRUCTION, VISUAL

_NEVER = torch.finfo(torch.float32).min


def raters(embeddings: Tensor, roles: Tensor) -> Tensor:
    """[B, S] int64: the roles, instruction that does not rate made context.

    Args:
        embeddings: [B, S, E], what enters the decoder.
        roles: [B, S] int64.
    """
    visual, text = roles == VISUAL, roles == INSTRUCTION
    products = (embeddings @ embeddings.transpose(1, 2)).float()
    shares = products.masked_fill(~text[:, None], _NEVER).softmax(dim=2)
    of_text = _mean_of_rows(shares, visual).masked_fill(~text, 0)
    mean = of_text.sum(dim=1, keepdim=True) / text.sum(dim=1, keepdim=True).clamp(min=1)
    rating = text & (of_text > mean)
    rating = rating | (text & ~rating.any(dim=1, keepdim=True))
    return roles.masked_fill(text & ~rating, CONTEXT)


def rate(seen: Evidence) -> Tensor:
    """[B, S] float32."""
    return mean_from(seen, seen.roles == INSTRUCTION)


def _mean_of_rows(pairs: Tensor, rows: Tensor) -> Tensor:
    """[B, S]: the mean over some rows of [B, S, S]."""
    total = pairs.masked_fill(~rows[:, :, None], 0).sum(dim=1)
    return total / rows.sum(dim=1, keepdim=True).clamp(min=1)
