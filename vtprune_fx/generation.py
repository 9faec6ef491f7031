"""``model.generate`` with a pruned, compiled prefill and compiled decode steps."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel
from transformers.utils.output_capturing import maybe_install_capturing_hooks

from vtprune_fx.backend import vtprune_backend
from vtprune_fx.decoding import mark_dynamic, ragged_attention
from vtprune_fx.recipe import Recipe

Model = TypeVar("Model", bound=PreTrainedModel)


@contextlib.contextmanager
def pruned(
    model: Model, recipe: Recipe | None, inner: str = "inductor"
) -> Iterator[Model]:
    """Let a model prune its prompts for a while.

    Inside, ``model(...)`` and ``model.generate(...)`` run compiled: prompts with images
    pruned, decode steps on the ragged cache. One graph serves all prompt lengths, and
    one all decode steps.

    Args:
        model: An unmodified transformers model.
        recipe: What to cut, or None for the default that fits the model.
        inner: Name of the ``torch.compile`` backend that compiles the graphs.
    """
    _install_hooks(model)
    forward, is_own = model.forward, "forward" in vars(model)
    # torch types options as numbers, texts and functions; a backend takes any object.
    options: dict[str, Any] = {"recipe": recipe, "inner": inner}
    compiled = torch.compile(
        forward, backend=vtprune_backend, options=options, fullgraph=True
    )

    @functools.wraps(forward)
    def marked(*args: Any, **kwargs: Any) -> Any:
        _mark_dynamic(**kwargs)
        return compiled(*args, **kwargs)

    with ragged_attention(model):
        model.forward = marked
        try:
            yield model
        finally:
            if is_own:
                model.forward = forward
            else:
                del model.forward


def _mark_dynamic(
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    past_key_values: Cache | None = None,
    **_: object,
) -> None:
    """Mark what varies: the prompt's length, or in a decode step that of each cache."""
    if input_ids is not None and input_ids.shape[1] > 1:
        mark_dynamic(1, input_ids, attention_mask, position_ids)
    elif past_key_values is not None:
        mark_dynamic(1, attention_mask)
        # Any: layers of linear attention have no keys, but no pruned model has those.
        layers: list[Any] = past_key_values.layers
        for layer in layers:
            mark_dynamic(2, layer.keys, layer.values)


def _install_hooks(model: PreTrainedModel) -> None:
    """Let the parts of a model install the hooks that record hidden states.

    A first call would, under a lock that Dynamo cannot trace. Innermost models only: an
    outer one would install those of its parts a second time.
    """
    models = [part for part in model.modules() if isinstance(part, PreTrainedModel)]
    for part in models:
        if not any(inner in models for inner in part.modules() if inner is not part):
            maybe_install_capturing_hooks(part)
