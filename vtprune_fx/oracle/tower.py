"""The oracle's record of the vision tower, and VisionZip's merge, written in loops.

For LLaVA with a tower built like CLIP's. Shapes: I images, N tokens of the tower for
each, v visual tokens, m of them merged, w width of a head, h hidden size.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Protocol

import torch
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration, PreTrainedModel


class _Attention(Protocol):
    """What is read of a CLIP attention."""

    q_proj: nn.Module
    k_proj: nn.Module
    num_heads: int
    scale: float


class _Layer(Protocol):
    """What is read of a CLIP encoder layer."""

    layer_norm1: nn.Module
    self_attn: _Attention


@contextlib.contextmanager
def watched(model: PreTrainedModel) -> Iterator[Callable[[int], Tensor | None]]:
    """Record the selected layer of the tower, while a model encodes images.

    Yields:
        A function of v, to call afterwards. It returns [v, 1 + w] float32: for each
        patch the attention that it gets from the class token, sum over heads, or in a
        tower without one from all patches, mean over them; then its key, mean over
        heads. None where the model has no such tower, or encoded nothing.
    """
    layer, entered = _selected_layer(model), list[Tensor]()

    def note(_module: object, _inputs: object, normed: Tensor) -> None:
        entered.append(normed)

    def looked(visual: int) -> Tensor | None:
        if layer is None or not entered:
            return None
        return _looked(layer, entered[0], visual)

    hook = None if layer is None else layer.layer_norm1.register_forward_hook(note)
    try:
        yield looked
    finally:
        if hook is not None:
            hook.remove()


def _looked(layer: _Layer, entered: Tensor, visual: int) -> Tensor:
    """[v, 1 + w] for the inputs of the layer's attention, [I, N, ...]."""
    leading = entered.shape[1] - visual // len(entered)
    attention, found = layer.self_attn, []
    for normed in entered:
        query = _heads(attention.q_proj(normed), attention.num_heads)
        key = _heads(attention.k_proj(normed), attention.num_heads)
        logits = query @ key.transpose(1, 2) * attention.scale
        maps = logits.float().softmax(dim=2).sum(dim=0)
        received = maps[0] if leading else maps.mean(dim=0)
        looked = torch.cat((received[:, None], key.float().mean(dim=0)), dim=1)
        found.append(looked[leading:])
    return torch.cat(found)


def _selected_layer(model: PreTrainedModel) -> _Layer | None:
    """The layer of the tower whose output the features are, or None."""
    if not isinstance(model, LlavaForConditionalGeneration):
        return None
    encoder = getattr(model.model.vision_tower, "encoder", None)
    selected = model.config.vision_feature_layer
    if encoder is None or not isinstance(selected, int):
        return None
    # Hidden states are the embeddings', and then one a layer.
    layer: _Layer = encoder.layers[selected % (len(encoder.layers) + 1) - 1]
    return layer


def _heads(projected: Tensor, heads: int) -> Tensor:
    """[N, heads * w] -> [heads, N, w]."""
    return projected.view(len(projected), heads, -1).transpose(0, 1)


def merge(tokens: Tensor, keys: Tensor, new: int) -> Tensor:
    """Contextual tokens, in the order of their targets. [m, h] -> [new, h].

    Args:
        tokens: The hidden states that are merged, in the order of the prompt.
        keys: Their patches' keys. [m, w]
        new: How many tokens they become.
    """
    step = len(tokens) // new
    targets = [number * step for number in range(new)]
    joined: list[list[int]] = [[] for _ in targets]
    for token in range(len(tokens)):
        if token not in targets:
            likeness = torch.cosine_similarity(keys[token][None], keys[targets], dim=1)
            joined[int(likeness.argmax())].append(token)
    found = []
    for target, others in zip(targets, joined, strict=True):
        merged = tokens[target].float()
        if others:
            merged = merged + tokens[others].float().mean(dim=0)
        found.append(merged)
    return torch.stack(found).to(tokens.dtype)
