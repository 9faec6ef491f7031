"""Attention that tokens receive, recorded while an unmodified model runs.

Through transformers' extension point for attention, so nothing here depends on a
model's source. A head's attention map exists only while the head is processed.

Shapes: B samples, H query heads, G key heads, S tokens, D head width.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import sdpa_mask

from vtprune_fx.errors import InputError
from vtprune_fx.models.ragged_attention import (
    attention_implementation,
    can_set_attention,
    check_decoder,
)
from vtprune_fx.ops.attention import attention_bias
from vtprune_fx.scorers.roles import INSTRUCTION, VISUAL, token_roles

BLOCK = {"cpu": 2**18, "cuda": 2**26}
"""Elements of attention maps that are processed at once, by kind of device: as many as
a processor's caches hold, and enough to keep a GPU busy."""

ATTENTION = "vtprune_observed"
"""Name of the attention implementation in transformers' registries."""


@dataclass(frozen=True)
class Received:
    """The attention that each token received in one layer, all [B, S] float32.

    With M the maximum over heads of the attention probabilities and A their mean:

    Attributes:
        cross: Mean of M over the instruction's rows.
        own: Mean of M over the visual tokens' rows.
        cross_share: Mean of A over the instruction's rows: all tokens' sum is 1.
        own_share: Mean of A over the visual tokens' rows.
    """

    cross: Tensor
    own: Tensor
    cross_share: Tensor
    own_share: Tensor


@dataclass
class Watch:
    """Records of the layers of one run.

    Attributes:
        visual: [B, S] bool, which tokens are visual.
        roles: [B, S], from ``token_roles``: by default read from the first layer's
            mask.
        received: One for each layer, in the order in which they ran.
    """

    visual: Tensor
    roles: Tensor | None = None
    received: list[Received] = field(default_factory=list)


_watch: ContextVar[Watch] = ContextVar("vtprune_watch")


@contextlib.contextmanager
def observed(model: PreTrainedModel) -> Iterator[None]:
    """Record the attention that a decoder's tokens receive, inside the block.

    Raises:
        InputError: The model's attention cannot be observed.
    """
    _check_observable(model)
    with attention_implementation(model, ATTENTION):
        yield


@contextlib.contextmanager
def watching(watch: Watch) -> Iterator[None]:
    """Record in ``watch`` the attention in layers that run inside the block."""
    token = _watch.set(watch)
    try:
        yield
    finally:
        _watch.reset(token)


def current_watch() -> Watch:
    """The record of the layers that are running."""
    return _watch.get()


def decoder_layers(model: PreTrainedModel) -> list[nn.Module]:
    """The layers of a model's decoder.

    Raises:
        InputError: They are not where transformers' decoders have them.
    """
    layers = getattr(model.get_decoder(), "layers", None)
    if isinstance(layers, nn.ModuleList):
        return list(layers)
    raise unobservable(model, "a decoder without a list of layers")


def unobservable(model: PreTrainedModel, found: str) -> InputError:
    """The error for a model whose attention cannot be observed."""
    return InputError(
        f"model {type(model).__name__}",
        expected="a decoder that takes attention from transformers' AttentionInterface",
        found=found,
        fix="Fit a recipe to a model such as LLaVA.",
    )


def _check_observable(model: PreTrainedModel) -> None:
    check_decoder(model.config.get_text_config())
    if not can_set_attention(model):
        raise unobservable(model, "attention outside the registry")


def _noting(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **_: object,
) -> tuple[Tensor, Tensor | None]:
    """Ordinary attention, recorded."""
    watch = _watch.get()
    if watch.roles is None:
        watch.roles = token_roles(watch.visual, attention_mask)
    scale = scaling or query.shape[-1] ** -0.5
    output, received = attend(query, key, value, attention_mask, watch.roles, scale)
    watch.received.append(received)
    return output.transpose(1, 2), None


AttentionInterface.register(ATTENTION, _noting)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    roles: Tensor,
    scale: float,
) -> tuple[Tensor, Received]:
    """Attention, and the attention that each token received.

    Some rows of one head at a time: their part of the map fits the processor's cache,
    which makes this faster than all at once, and keys that no row may attend to are
    skipped.

    Args:
        query: [B, H, S, D], rotated.
        key: [B, G, S, D], rotated; G divides H.
        value: [B, G, S, D].
        mask: As in ``scorers.evidence.Evidence``.
        roles: [B, S].
        scale: The factor of the logits.

    Returns:
        The output, [B, H, S, D] in the values' type.
    """
    bias = attention_bias(mask, query)[:, 0]
    weights = torch.stack((roles == INSTRUCTION, roles == VISUAL), dim=1).float()
    weights = weights / weights.sum(dim=2, keepdim=True).clamp(min=1)
    output = torch.empty_like(query, dtype=value.dtype)
    received = torch.zeros(2, *weights.shape, device=weights.device)
    length = query.shape[2]
    size = max(1, BLOCK.get(query.device.type, BLOCK["cuda"]) // roles.numel())
    for start in range(0, length, size):
        rows = slice(start, min(start + size, length))
        seen = _seen(mask, rows, length)
        output[:, :, rows], found = _attend_rows(
            query[:, :, rows] * scale,
            key[:, :, :seen],
            value[:, :, :seen],
            bias[:, rows, :seen],
            weights[:, :, rows],
        )
        received[..., :seen] += found
    (cross, own), (cross_share, own_share) = (r.unbind(dim=1) for r in received)
    return output, Received(cross, own, cross_share, own_share)


def _seen(mask: Tensor | None, rows: slice, length: int) -> int:
    """The last key that any of some rows may attend to, and one."""
    if mask is None:
        return int(rows.stop)
    beyond = mask[:, 0, rows, rows.stop :]
    if mask.dtype != torch.bool:
        beyond = beyond > torch.finfo(beyond.dtype).min / 2
    return length if beyond.any() else int(rows.stop)


def _attend_rows(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor]:
    """Attention of some rows.

    Shapes: R rows, K keys; query [B, H, R, D], key and value [B, G, K, D], bias
    [B or 1, R, K], weights [B, 2, R] -> [B, H, R, D], and [2, B, 2, K]: the maximum
    over heads and their mean, weighted.
    """
    heads, group = query.shape[1], query.shape[1] // key.shape[1]
    outputs: list[Tensor] = []
    strongest: Tensor | None = None
    share = weights.new_zeros(*weights.shape[:2], key.shape[2])
    for head in range(heads):
        keys, values = key[:, head // group].float(), value[:, head // group].float()
        logits = torch.baddbmm(bias, query[:, head].float(), keys.transpose(1, 2))
        probabilities = logits.softmax(dim=2)
        outputs.append(probabilities @ values)
        share = share + weights @ probabilities
        strongest = (
            probabilities
            if strongest is None
            else torch.maximum(strongest, probabilities, out=strongest)
        )
    assert strongest is not None, "a layer without heads"
    received = torch.stack((weights @ strongest, share / heads))
    return torch.stack(outputs, dim=1), received
