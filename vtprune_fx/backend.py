"""The ``torch.compile`` backend.

Call it by name or by itself, ``backend="vtprune"`` being the same::

    torch.compile(
        model, backend=vtprune_backend, options={"recipe": ...}, fullgraph=True
    )

The graph with the images is pruned and handed to an inner backend; every other graph
(text-only prompts, decode steps) goes there as it is.

The prompt length has to be dynamic: mark it, ``torch._dynamo.mark_dynamic(ids, 1)``.
The graph has to be whole: transformers checks the number of image placeholders with a
tensor, at which Dynamo breaks the graph unless ``fullgraph=True``.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._dynamo import lookup_backend
from torch.fx import GraphModule
from transformers.utils.output_capturing import maybe_install_capturing_hooks

from vtprune_fx.capture import lower
from vtprune_fx.errors import InputError
from vtprune_fx.literals import places_images
from vtprune_fx.passes import prune_graph
from vtprune_fx.recipe import Recipe, load_recipe

logger = logging.getLogger(__name__)

# A model's first call installs hooks, under a lock that Dynamo cannot trace. Installing
# them while it traces is as good.
torch.compiler.assume_constant_result(maybe_install_capturing_hooks)

_OPTIONS = ("recipe", "inner")


def vtprune_backend(
    module: GraphModule,
    example_inputs: list[Tensor],
    *,
    options: dict[str, Any] | None = None,
    **kwargs: Any,
) -> Callable[..., Any]:
    """Prune a graph and compile it with an inner backend.

    Args:
        module: Dynamo's graph.
        example_inputs: Dynamo's inputs.
        options: ``recipe``: a shipped name, a file, a ``Recipe``; left out, the default
            (``recipe.default``) stretched to the model, which is said once. ``inner``:
            name of the backend that compiles the pruned graph, "inductor" if left out.
        kwargs: For the inner backend.

    Raises:
        InputError: An option is unknown.
        RecipeError: The recipe cannot be loaded.
        AnatomyError: The graph lacks what pruning needs.
        PlanError: The recipe does not fit the graph.
    """
    options = dict(options or {})
    if unknown := sorted(options.keys() - set(_OPTIONS)):
        raise InputError(
            "torch.compile options",
            expected=" or ".join(_OPTIONS),
            found=", ".join(unknown),
            fix="Options of the inner backend are not passed on.",
        )
    inner = lookup_backend(options.get("inner", "inductor"))
    recipe = (
        load_recipe(options["recipe"]) if options.get("recipe") is not None else None
    )
    pruned = _prune(module, recipe)
    compiled: Callable[..., Any] = inner(pruned or module, example_inputs, **kwargs)
    return compiled


def _prune(module: GraphModule, recipe: Recipe | None) -> GraphModule | None:
    """The pruned graph, or None where nothing is pruned."""
    if not places_images(module):
        return None
    lowered = lower(module)
    report = prune_graph(lowered, recipe)
    logger.info("%s", report)
    return lowered if report.plan is not None else None
