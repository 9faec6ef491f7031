"""Caches whose layers hold different numbers of tokens, on transformers' own classes.

A pruned prefill leaves each layer with keys of its own number, and each sample with
padding of its own number in each layer: a prompt of text alone lost padding where
others lost visual tokens. So every layer knows its padding, and one mask is made for
all layers, ``attention_mask``, of which ``ragged_attention.ragged_sdpa`` reads its
layer's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer, QuantizedLayer, StaticLayer

from vtprune_fx.errors import InputError


class RaggedLayer(DynamicLayer):
    """Keys and values of one layer, and how much of them is padding.

    Attributes:
        padding: [B] int64: so many tokens in front are padding's.
        dropped: Tokens that left ahead of the layer.
    """

    def __init__(
        self, keys: Tensor, values: Tensor, padding: Tensor, dropped: int
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call] # not seen as transformers'
        self.lazy_initialization(keys, values)
        self.keys, self.values, self.padding = keys, values, padding
        self.dropped = dropped

    def held(self) -> int:
        """Tokens in the layer."""
        return super().get_seq_length()

    def get_seq_length(self) -> int:
        """Tokens that came: what ``generate`` goes on from."""
        return self.held() + self.dropped

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """The layer's keys once so many more are there, and where they start."""
        return self.held() + query_length, 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Take over each beam's best sample."""
        super().reorder_cache(beam_idx)  # type: ignore[arg-type] # any Tensor will do
        self.padding = self.padding.index_select(0, beam_idx.to(self.padding.device))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each sample."""
        super().batch_repeat_interleave(repeats)
        self.padding = self.padding.repeat_interleave(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some samples."""
        super().batch_select_indices(indices)
        self.padding = self.padding[indices]


class RaggedStaticLayer(StaticLayer):
    """The same, with room for so many tokens more: addresses and sizes never change.

    Attributes:
        padding: As in ``RaggedLayer``.
        dropped: As in ``RaggedLayer``.
    """

    # transformers would compile ``generate``'s decode steps itself; they are already.
    is_compileable = False

    def __init__(
        self, keys: Tensor, values: Tensor, padding: Tensor, dropped: int, more: int
    ) -> None:
        super().__init__(keys.shape[2] + more)
        self.padding, self.dropped = padding, dropped
        self.update(keys, values)

    def held(self) -> int:
        """Tokens in the layer; a tensor, as in all static layers."""
        return super().get_seq_length()

    def get_seq_length(self) -> int:
        """Tokens that came: what ``generate`` goes on from."""
        return self.held() + self.dropped

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Take over each beam's best sample."""
        super().reorder_cache(beam_idx)  # type: ignore[arg-type] # any Tensor will do
        self.padding = self.padding.index_select(0, beam_idx.to(self.padding.device))


Layer = RaggedLayer | RaggedStaticLayer


def length_of(cache: Cache | None) -> int:
    """Tokens that came: those of the first layer, and what left ahead of it."""
    return 0 if cache is None else int(cache.get_seq_length())


def check_can_be_ragged(cache: Cache | None) -> None:
    """Refuse an empty cache whose layers keep their keys elsewhere, or otherwise.

    Raises:
        InputError: It is offloaded or quantised.
    """
    if cache is None:
        return
    quantised = any(isinstance(layer, QuantizedLayer) for layer in cache.layers)
    if cache.offloading or quantised:
        raise InputError(
            "past_key_values",
            expected="a dynamic or a static cache",
            found="one with quantised keys" if quantised else "one with offloading",
            fix="Leave cache_implementation out, or set it to 'static'.",
        )


def check_sees_all(text: PreTrainedConfig) -> None:
    """Refuse a decoder whose layers attend to a window: it counts tokens, a cut too.

    Raises:
        InputError: A layer does.
    """
    for index, layer in enumerate(DynamicCache(config=text).layers):
        if getattr(layer, "is_sliding", False):
            raise InputError(
                f"decoder layer {index}",
                expected="attention to all that came before",
                found="a sliding window",
                fix="Where no prompt is longer than the window, load the model with "
                "text_config.sliding_window = None.",
            )


def make_ragged(
    cache: Cache,
    came: int,
    attention_mask: Tensor | None,
    visual: Tensor,
    room: int | None = None,
    left: Sequence[Tensor] | None = None,
) -> None:
    """Give a cache ragged layers, in place.

    Args:
        cache: Filled by a prefill, pruned or not.
        came: S, the prompt's tokens.
        attention_mask: [B, S] of the prompt, padded in front; None without padding.
        visual: [B] visual tokens that each sample of the prompt came with.
        room: Tokens that each layer will have room for, its own cuts apart; None for
            layers that grow.
        left: Where samples lost numbers of their own, [B] for each layer: how many
            visual tokens left ahead of it.

    Raises:
        InputError: A sample is padded elsewhere.
    """
    padding = _padding_in_front(attention_mask, visual)
    layers: list[Any] = cache.layers
    for index, layer in enumerate(layers):
        dropped = came - layer.keys.shape[2]
        # Where a sample had too few visual tokens, padding left in their place.
        own = padding - (dropped - visual).clamp(min=0)
        if left is not None:
            own = padding - dropped + left[index]
        if room is None:
            layers[index] = RaggedLayer(layer.keys, layer.values, own, dropped)
        else:
            layers[index] = RaggedStaticLayer(
                layer.keys, layer.values, own, dropped, more=room - came
            )


def _padding_in_front(attention_mask: Tensor | None, visual: Tensor) -> Tensor:
    """[B] int64: tokens of padding in each sample of a prompt."""
    if attention_mask is None:
        return torch.zeros_like(visual)
    attended = attention_mask.bool()
    if bool((attended[:, :-1] & ~attended[:, 1:]).any()):
        raise InputError(
            "attention_mask",
            expected="padding in front of each prompt",
            found="padding behind or inside of one",
            fix="Set processor.tokenizer.padding_side = 'left' to generate.",
        )
    return (~attended).sum(dim=1)


def attention_mask(cache: Cache, new: int) -> Tensor:
    """What the next tokens may attend to, in each layer.

    Args:
        cache: With ragged layers.
        new: The number Q of the next tokens.

    Returns:
        [B, L, Q, M] bool for L layers, M the keys of the longest behind the update.
        A layer with fewer reads as many from the left.

    Raises:
        InputError: The cache comes from elsewhere, and its layers differ in length.
    """
    layers = _ragged_layers(cache)
    device = layers[0].padding.device
    lengths = torch.stack([torch.as_tensor(n.held()) for n in layers])
    padding = torch.stack([layer.padding for layer in layers], dim=1)
    longest = max(layer.get_mask_sizes(new)[0] for layer in layers)
    key = torch.arange(longest, device=device)
    query = lengths.to(device)[:, None] + torch.arange(new, device=device)
    return (key <= query[..., None]) & (key >= padding[..., None, None])


def _ragged_layers(cache: Cache) -> Sequence[Layer]:
    layers: list[Any] = cache.layers
    strange = {type(n).__name__ for n in layers if not isinstance(n, Layer)}
    if strange:
        raise InputError(
            "past_key_values",
            expected="a cache that this model filled",
            found=f"layers of type {', '.join(sorted(strange))}",
            fix="Start from an empty cache, with the whole conversation.",
        )
    return layers
