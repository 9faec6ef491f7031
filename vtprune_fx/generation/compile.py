"""``compile``: a model whose prompts are pruned, ready for ``model.generate``."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import TypeVar

from transformers import PreTrainedModel

from vtprune_fx.backend import inner_compiler
from vtprune_fx.errors import InputError
from vtprune_fx.generation.forward import PrunedForward, forward_of
from vtprune_fx.models.ragged_attention import (
    check_decoder,
)
from vtprune_fx.passes import ExtraPass
from vtprune_fx.planning.report import PruneReport
from vtprune_fx.recipes.loading import load_recipe
from vtprune_fx.recipes.schema import Recipe

Model = TypeVar("Model", bound=PreTrainedModel)


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
    one all decode steps. Greedy, sampling, beams, several sequences, batches with
    padding in front, streaming and further turns on the cache work as in transformers;
    with ``cache_implementation="static"`` every layer is allocated at its own pruned
    length and the new tokens.

    A further turn on a filled cache is not pruned.

    Where a recipe looks at the vision tower (VisionZip) the tower is part of the
    compiled prompt; ``generate`` then does not encode images ahead of it. Beams and
    several sequences take prompts with one image at most.

    Args:
        model: An unmodified transformers model.
        recipe: What to cut: a recipe, a shipped name, a file, or None for the default
            that fits the model.
        inner: Name of the ``torch.compile`` backend that compiles the graphs.
        mode: Mode of inductor: ``reduce-overhead``, ``max-autotune``, ...
        decode: Whether steps on a filled cache are compiled too, or run eagerly.
        passes: Further passes for pruned prompts, as ``vtprune_fx.prune`` takes them.

    Returns:
        The model.

    Raises:
        InputError: The model is compiled already, ``ragged_attention.check_decoder``
            refuses it, or there is no such backend or mode.
        RecipeError: The recipe cannot be loaded.
    """
    if isinstance(forward_of(model), PrunedForward):
        raise InputError(
            type(model).__name__,
            expected="a model as it was loaded",
            found="one that prunes already",
            fix="Call vtprune_fx.undo(model) first.",
        )
    check_decoder(model.config.get_text_config())
    loaded = load_recipe(recipe) if recipe is not None else None
    compiler = inner_compiler(inner, mode)
    options = {"recipe": loaded, "inner": compiler, "passes": passes}
    model.forward = PrunedForward(model, options, decode)
    return model


def undo(model: Model) -> Model:
    """Make a model what it was before ``compile``; a model that was not is left alone.

    Returns:
        The model.
    """
    forward = forward_of(model)
    if isinstance(forward, PrunedForward):
        forward.give_back(model)
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


def report_of(model: PreTrainedModel) -> PruneReport | None:
    """What was cut where in a compiled model's last prompt with images.

    Returns:
        The report, with the keep sets of that prompt, or None if there was none yet.

    Raises:
        InputError: The model was not compiled.
    """
    forward = forward_of(model)
    if not isinstance(forward, PrunedForward):
        raise InputError(
            type(model).__name__,
            expected="a model that vtprune_fx.compile returned",
            found="one that does not prune",
            fix="Compile it, and run a prompt with an image.",
        )
    return forward.report
