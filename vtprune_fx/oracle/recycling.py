"""The oracle's recycling: dropped tokens clustered into new ones, written out in loops.

SparseVLM (arXiv:2410.04417); ``recycling`` says what differs.
Shapes: m tokens, h hidden size, C clusters.
"""

from __future__ import annotations

import torch
from torch import Tensor


def merge(tokens: Tensor, clusters: int, *, paper: bool) -> Tensor:
    """New tokens of density-peak clusters, in the order of centres. [m, h] -> [C, h].

    Args:
        tokens: Hidden states of the clustered tokens, the best scored first.
        clusters: C.
        paper: Tokens join by cosine, and are added up; else by distance, and the mean
            is taken, as in the published code.
    """
    exact = tokens.double()
    apart = torch.cdist(exact, exact, compute_mode="donot_use_mm_for_euclid_dist")
    apart = (apart / tokens.shape[1] ** 0.5).float()
    nearest = apart.sort(dim=1).values[:, :clusters]
    density = (-(nearest**2).mean(dim=1)).exp().tolist()
    count = len(density)
    products = []
    for i in range(count):
        denser = [j for j in range(count) if (density[j], i) > (density[i], j)]
        gaps = apart[i, denser] if denser else apart
        products.append(float(gaps.min() if denser else gaps.max()) * density[i])
    centres = sorted(range(count), key=lambda i: (-products[i], i))[:clusters]
    members: list[list[int]] = [[] for _ in centres]
    for i in range(count):
        if i in centres:
            nearest_centre = centres.index(i)
        elif paper:
            likeness = torch.cosine_similarity(exact[i][None], exact[centres])
            nearest_centre = int(likeness.argmax())
        else:
            nearest_centre = int(apart[i, centres].argmin())
        members[nearest_centre].append(i)
    joined = [tokens[of].float() for of in members]
    new = [each.sum(dim=0) if paper else each.mean(dim=0) for each in joined]
    return torch.stack(new).to(tokens.dtype)
