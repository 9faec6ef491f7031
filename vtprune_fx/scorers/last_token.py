"""The attention of the last token, mean over heads.

FastV (arXiv:2403.06764) rates by it after a layer, PyramidDrop (arXiv:2410.17247) by
the one that the next layer would have: the same score at another site.
"""

from __future__ import annotations

from torch import Tensor

from vtprune_fx.scorers.evidence import Evidence, last_token, mean_from


def rate(seen: Evidence) -> Tensor:
    """[B, S] float32."""
    return mean_from(seen, last_token(seen.roles))
