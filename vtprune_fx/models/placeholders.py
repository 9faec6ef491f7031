"""Placeholders: the token ids that stand for visual tokens in a prompt."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_FIELDS = ("image_token_id", "video_token_id")


def visual_token_ids(config: PreTrainedConfig) -> tuple[int, ...]:
    """Ids of the placeholders of images and videos, those that the model has.

    Args:
        config: The model's configuration, not its decoder's.
    """
    found = (getattr(config, name, None) for name in _FIELDS)
    return tuple(token for token in found if token is not None)


def is_visual(ids: Tensor, config: PreTrainedConfig) -> Tensor:
    """Which tokens are visual: placeholders of an image or a video.

    Args:
        ids: Token ids of any shape.
        config: The model's configuration, not its decoder's.

    Returns:
        bool, in the shape of ``ids``.
    """
    placeholders = torch.tensor(
        visual_token_ids(config), dtype=ids.dtype, device=ids.device
    )
    return torch.isin(ids, placeholders)
