"""Counts that depend on the sample, in a graph: the rank of attention, what follows.

The only place where a graph reads numbers from its data: the host learns how many
tokens a cut keeps, and every length after it is that number. One sample at a time,
since samples of a batch would have to be of one length.

Shapes: B samples (1 when it runs), S tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vtprune_fx.errors import InputError
from vtprune_fx.ops.register import operator
from vtprune_fx.recipes.rank_rule import ByRank, KeepByRank
from vtprune_fx.recipes.schema import Recycle
from vtprune_fx.scorers.evidence import Evidence, logits
from vtprune_fx.scorers.roles import INSTRUCTION, VISUAL
from vtprune_fx.selection import recycling

KEPT, CLUSTERED, CLUSTERS, NEW = range(4)
"""Places in ``counts``."""


def check_alone(samples: int) -> None:
    """Refuse a batch: its samples would keep different numbers of tokens.

    Raises:
        InputError: There is more than one sample.
    """
    if samples != 1:
        raise InputError(
            "batch",
            expected="one sample: how many tokens are kept follows its attention",
            found=str(samples),
            fix="Run samples one by one, or fix the recipe's counts with "
            "`vtprune calibrate`.",
        )


def _scalar(attended: Tensor, roles: Tensor) -> Tensor:
    return roles.new_empty(())


@operator("vtprune::attention_rank", _scalar)
def attention_rank(attended: Tensor, roles: Tensor) -> Tensor:
    """Rank of the attention from raters to visual tokens, as ``by_rank`` defines it.

    Args:
        attended: [1, S, S] float32, mean over heads.
        roles: [1, S] int64.

    Returns:
        int64, a scalar.

    Raises:
        InputError: There is more than one sample.
    """
    check_alone(roles.shape[0])
    rated = attended[0][roles[0] == INSTRUCTION][:, roles[0] == VISUAL]
    if not rated.numel():
        return roles.new_zeros(())
    found: Tensor = torch.linalg.matrix_rank(rated)
    return found


def attended(seen: Evidence) -> Tensor:
    """[B, S, S] float32: the layer's attention, mean over heads."""
    return logits(seen).softmax(dim=3).mean(dim=1)


def counts(
    rank: Tensor, roles: Tensor, rule: ByRank, recycle: Recycle | None
) -> Tensor:
    """int64 [4]: kept tokens, dropped ones that are clustered, clusters, new ones.

    Where nothing is dropped, one token is clustered and not used.

    Args:
        rank: A scalar.
        roles: [B, S].
        rule: What follows from the rank.
        recycle: How dropped tokens become new ones.
    """
    visual = (roles == VISUAL).sum()
    if isinstance(rule, KeepByRank):
        kept = (rule.scale * rank.double() + rule.bias).long()
        drop = visual - kept.minimum(visual - 1).clamp(min=0)
    else:
        drop = (rule.factor * (visual - rank).double()).long()
    chosen = clusters = torch.zeros_like(drop)
    if recycle is not None:
        chosen = _share(recycle, recycle.tau, drop)
        clusters = _share(recycle, recycle.theta, chosen)
    # Not the size itself, which would make a constant of it in an exported graph.
    kept = torch.ones_like(roles[0]).sum() - drop
    found = (kept, chosen.clamp(min=1), clusters.clamp(min=1), clusters)
    return torch.stack(found)


def _share(recycle: Recycle, share: float, of: Tensor) -> Tensor:
    """As ``Recycle.counts`` rounds."""
    part = (share * of.double()).long()
    part = part + 1 if recycle.form == "code" else part.clamp(min=1)
    return part.minimum(of)


def _merged(hidden: Tensor, best_first: Tensor, clusters: int, paper: bool) -> Tensor:
    return hidden.new_empty(hidden.shape[0], clusters, hidden.shape[2])


@operator("vtprune::merge", _merged)
def merge(hidden: Tensor, best_first: Tensor, clusters: int, paper: bool) -> Tensor:
    """``recycling.merge`` as one operator.

    Compilers ask of matrix products whether a size is 1, which they cannot know of a
    count that is read from the data.
    """
    return recycling.merge(hidden, best_first, clusters, paper)


def best(lowest_first: Tensor, count: int) -> Tensor:
    """[B, count]: the positions that would be dropped last, the last first."""
    places = torch.arange(count, device=lowest_first.device)
    return lowest_first.flip(1)[:, places]


def best_of_dropped(lowest_first: Tensor, kept: int, chosen: int) -> Tensor:
    """[B, chosen]: the best of the dropped, the best first."""
    places = torch.arange(chosen, device=lowest_first.device) + kept
    last = lowest_first.shape[1] - 1
    return lowest_first.flip(1)[:, places.clamp(max=last)]


def first(values: Tensor, count: int) -> Tensor:
    """[B, count, E]: the first of some rows."""
    return values[:, torch.arange(count, device=values.device)]
