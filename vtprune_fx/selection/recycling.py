"""Dropped tokens clustered into a few new ones (SparseVLM, arXiv:2410.04417).

Of the n tokens that a cut drops the best scored m form C clusters, density peaks with
the nearest neighbours as kernel (DPC-KNN): with ``d(i, j) = |x_i - x_j| / sqrt(E)``,

* density of i: exp(-mean of d(i, .)^2 over the C nearest, i itself among them);
* its distance to the nearest denser token, or the largest distance if none is denser;
* centres are the C largest products of the two, every other token joins the nearest.

A cluster becomes one new token, the mean of its tokens' hidden states. The paper joins
by cosine, and takes the sum (``Recycle.form``). The published code adds noise of 1e-6
to densities so that none are equal; here the better scored of two equal tokens is the
denser one.

New tokens stand after the last visual token. Keep sets hold them as negative numbers,
-C to -1, which index what is put after the tokens to gather from.

Shapes: B samples, S tokens, E hidden width. m and C are constants.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vtprune_fx.scorers.roles import VISUAL


def merge(hidden: Tensor, best_first: Tensor, clusters: int, paper: bool) -> Tensor:
    """[B, C, E]: the new tokens, in the order of their centres.

    Args:
        hidden: [B, S, E], the residual stream that is cut.
        best_first: [B, m], positions of those that are clustered.
        clusters: C.
        paper: Join by cosine and add up, instead of by distance and take the mean.
    """
    samples = torch.arange(hidden.shape[0], device=hidden.device)[:, None]
    tokens = hidden[samples, best_first].float()
    distances = _distances(tokens)
    apart = _cosine_distances(tokens) if paper else distances
    members = _members(_centres(distances, clusters), apart).float()
    new = members @ tokens
    if not paper:
        new = new / members.sum(dim=2, keepdim=True)
    return new.to(hidden.dtype)


def best_of_dropped(lowest_first: Tensor, drop: int, chosen: int) -> Tensor:
    """[B, m]: the best of the dropped tokens, the best first.

    Args:
        lowest_first: [B, S], positions in the order of dropping.
        drop: n, how many are dropped.
        chosen: m.
    """
    return lowest_first[:, drop - chosen : drop].flip(1)


def _distances(tokens: Tensor) -> Tensor:
    """[B, m, m], symmetric and zero on the diagonal."""
    centred = tokens - tokens.mean(
        dim=1, keepdim=True
    )  # smaller numbers, less rounding
    squares = centred.square().sum(dim=2)
    products = centred @ centred.transpose(1, 2)
    found = squares[:, :, None] + squares[:, None] - products - products.transpose(1, 2)
    same = _eye(tokens)
    return (found.clamp(min=0) / tokens.shape[2]).sqrt().masked_fill(same, 0)


def _cosine_distances(tokens: Tensor) -> Tensor:
    """[B, m, m]."""
    lengths: Tensor = tokens.norm(dim=2, keepdim=True)
    directions = tokens / lengths.clamp(min=1e-12)
    return 1 - directions @ directions.transpose(1, 2)


def _centres(distances: Tensor, clusters: int) -> Tensor:
    """[B, C]: which tokens are centres."""
    numbers = torch.arange(clusters, device=distances.device)
    nearest = distances.sort(dim=2).values[:, :, numbers]
    density = (-nearest.square().mean(dim=2)).exp()
    order = torch.arange(density.shape[1], device=density.device)
    denser = density[:, None] > density[:, :, None]
    denser = denser | (
        (density[:, None] == density[:, :, None]) & (order < order[:, None])
    )
    farthest = distances.amax(dim=(1, 2), keepdim=True)
    apart = torch.where(denser, distances, farthest).amin(dim=2)
    ranked = (apart * density).sort(dim=1, descending=True, stable=True)
    return ranked.indices[:, numbers]


def _members(centres: Tensor, distances: Tensor) -> Tensor:
    """[B, C, m] bool: which tokens a cluster holds."""
    samples = torch.arange(centres.shape[0], device=centres.device)[:, None]
    order = torch.arange(distances.shape[1], device=centres.device)
    to_centres = distances[samples, centres]
    # A centre is in its cluster, whichever other token stands in the same place.
    to_centres = to_centres.masked_fill(centres[:, :, None] == order, -1)
    joined = to_centres.argmin(dim=1)
    numbers = torch.arange(centres.shape[1], device=centres.device)
    return joined[:, None] == numbers[:, None]


def _eye(tokens: Tensor) -> Tensor:
    order = torch.arange(tokens.shape[1], device=tokens.device)
    return order[:, None] == order


def kept_keys(kept: Tensor, clusters: int) -> Tensor:
    """[B, K] int64: sort keys of the kept tokens (``last_keys``)."""
    return kept * (clusters + 1)


def last_keys(lowest_first: Tensor, roles: Tensor, clusters: int) -> Tensor:
    """[B, C] int64: sort keys of the new tokens, ascending.

    The key of a kept token is ``position * (C + 1)``. New tokens stand after the last
    visual token of the sample, in a sample of text alone among the padding that is
    dropped: the key of that token, and the new token's number from 1 on.

    Args:
        lowest_first: [B, S], positions in the order of dropping.
        roles: [B, S].
        clusters: C.
    """
    order = torch.arange(roles.shape[1], device=roles.device)
    last = order.masked_fill(roles != VISUAL, -1).amax(dim=1, keepdim=True)
    last = torch.where(last < 0, lowest_first[:, :1], last)
    new = torch.arange(1, clusters + 1, device=roles.device)
    return last * (clusters + 1) + new


def keep_set(keys: Tensor, clusters: int) -> Tensor:
    """[B, K + C]: positions, and -C to -1 for the new tokens. Of sorted keys."""
    step = _step(keys, clusters)
    new = keys % step
    return torch.where(new > 0, new - step, keys // step)


def stand_ins(keys: Tensor, clusters: int) -> Tensor:
    """[B, K + C]: positions, where a new token has that of the token before it."""
    return keys // _step(keys, clusters)


def _step(keys: Tensor, clusters: int) -> Tensor:
    """C + 1 as a tensor: operators on a count that is read from the data want one."""
    return keys.new_full((), clusters + 1)


def hidden_from_each_other(stand_in: Tensor) -> Tensor:
    """[B, 1, K, K] bool: pairs of which a gathered causal mask forgot the order.

    New tokens, and the token that they stand in for, share a row of the mask.
    """
    order = torch.arange(stand_in.shape[1], device=stand_in.device)
    same = stand_in[:, :, None] == stand_in[:, None]
    return (same & (order > order[:, None]))[:, None]


def hide(mask: Tensor, pairs: Tensor) -> Tensor:
    """An attention mask in which some pairs may not attend.

    Args:
        mask: [B, 1, K, K] bool (True attends) or float (added to logits).
        pairs: [B, 1, K, K] bool.
    """
    if mask.dtype == torch.bool:
        return mask & ~pairs
    return mask.masked_fill(pairs, torch.finfo(mask.dtype).min)
