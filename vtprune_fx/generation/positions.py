"""Positions of a prompt, in the shorter sequence that a pruned prompt ends with."""

from __future__ import annotations

import torch
from torch import Tensor

from vtprune_fx.errors import InputError
from vtprune_fx.models.ragged_cache import ImageSpan


def kept_logits(asked: Tensor | int, span: ImageSpan, came: int) -> Tensor | int:
    """``logits_to_keep`` of a prompt, for what is left of it after the last cut.

    All text after the images is kept, so it stands as far from the end as it did.

    Args:
        asked: Positions of the prompt, or a number of last ones; 0 for what is kept.
        span: Where visual tokens stand.
        came: S, the prompt's tokens.

    Returns:
        The same number, or positions counted from the end.

    Raises:
        InputError: A position is not after the images.
    """
    if isinstance(asked, int):
        if asked and asked > came - 1 - span.last:
            raise _not_after(span, f"the last {asked} of {came}")
        return asked
    positions = torch.where(asked < 0, asked + came, asked)
    if bool(((positions <= span.last) | (positions >= came)).any()):
        raise _not_after(span, f"{asked.tolist()} of {came}")
    return positions - came


def _not_after(span: ImageSpan, found: str) -> InputError:
    return InputError(
        "logits_to_keep",
        expected=f"positions of the prompt after its images, which end at {span.last}",
        found=found,
        fix="Visual tokens are dropped, so their logits may be missing. Leave the "
        "option out for the logits of all kept tokens.",
    )


def check_one_sequence(position_ids: Tensor | None, mask: Tensor | None) -> None:
    """Refuse several sequences packed into one prompt: positions that start again.

    Args:
        position_ids: [B, S] as a caller gave them; other shapes are not judged.
        mask: [B, S], padding being 0, or None.

    Raises:
        InputError: Positions of a sample go down.
    """
    if position_ids is None or position_ids.dim() != 2:
        return
    down = position_ids[:, 1:] < position_ids[:, :-1]
    if mask is not None and mask.shape == position_ids.shape:
        down = down & mask[:, :-1].bool() & mask[:, 1:].bool()
    if bool(down.any()):
        raise InputError(
            "position_ids",
            expected="one prompt in each row",
            found="positions that start again, as of packed prompts",
            fix="Give each prompt a row of the batch, padded on the left.",
        )
