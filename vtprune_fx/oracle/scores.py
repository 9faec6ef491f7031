"""The scores of the oracle: a second version of every shipped scorer, for one sample.

Plain eager code that shares nothing with ``scorers``. Letters in shapes are those of
``oracle``. A scorer registered by a user has no second version; it is called with a
batch of one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vtprune_fx.scorers import registry
from vtprune_fx.scorers.evidence import Evidence
from vtprune_fx.scorers.roles import CONTEXT, INSTRUCTION, VISUAL

if TYPE_CHECKING:
    from vtprune_fx.recipes.schema import Recipe


@dataclass(frozen=True, eq=False)
class Seen:
    """Values that rate one sample's tokens.

    Attributes:
        query: Rotated. [H, m, d]
        key: Rotated. [K, m, d]
        scale: The factor of the layer's logits.
        hidden: The residual stream that is cut. [m, h]
        cos: Rotary cosines of the tokens. [m, d]
        sin: Rotary sines. [m, d]
        visual: Which tokens are visual. [m] bool
        instruction: Which text rates them. [m] bool
        patches: The vision tower's values of them, from ``tower.watched``.
            [m, 1 + w], or [m, 0] where the recipe does not read them.
        allowed: Which tokens each may attend to. [m, m] bool
        probabilities: The layer's attention, rows are queries. [H, m, m] float32
    """

    query: Tensor
    key: Tensor
    scale: float
    hidden: Tensor
    cos: Tensor
    sin: Tensor
    visual: Tensor
    instruction: Tensor
    patches: Tensor
    allowed: Tensor
    probabilities: Tensor

    @property
    def count(self) -> int:
        """How many visual tokens there are."""
        return int(self.visual.sum())


def rate(recipe: Recipe, seen: Seen) -> Tensor:
    """The recipe's score of each visual token present, in order. [v present]."""
    if recipe.score in _SCORES and registry.is_built_in(recipe.score):
        return _SCORES[recipe.score](recipe, seen)
    roles = _roles(seen.visual, seen.instruction)[None]
    query, key = seen.query[None], seen.key[None]
    hidden, cos, sin = (value[None] for value in (seen.hidden, seen.cos, seen.sin))
    mask = seen.allowed[None, None]
    evidence = Evidence(query, key, mask, roles, seen.scale, hidden, cos, sin)
    if registry.sees_tower(recipe.score):
        evidence = evidence._replace(class_attention=seen.patches[None, :, 0])
    rated = registry.rate_of(recipe.score, recipe.scorer_options())
    return rated(evidence)[0, seen.visual]


def _roles(visual: Tensor, instruction: Tensor) -> Tensor:
    """Roles of ``scorers.roles``. [n] int64."""
    roles = torch.full_like(visual, CONTEXT, dtype=torch.long)
    roles[visual], roles[instruction] = VISUAL, INSTRUCTION
    return roles


def fitprune(_: Recipe, seen: Seen) -> Tensor:
    """FitPrune's (arXiv:2409.10197 and its published code)."""
    return fitprune_scores(seen.probabilities, seen.visual, seen.instruction)


def fitprune_scores(
    probabilities: Tensor, visual: Tensor, instruction: Tensor
) -> Tensor:
    """FitPrune's, from attention probabilities.

    With ``M[q, i] = max over heads of A[head, q, i]``::

        cross[i] = sum of M[q, i] over the text q after the last visual token
        self[i]  = sum of M[q, i] over the visual q still present / their number
        score[i] = cross[i] * self[i]

    Shapes:
        probabilities: [H, m, m] float32, rows are queries
        visual, instruction: [m] bool
        returns: [v present], in the order of the visual tokens
    """
    largest = probabilities.amax(dim=0)[:, visual]
    cross = largest[instruction].sum(dim=0)
    visual_mean = largest[visual].sum(dim=0) / visual.sum()
    return cross * visual_mean


def inverted(recipe: Recipe, seen: Seen) -> Tensor:
    """FitPrune's, negated."""
    return -fitprune(recipe, seen)


def uniform(_: Recipe, seen: Seen) -> Tensor:
    """As ``scorers.uniform`` defines it, in Python's integers."""
    ranks = [rank * 40503 % 2**16 for rank in range(seen.count)]
    return torch.tensor(ranks, device=seen.visual.device)


def random(recipe: Recipe, seen: Seen) -> Tensor:
    """As ``scorers.random`` defines it, in Python's integers."""
    count = seen.count
    shift = 7919 * count + 104729 * recipe.seed
    draws = [((251 * i + shift) ** 3 + count) ** 3 % 65519 for i in range(count)]
    return torch.tensor(draws, device=seen.visual.device)


def last_token(_: Recipe, seen: Seen) -> Tensor:
    """FastV's (arXiv:2403.06764): the last row, mean over heads."""
    return seen.probabilities[:, -1].mean(dim=0)[seen.visual]


