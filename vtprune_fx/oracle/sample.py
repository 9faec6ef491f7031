"""One prompt of the oracle, and a padded batch split into such prompts.

Letters in shapes are those of ``pruner``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vtprune_fx.errors import InputError
from vtprune_fx.models.encoding import FEATURES
from vtprune_fx.models.placeholders import is_visual
from vtprune_fx.oracle import tower
from vtprune_fx.oracle.decoder import Entered, enter

if TYPE_CHECKING:
    from transformers import PreTrainedModel


_FROM_ZERO = torch.empty(0, dtype=torch.long)
"""Default positions, replaced by ``arange(n)``."""


@dataclass(frozen=True, eq=False)
class Sample:
    """One prompt without padding.

    Attributes:
        input_ids: Token ids, a placeholder where a visual token stands. [n]
        features: Embeddings of the visual tokens, in their order. [v, h]
        positions: Rotary positions; 0, 1, 2, ... where none are given. [n]
        mask: Which tokens each may attend to, None for a causal mask. [n, n] bool
        later: Features that the model adds after its first layers. [v, h] each
        patches: The vision tower's values of each visual token's patch, from
            ``tower.watched``, where they are known. [v, 1 + w]
    """

    input_ids: Tensor
    features: Tensor
    positions: Tensor = _FROM_ZERO
    mask: Tensor | None = None
    later: tuple[Tensor, ...] = ()
    patches: Tensor | None = None

    def __post_init__(self) -> None:
        """Fill in the default positions."""
        if self.positions is _FROM_ZERO:
            counted = torch.arange(len(self.input_ids), device=self.input_ids.device)
            object.__setattr__(self, "positions", counted)


@torch.no_grad()
def split_batch(
    model: PreTrainedModel,
    input_ids: Tensor,
    attention_mask: Tensor,
    *,
    features: Tensor | None = None,
    position_ids: Tensor | None = None,
    **inputs: object,
) -> list[Sample]:
    """Split a padded batch into samples.

    Args:
        model: Encodes images and videos.
        input_ids: Token ids, padded on either side. [B, S]
        attention_mask: 1 where a token stands, 0 where padding does. [B, S]
        features: Of all samples, in place of images. [v, h]
        position_ids: Rotary positions, [B, S], [1, S] or [axes, B, S]. Without them
            they are those of the unpruned model: most count from the start of the
            padded row.
        inputs: What else the processor returned: ``pixel_values``, ...

    Returns:
        One sample a row.

    Raises:
        InputError: There are more or fewer features than placeholders.
    """
    attended = attention_mask.bool()
    visual = is_visual(input_ids, model.config) & attended
    patches = None
    if any(inputs.get(name) is not None for name in _PICTURES):
        given = {"input_ids": input_ids, "attention_mask": attention_mask} | inputs
        if position_ids is not None:
            given["position_ids"] = position_ids
        with tower.watched(model) as look:
            entered = enter(model, **given)
        features = entered.hidden[visual]
        patches = look(len(features))
    else:
        entered = _by_hand(input_ids, position_ids)
        if features is None:
            features = torch.empty(0, _width(model), device=model.device)
    counts: list[int] = visual.sum(dim=1).tolist()
    check_features(len(features), sum(counts))
    samples = _samples(entered, features, input_ids, attended, counts)
    if patches is None:
        return samples
    parts = torch.split(patches, counts)
    return [replace(s, patches=p) for s, p in zip(samples, parts, strict=True)]


_PICTURES = ("pixel_values", "pixel_values_videos", FEATURES)


def _samples(
    entered: Entered, features: Tensor, ids: Tensor, attended: Tensor, counts: list[int]
) -> list[Sample]:
    """A sample of each row, without patches.

    Args:
        entered: The batch before its first layer.
        features: Of all visual tokens. [v, h]
        ids: Token ids. [B, S]
        attended: Where a token stands. [B, S] bool
        counts: The number of visual tokens of each row.
    """
    positions = entered.positions
    positions = positions.expand(*positions.shape[:-2], *ids.shape)
    features_of = torch.split(features, counts)
    later = [torch.split(rows, counts) for rows in entered.later]
    return [
        Sample(
            ids[row, real],
            features_of[row],
            positions[..., row, real],
            _mask_of(entered.mask, row, real),
            tuple(rows[row] for rows in later),
        )
        for row, real in enumerate(attended)
    ]


def _by_hand(input_ids: Tensor, position_ids: Tensor | None) -> Entered:
    """Positions alone, for a batch that needs no encoder."""
    if position_ids is None:
        position_ids = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
    return Entered(torch.empty(0), position_ids, None, [])


def _mask_of(mask: Tensor | None, row: int, real: Tensor) -> Tensor | None:
    """A sample's part of a batch's mask, None where it is causal. [n, n] bool."""
    if mask is None:
        return None
    part = mask[min(row, len(mask) - 1), 0][real][:, real]
    return None if torch.equal(part, torch.ones_like(part).tril()) else part


def check_features(features: int, placeholders: int) -> None:
    """Check that there is a feature for each placeholder.

    Raises:
        InputError: They are more or fewer.
    """
    if features != placeholders:
        raise InputError(
            "image features",
            expected=f"one for each of the {placeholders} image tokens",
            found=str(features),
            fix="Put one image token into the prompt for each feature of its images.",
        )


def _width(model: PreTrainedModel) -> int:
    weight = model.get_input_embeddings().weight
    assert isinstance(weight, Tensor)
    return weight.shape[1]
