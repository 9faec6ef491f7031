"""``compile``: a model whose prompts are pruned, ready for ``model.generate``."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import TypeVar

from torch import nn
from transformers import PreTrainedModel

from vtprune_fx.backend import inner_compiler
from vtprune_fx.errors import InputError
from vtprune_fx.generation.forward import PrunedForward
from vtprune_fx.generation.wrappers import (
    check_can_prune,
    forward_of,
    inner_model,
    layers_of,
)
from vtprune_fx.models.ragged_attention import (
    check_decoder,
)
from vtprune_fx.passes import ExtraPass
from vtprune_fx.planning.place import check_layers
from vtprune_fx.planning.report import PruneReport
from vtprune_fx.recipes.loading import load_recipe
from vtprune_fx.recipes.schema import Recipe

Model = TypeVar("Model", bound=nn.Module)


def compile(
    model: Model,
    recipe: Recipe | str | None = None,
    *,
    inner: str = "inductor",
    mode: str | None = None,
    decode: bool = True,
    passes: Sequence[ExtraPass] = (),
) -> Model:
    """Let a model prune its prompts, compiled, until ``undo``.

    ``model(...)`` and ``model.generate(...)`` then run as ever: prompts with images
    pruned, what follows on the ragged cache. One graph serves all prompt lengths, and
    one all decode steps. Greedy, sampling, assistants, beams, several sequences, left
    padding, streaming and further turns, which are not pruned,
    work as in transformers; with ``cache_implementation="static"`` every layer is
    allocated at its pruned length and the new tokens. ``docs/limits.md`` lists what is
    refused, when it is asked for; that changes nothing for the next call.

    Where a recipe looks at the vision tower (VisionZip) the tower is part of the
    compiled prompt, and beams and several sequences take one image a prompt.

    Args:
        model: An unmodified transformers model, or a ``PeftModel`` of one.
        recipe: What to cut: a recipe, a shipped name, a file, or None for the default
            that fits the model.
        inner: Name of the ``torch.compile`` backend that compiles the graphs.
        mode: Mode of inductor: ``reduce-overhead``, ``max-autotune``, ...
        decode: Whether steps on a filled cache are compiled too, or run eagerly.
        passes: Further passes for pruned prompts, as ``vtprune_fx.prune`` takes them.

    Returns:
        The model.

    Raises:
        InputError: The model prunes already, is wrapped so that it could not, or its
            decoder cannot be pruned; or there is no such backend or mode.
        RecipeError: The recipe cannot be loaded.
        PlanError: The recipe cuts at layers that the model does not have.
    """
    bare = inner_model(model)
    _check(bare)
    loaded = load_recipe(recipe) if recipe is not None else None
    if loaded is not None:
        check_layers(loaded, bare.config.get_text_config().num_hidden_layers)
    compiler = inner_compiler(inner, mode)
    options = {"inner": compiler, "mode": mode, "passes": passes}
    PrunedForward(bare, loaded, options, decode).attach()
    return model


def _check(model: PreTrainedModel) -> None:
    if _pruned_forward(model) is not None:
        raise InputError(
            type(model).__name__,
            expected="a model as it was loaded",
            found="one that prunes already",
            fix="Call vtprune_fx.undo(model) first.",
        )
    check_can_prune(model)
    check_decoder(model.config.get_text_config())


def _pruned_forward(model: PreTrainedModel) -> PrunedForward | None:
    """What ``compile`` set on a model, inside of what others wrapped around it."""
    for function in layers_of(forward_of(model)):
        if isinstance(function, PrunedForward):
            return function
    return None


def undo(model: Model) -> Model:
    """Make a model what it was before ``compile``; any other model is not changed.

    Returns:
        The model.

    Raises:
        InputError: Another library wrapped the model's ``forward`` since, or this is no
            model of transformers.
    """
    bare = inner_model(model)
    found = _pruned_forward(bare)
    if found is None:
        return model
    if next(layers_of(forward_of(bare))) is not found:
        raise InputError(
            f"{type(bare).__name__}.forward",
            expected="what vtprune_fx.compile set",
            found="another function around it, as accelerate sets it",
            fix="Take that off first, as by accelerator.unwrap_model(model, "
            "keep_fp32_wrapper=False).",
        )
    found.detach()
    return model


@contextlib.contextmanager
def pruned(
    model: Model, recipe: Recipe | None, inner: str = "inductor"
) -> Iterator[Model]:
    """Let a model prune its prompts for a while: ``compile``, then ``undo``."""
    compile(model, recipe, inner=inner)
    try:
        yield model
    finally:
        undo(model)


@contextlib.contextmanager
def schedule(model: nn.Module, recipe: Recipe | str | float) -> Iterator[Recipe]:
    """Let a compiled model drop other numbers of tokens for a while.

    ``compile`` fixes at which layers tokens are dropped and by what score; how many is
    an input of its graphs, so none is made anew. The keyword ``schedule`` of
    ``model.generate`` does it for one call.

    Args:
        model: A model that ``compile`` returned, with a recipe of counts or shares that
            makes no new tokens, and without a mode.
        recipe: A recipe, a shipped name or a file, with the same score and positions,
            and cuts at some of the compiled recipe's places; or a budget: the share of
            the visual tokens' MACs to save, from 0, which keeps all tokens, to what the
            compiled recipe's cuts can save. Its drops are then scaled by one factor.

    Yields:
        The recipe that prompts run with.

    Raises:
        InputError: The model was not compiled, has no such cuts, or its numbers are
            fixed; or the budget is out of reach.
        RecipeError: The recipe cannot be loaded.
    """
    with _compiled(model).scheduled(recipe) as now:
        yield now


def report_of(model: nn.Module) -> PruneReport | None:
    """What was cut where in a compiled model's last prompt with images.

    Returns:
        The report, with the keep sets of that prompt, or None if there was none yet.

    Raises:
        InputError: The model was not compiled.
    """
    return _compiled(model).report


def _compiled(model: nn.Module) -> PrunedForward:
    """What ``compile`` set on a model.

    Raises:
        InputError: The model was not compiled.
    """
    forward = _pruned_forward(inner_model(model))
    if forward is None:
        raise InputError(
            type(model).__name__,
            expected="a model that vtprune_fx.compile returned",
            found="one that does not prune",
            fix="Compile it, and run a prompt with an image.",
        )
    return forward
