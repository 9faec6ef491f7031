"""VisionZip's score (arXiv:2412.04467): what the vision tower's class token looks at.

``contextual.class_attention`` has the formula.
"""

from __future__ import annotations

from torch import Tensor

from vtprune_fx.scorers.evidence import Evidence


def rate(seen: Evidence) -> Tensor:
    """[B, S] float32."""
    assert seen.class_attention is not None, "placing the recipe saw to it"
    return seen.class_attention
