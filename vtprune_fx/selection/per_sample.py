"""Cuts at which each sample drops another number of tokens.

Plain PyTorch, traced into graphs by the passes. Nothing here depends on data for a
shape: no ``nonzero``, no boolean indexing, no ``.item()``.

Shapes: B samples, S tokens, K of them after the cut.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vtprune_fx.scorers.roles import (
    CONTEXT,
    INSTRUCTION,
    PADDING,
    VISUAL,
    padding_counts,
    visual_counts,
)
from vtprune_fx.selection.order import lowest_first


def per_sample_order(
    scores: Tensor, roles: Tensor, came: Tensor, share: int | Tensor, of: int | Tensor
) -> Tensor:
    """[B, S] positions in the order of dropping, each sample another number.

    First the visual tokens that a sample drops, then padding, then what is kept: a
    sample that drops fewer than another becomes as short by dropping padding.

    Args:
        scores: [B, S].
        roles: [B, S].
        came: [B], visual tokens that each sample came with.
        share: How many of ``of`` visual tokens are dropped: a number, or a scalar.
        of: See ``share``.
    """
    ascending = lowest_first(scores, roles)
    ordered = roles.gather(1, ascending)
    place = torch.arange(roles.shape[1], device=roles.device)
    dropped = place < (came * share // of)[:, None]
    text = (ordered == CONTEXT) | (ordered == INSTRUCTION)
    turn = (~dropped).long() + ((ordered == VISUAL) & ~dropped).long() + 2 * text.long()
    turns = torch.sort(turn, dim=1, stable=True).indices
    return ascending.gather(1, turns)


def per_sample_dropped(
    order: Tensor, came: Tensor, share: int | Tensor, of: int | Tensor
) -> Tensor:
    """[B, S] bool: which of ``per_sample_order``'s are dropped visual tokens."""
    place = torch.arange(order.shape[1], device=order.device)
    return place < (came * share // of)[:, None]


_FRONT = 2**32
"""More than a prompt's tokens."""


def per_sample_keys(kept: Tensor, dropped: Tensor) -> Tensor:
    """[B, K] int64: sort keys, ascending by position, the dropped before all."""
    return kept - dropped.long() * _FRONT


def per_sample_keep_set(keys: Tensor) -> Tensor:
    """[B, K]: positions, and -1 in the places of those who left. Of sorted keys."""
    return keys.clamp(min=-1)


def per_sample_stand_ins(keys: Tensor) -> Tensor:
    """[B, K]: positions, also of those who left. Of sorted keys."""
    return torch.where(keys < 0, keys + _FRONT, keys)


def per_sample_places(
    roles: Tensor, stand_in: Tensor, keep: Tensor, padding: Tensor
) -> Tensor:
    """[B, K]: whose positions the tokens left take, where positions are compacted.

    Those of the first tokens of a sample. Its first token moves when padding in front
    of it is dropped, or when visual tokens become padding.

    Args:
        roles: [B, S].
        stand_in: [B, K] positions of those left.
        keep: [B, K], the same and -1 for those who left.
        padding: [B, 1], of the rows as they were.
    """
    samples = torch.arange(roles.shape[0], device=roles.device)[:, None]
    still = padding_counts(roles_without(roles[samples, stand_in], keep))
    places = torch.arange(stand_in.shape[1], device=roles.device)
    return (places + padding - still).clamp(min=0)


def roles_without(roles: Tensor, keep: Tensor) -> Tensor:
    """Gathered roles [B, K], padding in the places of those who left."""
    return roles.masked_fill(keep < 0, PADDING)


def mask_without(mask: Tensor, keep: Tensor) -> Tensor:
    """A gathered mask [B, 1, K, K] by which no token attends to a dropped one."""
    gone = (keep < 0)[:, None, None]
    if mask.dtype == torch.bool:
        return mask & ~gone
    return mask.masked_fill(gone, torch.finfo(mask.dtype).min)


def enough_padding(
    roles: Tensor, drops: tuple[int, ...], shares: tuple[int, ...], of: int
) -> Tensor:
    """Scalar bool: every sample has the padding to drop beside its visual tokens.

    Args:
        roles: [B, S].
        drops: How many tokens are dropped at each cut.
        shares: How many of ``of`` visual tokens each cut drops.
        of: See ``shares``.
    """
    visual, room = visual_counts(roles), (roles == PADDING).sum(dim=1)
    enough = torch.ones_like(room, dtype=torch.bool)
    for drop, share in zip(drops, shares, strict=True):
        room = room + visual * share // of - drop
        enough = enough & (room >= 0)
    return enough.all()
