"""What a cut computes on tensors.

Plain PyTorch, traced into graphs by the passes. Nothing here depends on data for a
shape: no ``nonzero``, no boolean indexing, no ``.item()``.

Shapes: B samples, H query heads, G key heads, S tokens, D head width.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from vtprune_fx.recipe import Recipe

Scorer = Callable[[Tensor, Tensor, Tensor | None, Tensor, float], Tensor]
"""``(query, key, mask, roles, scale) -> scores``: rates the visual tokens at a cut."""

CONTEXT, VISUAL, INSTRUCTION, PADDING = 0, 1, 2, 3
"""Roles of tokens: text ahead of or between images, images, text behind the last, and
what nobody attends to."""

_NEVER = torch.finfo(torch.float32).min
"""Logit of a pair that may not attend. Finite, so that a row which may attend nothing
(left padding) has a finite softmax instead of NaN."""


def fitprune_score(
    query: Tensor, key: Tensor, mask: Tensor | None, roles: Tensor, scale: float
) -> Tensor:
    """FitPrune's score of each visual token (arXiv:2409.10197, published code).

    With M the maximum over heads of the attention probabilities, V the visual rows and
    T the instruction rows, token i scores ``sum(M[T, i]) * sum(M[V, i]) / |V|``.

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
    visual = roles == VISUAL
    cross, own = (_sum_rows(strongest, rows) for rows in (roles == INSTRUCTION, visual))
    score = cross * own / visual.sum(dim=1, keepdim=True).clamp(min=1)
    return score.masked_fill(~visual, float("inf"))


def _sum_rows(pairs: Tensor, rows: Tensor) -> Tensor:
    """[B, S]: the sum over some rows of [B, S, S].

    No matrix product, which autocast would round to half precision.
    """
    return pairs.masked_fill(~rows[:, :, None], 0).sum(dim=1)


def inverted_score(
    query: Tensor, key: Tensor, mask: Tensor | None, roles: Tensor, scale: float
) -> Tensor:
    """FitPrune's score the wrong way round: the best tokens leave first.

    Arguments and result are those of ``fitprune_score``.
    """
    score = fitprune_score(query, key, mask, roles, scale)
    return torch.where(roles == VISUAL, -score, score)


def uniform_score(
    query: Tensor, key: Tensor, mask: Tensor | None, roles: Tensor, scale: float
) -> Tensor:
    """Evenly spaced visual tokens leave, whatever they show.

    The i-th visual token scores ``i * 40503 mod 2^16``, Fibonacci hashing with 40503
    the odd number next to 2^16 over the golden ratio: the lowest n of v scores are
    spread over the v places with gaps of at most three lengths (Knuth, TAOCP 6.4).

    Arguments and result are those of ``fitprune_score``; only ``roles`` is read.
    """
    return _scored_by_rank(roles, lambda rank, _: rank * 40503 % 65536)


def random_score(
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    roles: Tensor,
    scale: float,
    seed: int = 0,
) -> Tensor:
    """Pseudo-random visual tokens leave, the same in every runtime.

    Whole numbers modulo the prime p = 65519, so that no two tokens tie and every
    runtime agrees: with v visual tokens left, the i-th scores ``(c^3 + v)^3`` with
    ``c = 251 i + 7919 v + 104729 seed``. Cubing is one to one, as 3 does not divide
    p - 1. Which tokens leave depends on the seed and on how many there are.

    Arguments and result are those of ``fitprune_score``; only ``roles`` is read.
    """
    prime = 65519

    def hashed(rank: Tensor, count: Tensor) -> Tensor:
        mixed = (251 * rank + 7919 * count + 104729 * seed) % prime
        mixed = (mixed * mixed % prime * mixed + count) % prime
        return mixed * mixed % prime * mixed % prime

    return _scored_by_rank(roles, hashed)


def _scored_by_rank(roles: Tensor, score: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Score visual tokens by their number, from 0, and how many a sample has."""
    visual = roles == VISUAL
    rank = visual.long().cumsum(dim=1) - 1
    scores = score(rank, visual.long().sum(dim=1, keepdim=True))
    return scores.float().masked_fill(~visual, float("inf"))


SCORERS: dict[str, Scorer] = {
    "fitprune": fitprune_score,
    "inverted": inverted_score,
    "random": random_score,
    "uniform": uniform_score,
}
"""Scorers by the name that recipes use."""


def scorer_of(recipe: Recipe) -> Scorer:
    """The recipe's scorer, with its seed where it takes one."""
    if recipe.score == "random":
        return functools.partial(random_score, seed=recipe.seed)
    return SCORERS[recipe.score]


def _attention_bias(mask: Tensor | None, query: Tensor) -> Tensor:
    """The mask as float32 to add to logits, [B or 1, 1, S, S], at least ``_NEVER``."""
    if mask is None:
        order = torch.arange(query.shape[2], device=query.device)
        mask = (order[:, None] >= order)[None, None]
    if mask.dtype == torch.bool:
        return (~mask).float() * _NEVER
    return mask.float().clamp(min=_NEVER)


def token_roles(visual: Tensor, mask: Tensor | None) -> Tensor:
    """What each token of a prompt is there for.

    Text is instruction behind the last image of the prompt as it came, also once that
    image has lost all its tokens; hence roles are taken once and gathered at cuts.

    Args:
        visual: [B, S] or [B, S, 1] bool.
        mask: What the first layer's attention got, as in ``fitprune_score``.

    Returns:
        [B, S] int64.
    """
    visual = visual.flatten(1)
    seen = visual.long().cumsum(dim=1)
    last = seen == visual.long().sum(dim=1, keepdim=True)
    roles = last.long() * INSTRUCTION * (~visual).long() + visual.long() * VISUAL
    return roles if mask is None else roles.masked_fill(~_attended(mask), PADDING)


def _attended(mask: Tensor) -> Tensor:
    """[B or 1, S]: whether any query may attend to a key."""
    if mask.dtype != torch.bool:
        mask = mask > torch.finfo(mask.dtype).min / 2
    return mask.any(dim=2)[:, 0]


def lowest_first(scores: Tensor, roles: Tensor) -> Tensor:
    """[B, S] positions in the order in which they would leave.

    Of equal scores the earlier token leaves first. Padding leaves behind the last
    visual token, text never: a prompt of text alone beside one with an image becomes
    shorter by losing what nobody attends to.
    """
    most = torch.finfo(torch.float32).max
    scores = scores.masked_fill(roles == PADDING, most)
    return torch.sort(scores, dim=1, stable=True).indices


def enough_to_drop(roles: Tensor, dropped: int, exactly: int | None) -> Tensor:
    """Scalar bool: every sample holds the visual tokens that the cuts count on.

    A sample of text alone holds as much padding as leaves.

    Args:
        roles: [B, S].
        dropped: How many tokens leave in all.
        exactly: How many visual tokens a sample must hold, if not any number from
            ``dropped`` on.
    """
    visual = (roles == VISUAL).sum(dim=1)
    padding = (roles == PADDING).sum(dim=1)
    enough = visual >= dropped if exactly is None else visual == exactly
    return (enough | ((visual == 0) & (padding >= dropped))).all()
