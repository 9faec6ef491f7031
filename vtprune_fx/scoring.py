"""What a cut computes on tensors.

Plain PyTorch, traced into graphs by the passes. Nothing here depends on data for a
shape: no ``nonzero``, no boolean indexing, no ``.item()``.

Shapes: B samples, H query heads, G key heads, S tokens, D head width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Scorer = Callable[[Tensor, Tensor, Tensor | None, Tensor, float], Tensor]
"""``(query, key, mask, roles, scale) -> scores``: rates the visual tokens at a cut."""

CONTEXT, VISUAL, INSTRUCTION = 0, 1, 2
"""Roles of tokens: text ahead of or between images, images, text behind the last."""

_NEVER = torch.finfo(torch.float32).min
"""Logit of a pair that may not attend. Finite, so that a row which may attend nothing
(left padding) has a finite softmax instead of NaN."""


def fitprune_score(
    query: Tensor, key: Tensor, mask: Tensor | None, roles: Tensor, scale: float
) -> Tensor:
    """FitPrune's score of each visual token (arXiv:2409.10197, published code).

    With M the maximum over heads of the attention probabilities, V the visual rows and
    T the instruction rows (what is padding attends and is attended nothing), token i
    scores ``sum(M[T, i]) * sum(M[V, i]) / |V|``.

    exp is monotone, so the head-maximum of probabilities is the exp of the head-maximum
    of ``logit - logsumexp(logits)``: one exp a pair instead of one a pair and head.

    Args:
        query: [B, H, S, D], rotated.
        key: [B, G, S, D], rotated; G divides H.
        mask: What the layer's own attention got: [B or 1, 1, S, S], bool (True attends)
            or float (added to logits), or None for a plain causal mask.
        roles: [B, S] int64, as ``token_roles`` gives them.
        scale: What the layer's attention multiplies its logits by.

    Returns:
        [B, S] float32; +inf where a token is not visual.
    """
    bias = _attention_bias(mask, query)
    groups = query.shape[1] // key.shape[1]
    key = key if groups == 1 else key.repeat_interleave(groups, dim=1)
    logits = (query @ key.transpose(2, 3) * scale).float() + bias
    relative = logits - logits.logsumexp(dim=3, keepdim=True)
    strongest = relative.amax(dim=1).exp()
    attended = bias.amax(dim=2)[:, 0] > _NEVER / 2
    visual = roles == VISUAL
    rows = torch.stack([(roles == INSTRUCTION) & attended, visual], dim=1).float()
    cross, own = (rows @ strongest).unbind(dim=1)
    score = cross * own / visual.sum(dim=1, keepdim=True).clamp(min=1)
    return score.masked_fill(~visual, float("inf"))


SCORERS: dict[str, Scorer] = {"fitprune": fitprune_score}
"""Scorers by the name that recipes use."""


def _attention_bias(mask: Tensor | None, query: Tensor) -> Tensor:
    """The mask as float32 to add to logits, [B or 1, 1, S, S], at least ``_NEVER``."""
    if mask is None:
        order = torch.arange(query.shape[2], device=query.device)
        mask = (order[:, None] >= order)[None, None]
    if mask.dtype == torch.bool:
        return (~mask).float() * _NEVER
    return mask.float().clamp(min=_NEVER)


def token_roles(visual: Tensor) -> Tensor:
    """[B, S] int64 roles, from the whole prompt's [B, S] bool mask of visual tokens.

    Text is instruction behind the last image of the prompt as it came, also once that
    image has lost all its tokens; hence roles are taken once and gathered at cuts.
    """
    seen = visual.long().cumsum(dim=1)
    last = seen == visual.long().sum(dim=1, keepdim=True)
    return last.long() * INSTRUCTION * (~visual).long() + visual.long() * VISUAL


def lowest_first(scores: Tensor) -> Tensor:
    """[B, S] positions in the order in which they would leave.

    Of equal scores the earlier token leaves first.
    """
    return torch.sort(scores, dim=1, stable=True).indices


def enough_visual_tokens(visual: Tensor, needed: int, exact: bool) -> Tensor:
    """Scalar bool: every sample holds the visual tokens that the cuts count on.

    Args:
        visual: [B, S] bool.
        needed: Visual tokens a sample must hold.
        exact: Whether it may hold more.
    """
    counts = visual.sum(dim=1)
    return ((counts == needed) if exact else (counts >= needed)).all()