def raters(
    recipe: Recipe, embeddings: Tensor, visual: Tensor, instruction: Tensor
) -> Tensor:
    """Which of the text after the images rates. [n] bool.

    All of it, or with SparseVLM (arXiv:2410.04417) the text with more than its share of
    the visual tokens' softmaxed similarity.

    Shapes: embeddings [n, h]; visual, instruction [n] bool
    """
    if recipe.score in {"sparsevlm", "sparsevlm-plus"} and bool(instruction.any()):
        similar = (embeddings[visual] @ embeddings[instruction].T).float()
        share = similar.softmax(dim=1).mean(dim=0)
        above = share > share.mean()
        chosen = instruction.clone()
        chosen[instruction] = above if bool(above.any()) else True
        return chosen
    if registry.is_built_in(recipe.score):
        return instruction
    found = registry.scorer(recipe.score).raters
    if found is None:
        return instruction
    roles = _roles(visual, instruction)
    return found(embeddings[None], roles[None])[0] == INSTRUCTION


def sparsevlm(_: Recipe, seen: Seen) -> Tensor:
    """SparseVLM's: mean attention from the raters, over them and over heads."""
    return seen.probabilities[:, seen.instruction].mean(dim=(0, 1))[seen.visual]


def attention_rank(seen: Seen) -> int:
    """Rank of the raters' attention to visual tokens, mean over heads (``by_rank``)."""
    attended = seen.probabilities.mean(dim=0)[seen.instruction][:, seen.visual]
    return int(torch.linalg.matrix_rank(attended)) if attended.numel() else 0


def sparsevlm_plus(recipe: Recipe, seen: Seen) -> Tensor:
    """SparseVLM+'s: divided by the rotary decay, the best heads alone."""
    half = seen.cos.shape[1] // 2
    cos, sin = seen.cos.float(), seen.sin.float()
    ones = torch.cat((cos[:, :half] - sin[:, :half], cos[:, half:] + sin[:, half:]), 1)
    decay = ones @ ones.T / (2 * half) ** 0.5
    tiny = decay.abs() < 1e-5
    decay[tiny] = torch.where(decay[tiny] < 0, -1e-5, 1e-5)
    rated = (seen.probabilities / decay)[:, seen.instruction][:, :, seen.visual]
    sums = rated.sum(dim=(1, 2))
    heads = sums.argsort(descending=True, stable=True)
    best: Tensor = rated[heads[: int(recipe.options.get("heads", 14))]]
    return best.mean(dim=(0, 1))


def dart(recipe: Recipe, seen: Seen) -> Tensor:
    """DART's, as ``scorers.dart`` defines it: minus the cosine to the nearest pivot."""
    keys = seen.key.transpose(0, 1).flatten(1).float()
    length = keys.abs().sum(dim=1)
    pivots: list[int] = []
    for name, which in (("visual", seen.visual), ("text", seen.instruction)):
        places = which.nonzero()[:, 0]
        best = length[places].argsort(descending=True, stable=True)
        count = int(recipe.options.get(f"{name}_pivots", 4))
        pivots += places[best[:count]].tolist()
    scores = torch.full_like(length, 2.0)
    for token in range(len(keys)):
        if pivots and token not in pivots:
            likeness = torch.cosine_similarity(keys[token][None], keys[pivots])
            scores[token] = -likeness.max()
    return scores[seen.visual]


def divprune(recipe: Recipe, seen: Seen) -> Tensor:
    """DivPrune's, as ``scorers.divprune`` defines it: in the order of being chosen."""
    tokens = torch.nn.functional.normalize(seen.hidden[seen.visual].float(), dim=1)
    distance = (1 - tokens @ tokens.T).clamp(min=0)
    chosen: list[int] = []
    scores = distance.new_zeros(len(tokens))
    for pick in range(min(int(recipe.options.get("picks", 64)), len(tokens))):
        to_others = distance.clone().fill_diagonal_(3.0)
        nearest = (distance[:, chosen] if chosen else to_others).amin(dim=1)
        nearest[chosen] = -1.0
        chosen.append(int(nearest.argmax()))
        scores[chosen[-1]] = 1000.0 - pick
    for token in range(len(tokens)):
        if token not in chosen:
            scores[token] = distance[token, chosen].min()
    return scores


def visionzip(_: Recipe, seen: Seen) -> Tensor:
    """VisionZip's (arXiv:2412.04467): the attention of the tower's class token."""
    return seen.patches[seen.visual, 0]


_SCORES: dict[str, Callable[[Recipe, Seen], Tensor]] = {
    "dart": dart,
    "divprune": divprune,
    "fitprune": fitprune,
    "inverted": inverted,
    "last-token": last_token,
    "random": random,
    "sparsevlm": sparsevlm,
    "sparsevlm-plus": sparsevlm_plus,
    "uniform": uniform,
    "visionzip": visionzip,
}
