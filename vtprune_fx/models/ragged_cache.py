"""Caches whose layers hold different numbers of tokens, on transformers' classes.

After a pruned prefill layers hold different numbers of keys, and samples have
different padding in each layer: a prompt of text alone lost padding where
others lost visual tokens. So every layer knows its padding, and one mask is made for
all layers, ``attention_mask``, of which ``ragged_attention.ragged_sdpa`` reads its
layer's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer, QuantizedLayer, StaticLayer

from vtprune_fx.errors import InputError


@dataclass(frozen=True)
class ImageSpan:
    """Where a batch of prompts has visual tokens.

    Attributes:
        first: The first position at which a sample has one.
        last: The last such position.
    """

    first: int
    last: int


@dataclass(frozen=True)
class Prompt:
    """What a cache must know of the prompts that filled it.

    Attributes:
        came: S, tokens of each, padding included.
        padding: [B] int64: so many of them, at the start, are padding.
        visual: [B] int64: so many of them are visual tokens.
        images: Where these are; None without any.
    """

    came: int
    padding: Tensor
    visual: Tensor
    images: ImageSpan | None

    @classmethod
    def of(cls, places: Tensor, attention_mask: Tensor | None) -> Prompt:
        """Read it off a batch of prompts.

        Args:
            places: [B, S] bool: which tokens are visual.
            attention_mask: [B, S], 0 at padding; None without padding.

        Raises:
            InputError: Padding stands elsewhere than before a prompt.
        """
        visual = places.sum(dim=1)
        where = places.any(dim=0).nonzero().flatten().tolist()
        images = ImageSpan(where[0], where[-1]) if where else None
        padding = _padding_before(attention_mask, visual)
        return cls(places.shape[1], padding, visual, images)


class _Ragged:
    """What both kinds of layers know of the prompt that filled them.

    Attributes:
        padding: [B] int64: so many of the layer's first tokens are padding.
        dropped: Tokens that were dropped before the layer.
        images: Where the prompt had visual tokens; None if none was dropped anywhere.
        shifted: Whether a sample lost padding in some layer.
    """

    padding: Tensor
    dropped: int
    images: ImageSpan | None = None
    shifted: bool = False

    def held(self) -> int:
        """Tokens in the layer; a tensor where the layer is static."""
        raise NotImplementedError

    def remove(self, tokens: int) -> None:
        """Remove so many of the last tokens that the layer holds."""
        raise NotImplementedError

    def get_seq_length(self) -> int:
        """Tokens that came: what ``generate`` goes on from."""
        return self.held() + self.dropped

    def crop(self, tokens_to_remove: int) -> None:
        """Go back to before the last tokens of those that came.

        Args:
            tokens_to_remove: Their number, negative; or, as in transformers 5.23, the
                number of tokens to go back to, positive.

        Raises:
            InputError: That is a place among the prompt's images.
        """
        came = int(self.get_seq_length())
        left = came + tokens_to_remove if tokens_to_remove <= 0 else tokens_to_remove
        left = min(max(left, 0), came)
        if self.images is not None and left <= self.images.last:
            if left > self.images.first or (self.shifted and left):
                raise _among_images(self.images, left)
            self.remove(int(self.held()) - left)
            self.images, self.dropped = None, 0
        else:
            self.remove(came - left)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Take over each beam's best sample."""
        super().reorder_cache(beam_idx)  # type: ignore[misc] # the layer's
        self.padding = self.padding.index_select(0, beam_idx.to(self.padding.device))


class RaggedLayer(_Ragged, DynamicLayer):
    """Keys and values of one layer, and how much of them is padding."""

    def __init__(
        self, keys: Tensor, values: Tensor, padding: Tensor, dropped: int
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call] # not seen as transformers'
        self.lazy_initialization(keys, values)
        self.keys, self.values, self.padding = keys, values, padding
        self.dropped = dropped

    def held(self) -> int:
        """Tokens in the layer."""
        return DynamicLayer.get_seq_length(self)

    def remove(self, tokens: int) -> None:
        """Remove so many of the last tokens that the layer holds."""
        assert self.keys is not None
        assert self.values is not None
        end = self.held() - tokens
        self.keys, self.values = self.keys[:, :, :end], self.values[:, :, :end]

    def make_contiguous(self) -> None:
        """Lay keys and values out as a step does, [B, heads, tokens, width]."""
        assert self.keys is not None
        assert self.values is not None
        self.keys, self.values = self.keys.contiguous(), self.values.contiguous()

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """The layer's keys once so many more are there, and where they start."""
        return self.held() + query_length, 0

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each sample."""
        super().batch_repeat_interleave(repeats)
        self.padding = self.padding.repeat_interleave(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some samples."""
        super().batch_select_indices(indices)
        self.padding = self.padding[indices]


