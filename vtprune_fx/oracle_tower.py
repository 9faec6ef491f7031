"""The oracle's look into the vision tower, and VisionZip's merge, written out in loops.

For towers built like CLIP's. Shapes: I images, N tokens of the tower for each, v visual
tokens, m of them merged, w width of a head, h hidden size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration


def encode(
    model: LlavaForConditionalGeneration, pixel_values: Tensor
) -> tuple[Tensor, Tensor]:
    """Encode images, and look at the layer of the tower that is selected.

    Args:
        model: The model.
        pixel_values: [I, 3, height, width]

    Returns:
        The projector's outputs [v, h]; and for each patch, in float32, the attention
        that it gets from the class token, sum over heads, or in a tower without one
        from all patches, mean over them; behind that its key, mean over heads.
        [v, 1 + w]
    """
    layer, entered = _selected_layer(model), list[Tensor]()
    hook = layer.layer_norm1.register_forward_hook(
        lambda _module, _inputs, normed: entered.append(normed)
    )
    try:
        encoded = model.get_image_features(pixel_values=pixel_values, return_dict=True)
    finally:
        hook.remove()
    images = list(encoded.pooler_output)
    leading = entered[0].shape[1] - len(images[0])
    attention, found = layer.self_attn, []
    for normed in entered[0]:
        query = _heads(attention.q_proj(normed), attention.num_heads)
        key = _heads(attention.k_proj(normed), attention.num_heads)
        logits = query @ key.transpose(1, 2) * attention.scale
        maps = logits.float().softmax(dim=2).sum(dim=0)
        received = maps[0] if leading else maps.mean(dim=0)
        looked = torch.cat((received[:, None], key.float().mean(dim=0)), dim=1)
        found.append(looked[leading:])
    return torch.cat(images), torch.cat(found)


def _selected_layer(model: LlavaForConditionalGeneration) -> Any:
    """The layer of the tower whose output the features are."""
    layers: Any = model.model.vision_tower.encoder.layers
    selected: Any = model.config.vision_feature_layer
    # Hidden states are the embeddings', and then one a layer.
    return layers[selected % (len(layers) + 1) - 1]


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
