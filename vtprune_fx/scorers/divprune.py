"""DivPrune's score (arXiv:2503.02175): tokens that are far from each other are kept.

Greedily, by the distance ``1 - cosine`` of the residual stream, before the first
layer that of what the projector made: first the token whose nearest other is farthest,
then one by one the token whose nearest chosen one is.

Who is chosen first scores highest. Tokens that ``picks`` choices do not come to score
by how far the nearest chosen one is, by which the next choice would go. Each choice is
a few nodes of a graph: as many as there are kept tokens are enough.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vtprune_fx.scorers.evidence import Evidence
from vtprune_fx.scorers.roles import VISUAL

_FAR = 3.0
"""Above all distances."""


def rate(seen: Evidence, *, picks: int = 64) -> Tensor:
    """[B, S] float32.

    Args:
        seen: The evidence; the residual stream and roles are read.
        picks: How many tokens are chosen one by one.
    """
    assert seen.hidden is not None, "the graph does not show the residual stream"
    visual = seen.roles == VISUAL
    stream = seen.hidden.float()
    directions = stream / stream.norm(dim=2, keepdim=True).clamp(min=1e-12)
    distance = (1 - directions @ directions.transpose(1, 2)).clamp(min=0)
    order = torch.arange(visual.shape[1], device=visual.device)
    samples = torch.arange(visual.shape[0], device=visual.device)
    others = visual[:, None] & (order[:, None] != order)
    nearest = distance.masked_fill(~others, _FAR).amin(dim=2)
    chosen = nearest.masked_fill(~visual, -1).argmax(dim=1)
    # Below zero is who may not be chosen: the n-th that was is -n.
    apart = distance[samples, chosen].masked_fill(~visual, -picks - 1)
    apart = apart.masked_fill(order == chosen[:, None], -1)
    for pick in range(2, picks + 1):
        chosen = apart.argmax(dim=1)
        new = (order == chosen[:, None]) & (apart >= 0)
        apart = torch.minimum(apart, distance[samples, chosen]).masked_fill(new, -pick)
    return torch.where(apart < 0, _FAR + picks + apart, apart)
