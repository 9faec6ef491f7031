"""One question, one answer: what ``vtprune generate`` does."""

from __future__ import annotations

from pathlib import Path

from PIL import Image
from transformers import ProcessorMixin

from vtprune_fx.errors import InputError
from vtprune_fx.export import is_export, load
from vtprune_fx.generation.compile import pruned
from vtprune_fx.models.loading import load_model, load_processor
from vtprune_fx.models.pictures import open_image
from vtprune_fx.models.prompts import continued, prompt_inputs
from vtprune_fx.recipes.loading import load_recipe


def answer(
    model: str,
    prompt: str,
    image: Path | None,
    recipe: str | None,
    max_new_tokens: int,
    inner: str,
) -> str:
    """Answer a question about an image.

    Args:
        model: An exported folder, a checkpoint folder, or a hub id.
        prompt: The question.
        image: An image file, if any.
        recipe: Shipped name or file; None for an exported folder.
        max_new_tokens: Tokens at most.
        inner: The ``torch.compile`` backend for a checkpoint.

    Raises:
        VtpruneError: An argument is not usable; the subclass says which.
    """
    picture = open_image(image) if image is not None else None
    exported = is_export(Path(model))
    if exported and recipe is not None:
        raise InputError(
            "--recipe",
            expected="none for an exported folder, whose graphs are pruned already",
            found=recipe,
            fix="Omit it, or export again with this recipe.",
        )
    if exported:
        return _exported(Path(model), prompt, picture, max_new_tokens)
    loaded = load_recipe(recipe) if recipe is not None else None
    processor = load_processor(model)
    inputs = prompt_inputs(processor, prompt, picture)
    with pruned(load_model(model), loaded, inner) as compiled:
        return _say(processor, continued(compiled, inputs, max_new_tokens))


def _exported(
    folder: Path, prompt: str, picture: Image.Image | None, max_new_tokens: int
) -> str:
    model, processor = load(folder), load_processor(folder)
    inputs = prompt_inputs(processor, prompt, picture)
    return _say(processor, continued(model, inputs, max_new_tokens))


def _say(processor: ProcessorMixin, ids: list[int]) -> str:
    return str(processor.decode(ids, skip_special_tokens=True)).strip()
