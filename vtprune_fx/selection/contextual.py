"""VisionZip (arXiv:2412.04467): what the vision tower makes of each visual token.

The tower's class token says which patches matter: a visual token's score is the
attention that its patch gets from it in the layer whose output the features are, sum
over heads. Of the n dropped tokens C become *contextual* ones. With k a patch's key
in that layer, mean over heads:

* targets are every ``n // C``-th of them, in their order, the first C;
* every other joins the target with the largest cosine between their k;
* a new token is the target plus the mean of those that joined it.

The published code merges what the tower makes, before the projector; here what the
projector made of it is merged.

Plain PyTorch, traced into graphs by the passes. Nothing here depends on data for a
shape.

Shapes: B samples, S tokens, I images, N tokens of the tower for each, H heads, D head
width, E hidden width. n and C are constants.
"""

from __future__ import annotations

import torch
from torch import Tensor


def class_attention(
    query: Tensor, key: Tensor, visual: Tensor, scale: float, leading: int
) -> Tensor:
    """[B, S] float32: attention that each visual token's patch gets in the tower.

    From the class token, sum over heads; where there is none, from all patches, mean
    over them. What other tokens get has no meaning.

    Args:
        query: [I, H, N, D].
        key: As ``query``.
        visual: [B, S] or [B, S, 1] bool.
        scale: What logits are multiplied by.
        leading: Tokens before the patches, the class token first.
    """
    rows = query[:, :, :1] if leading else query
    logits = (rows @ key.transpose(2, 3) * scale).float()
    received = logits.softmax(dim=3).sum(dim=1).mean(dim=1)
    return _on_tokens(received[:, leading:], visual)


def mean_keys(key: Tensor, visual: Tensor, leading: int) -> Tensor:
    """[B, S, D] float32: the key of each visual token's patch, mean over heads.

    Args:
        key: [I, H, N, D].
        visual: As for ``class_attention``.
        leading: As for ``class_attention``.
    """
    return _on_tokens(key.float().mean(dim=1)[:, leading:], visual)


def _on_tokens(patches: Tensor, visual: Tensor) -> Tensor:
    """[B, S, ...] of [I, patches, ...]: in the order of visual tokens over the batch.

    Other tokens get some patch's.
    """
    visual = visual.flatten(1)
    places = visual.flatten().long().cumsum(dim=0) - 1
    return patches.flatten(0, 1)[places.clamp(min=0).reshape(visual.shape)]


def merge(hidden: Tensor, keys: Tensor, clustered: Tensor, new: int) -> Tensor:
    """[B, C, E]: the contextual tokens, in the order of their targets.

    Args:
        hidden: [B, S, E], the residual stream that is cut.
        keys: [B, S, D], as ``mean_keys`` gives them.
        clustered: [B, n], positions of those that are merged.
        new: C.
    """
    order = torch.arange(hidden.shape[1], device=hidden.device)
    samples = torch.arange(hidden.shape[0], device=hidden.device)[:, None]
    numbers = torch.arange(new, device=hidden.device)[:, None]
    merged = (clustered[:, :, None] == order).any(dim=1)
    rank = merged.long().cumsum(dim=1) - 1
    is_target = (rank[:, None] == numbers * (clustered.shape[1] // new)) & merged[
        :, None
    ]
    targets = is_target.long().argmax(dim=2)
    directions = keys / keys.norm(dim=2, keepdim=True).clamp(min=1e-12)
    likeness = directions[samples, targets] @ directions.transpose(1, 2)
    joins = merged & ~is_target.any(dim=1)
    members = (likeness.argmax(dim=1)[:, None] == numbers) & joins[:, None]
    tokens = hidden.float()
    count = members.sum(dim=2, keepdim=True).clamp(min=1)
    means = members.float() @ tokens / count
    found: Tensor = tokens[samples, targets] + means
    return found.to(hidden.dtype)
