"""Placeholders: the token ids that stand for visual tokens in a prompt."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Mapping

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


def tokens_per_image(
    inputs: Mapping[str, object], config: PreTrainedConfig
) -> int | None:
    """Visual tokens of one image, where each image has pixels of one row.

    Args:
        inputs: What a processor returned: ``input_ids``, ``pixel_values`` [I, ...].
        config: The model's configuration, not its decoder's.

    Returns:
        Their number, None where images have different ones.
    """
    ids, pixels = inputs.get("input_ids"), inputs.get("pixel_values")
    if not isinstance(ids, Tensor) or not isinstance(pixels, Tensor):
        return None
    count, rest = divmod(int(is_visual(ids, config).sum()), len(pixels))
    return None if rest else count
