"""Arguments of a prompt: parted, marked for Dynamo, and checked."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from transformers import Cache, PreTrainedModel

from vtprune_fx.errors import InputError
from vtprune_fx.models.encoding import FEATURES, token_axis
from vtprune_fx.models.placeholders import visual_token_ids
from vtprune_fx.models.ragged_attention import mark_dynamic
from vtprune_fx.models.ragged_cache import RaggedLayer, RaggedStaticLayer

logger = logging.getLogger(__name__)

_ROWS = 2
"""Axes of features of images of any size, [N, E]. Images or videos of one size come
as [I, N, E], and some models take each of them by itself."""

Arguments = dict[str, Any]
"""What a model's ``forward`` is called with, by name."""


def without(signature: inspect.Signature, name: str) -> inspect.Signature:
    """A signature that lacks a parameter.

    ``generate`` reads it to learn whether it should encode images by itself.
    """
    parameters = signature.parameters.values()
    return signature.replace(parameters=[p for p in parameters if p.name != name])


def parted(named: Arguments, prompt: int, cache: str) -> tuple[Arguments, Arguments]:
    """Arguments of a prompt, and of what follows it in the same call.

    Args:
        named: Arguments for both.
        prompt: S, the prompt's tokens.
        cache: Name of the cache, which the prompt gets.
    """
    shape = named["input_ids"].shape[:2]
    axes = {name: token_axis(value, shape) for name, value in named.items()}
    along = {name: axis for name, axis in axes.items() if axis is not None}
    options = {
        n: v for n, v in named.items() if not isinstance(v, Tensor) and n != cache
    }
    first = dict(named)
    more = {n: v for n, v in options.items() if n != FEATURES}
    for name, axis in along.items():
        value = named[name]
        first[name] = value.narrow(axis, 0, prompt)
        more[name] = value.narrow(axis, prompt, shape[1] - prompt)
    return first, more | {"logits_to_keep": 0}


def refuse_mixed_up(ids: Tensor, pixels: Tensor) -> None:
    """Refuse prompts that ``generate`` repeated, with several images each.

    It repeats every image by itself, so that they no longer stand in the prompts'
    order.

    Args:
        ids: [B, S].
        pixels: [I, ...].
    """
    twice = (ids[1:] == ids[:-1]).all(dim=1).any()
    seen_twice = (pixels[1:] == pixels[:-1]).flatten(1).all(dim=1).any()
    if len(pixels) > len(ids) and bool(twice & seen_twice):
        raise InputError(
            "prompts",
            expected="one image in each, to be repeated for beams or sequences by a "
            "recipe that looks at the vision tower",
            found=f"{len(pixels)} images in {len(ids)} prompts",
            fix="Generate greedily, or use another recipe.",
        )


def first_given(named: Arguments, *names: str) -> Tensor:
    """The first of these arguments that is given."""
    found: Tensor = next(v for v in map(named.get, names) if v is not None)
    return found


def mark_prompt(named: Arguments, *, fixed: bool = False) -> None:
    """Let a prompt's length and its features' number vary; one token is a step's.

    The number of features is no symbol that a graph may be specialised to: models write
    it into the message of a check, which would make a graph for each number.

    Args:
        named: Arguments of the model.
        fixed: Let there be a graph for each number of features.
    """
    prompt = first_given(named, "input_ids", "inputs_embeds").shape[:2]
    for value in named.values():
        axis = token_axis(value, prompt)
        if axis is not None and prompt[1] > 1:
            mark_dynamic(axis, value)
    features: dict[str, object] = named.get(FEATURES) or {}
    for kind, parts in features.items():
        for part in pytree.tree_leaves(parts):
            if part.dim() == _ROWS and not fixed:
                torch._dynamo.decorators.mark_unbacked(part, 0, shape_id=kind)
            else:
                torch._dynamo.maybe_mark_dynamic(part, 0)


def mark_step(cache: Cache, mask: Tensor) -> None:
    """Let the number of cached and of new tokens vary; one new token is a step's.

    Args:
        cache: A ragged one. Its keys and values become contiguous: a prompt's are laid
            out otherwise, for which the first step would need another graph.
        mask: [B, layers, Q, K].
    """
    layers: Sequence[object] = cache.layers
    if not any(isinstance(layer, RaggedStaticLayer) for layer in layers):
        mark_dynamic(3, mask)
    if mask.shape[2] > 1:
        mark_dynamic(2, mask)
    for layer in layers:
        if isinstance(layer, RaggedLayer):
            layer.make_contiguous()
            mark_dynamic(2, layer.keys, layer.values)


def without_room(named: Arguments) -> Tensor | None:
    """[B, S]: a prompt's mask, where ``generate`` made one for all of a static cache.

    That is causal, so its last row has all the padding: [B, 1, S, M] with M > S.
    """
    mask: Tensor | None = named.get("attention_mask")
    if mask is None or mask.dim() == 2:
        return mask
    return mask[:, 0, -1, : mask.shape[2]].long()


def visual_ids(model: PreTrainedModel) -> list[int]:
    """Ids of the placeholders of images and videos."""
    found = list(visual_token_ids(model.config))
    if not found:
        logger.warning(
            "%s has no visual tokens: it is compiled, not pruned.", type(model).__name__
        )
    return found