class RaggedStaticLayer(_Ragged, StaticLayer):
    """The same, with room for so many tokens more: addresses and sizes never change."""

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
        return StaticLayer.get_seq_length(self)

    def remove(self, tokens: int) -> None:
        """Go back by so many tokens; what stands there is written over later."""
        self.cumulative_length.sub_(tokens)


Layer = RaggedLayer | RaggedStaticLayer


def length_of(cache: Cache | None) -> int:
    """Tokens that came: those of the first layer, and what was dropped before it."""
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
    prompt: Prompt,
    room: int | None = None,
    lost: Sequence[Tensor] | None = None,
) -> None:
    """Give a cache ragged layers, in place.

    Args:
        cache: Filled by a prefill, pruned or not.
        prompt: What filled it.
        room: Tokens that each layer will have room for, its cuts apart; None for
            layers that grow.
        lost: Where each sample drops its share, [B] for each layer: how many visual
            tokens it dropped before it.
    """
    layers: list[Any] = cache.layers
    for index, layer in enumerate(layers):
        dropped = prompt.came - layer.keys.shape[2]
        # Where a sample had too few visual tokens, it lost padding in their place.
        padding = prompt.padding - (dropped - prompt.visual).clamp(min=0)
        if lost is not None:
            padding = prompt.padding - dropped + lost[index]
        if room is None:
            layers[index] = RaggedLayer(layer.keys, layer.values, padding, dropped)
        else:
            layers[index] = RaggedStaticLayer(
                layer.keys, layer.values, padding, dropped, more=room - prompt.came
            )
    ragged: Sequence[Layer] = layers
    if any(layer.dropped for layer in ragged):
        shifted = any(not torch.equal(n.padding, prompt.padding) for n in ragged)
        for layer in ragged:
            layer.images, layer.shifted = prompt.images, shifted


def _among_images(images: ImageSpan, left: int) -> InputError:
    return InputError(
        "cache.crop",
        expected=f"at most {images.first} tokens left, before the prompt's images, or "
        f"more than {images.last}, after them",
        found=f"{left}",
        fix="Visual tokens were dropped, so the cache has no such prefix. Start from "
        "an empty cache.",
    )


def _padding_before(attention_mask: Tensor | None, visual: Tensor) -> Tensor:
    """[B] int64: tokens of padding in each sample of a prompt."""
    if attention_mask is None:
        return torch.zeros_like(visual)
    if attention_mask.dim() != 2:
        raise InputError(
            "attention_mask",
            expected="0 and 1 for each token of each prompt, [batch, prompt]",
            found=f"shape {list(attention_mask.shape)}",
            fix="Pass the processor's.",
        )
    check_padding(attention_mask)
    return (~attention_mask.bool()).sum(dim=1)


def check_padding(attention_mask: Tensor | None) -> None:
    """Refuse padding that stands elsewhere than before all tokens of a sample.

    Args:
        attention_mask: [B, S], 0 at padding; None and other shapes have none to judge.

    Raises:
        InputError: It does.
    """
    if attention_mask is None or attention_mask.dim() != 2:
        return
    attended = attention_mask.bool()
    if bool((attended[:, :-1] & ~attended[:, 1:]).any()):
        raise InputError(
            "attention_mask",
            expected="padding before each prompt",
            found="padding after or inside of one",
            fix="Set processor.tokenizer.padding_side = 'left' to generate. In later "
            "turns all samples of a batch must be equally long.",
        )


def attention_mask(cache: Cache, new: int) -> Tensor:
    """What the next tokens may attend to, in each layer.

    Args:
        cache: With ragged layers.
        new: The number Q of the next tokens.

    Returns:
        [B, L, Q, M] bool for L layers, M the keys of the longest after the update.
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
            fix="Start from an empty cache, with the full conversation.",
        )
    return layers
