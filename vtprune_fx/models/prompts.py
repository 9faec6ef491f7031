"""Prompts and images as a model's inputs, and the greedy answer to them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, cast

from PIL import Image
from torch import Tensor
from transformers import PreTrainedModel, ProcessorMixin

from vtprune_fx.errors import InputError, first_sentence

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


def prompt_inputs(
    processor: ProcessorMixin, prompt: str, image: Image.Image | None
) -> dict[str, Tensor]:
    """A user's question as the model's inputs, by the processor's chat template.

    Args:
        processor: The model's processor.
        prompt: The question.
        image: The image that it is about, or None.

    Returns:
        ``input_ids`` [1, S], ``attention_mask`` [1, S], and ``pixel_values``
        [1, 3, H, W] where there is an image.

    Raises:
        InputError: The question spells a placeholder, or the template fails.
    """
    text = _text(processor, prompt, 0 if image is None else 1)
    inputs = processor(images=image, text=text, return_tensors="pt")
    return {name: inputs[name] for name in inputs}


def batch_inputs(
    processor: ProcessorMixin,
    prompts: Sequence[tuple[str, Sequence[Image.Image]]],
) -> dict[str, Tensor]:
    """Questions about images as one batch, padded on the left.

    Args:
        processor: The model's processor.
        prompts: Questions, each with its images, which come before the text.

    Returns:
        What the model takes: ``input_ids`` and ``attention_mask`` [B, S],
        ``pixel_values``.

    Raises:
        InputError: A question spells a placeholder, or the template fails.
    """
    inputs = processor(
        images=[image for _, images in prompts for image in images],
        text=[_text(processor, text, len(images)) for text, images in prompts],
        return_tensors="pt",
        padding=True,
        padding_side="left",
    )
    return {name: inputs[name] for name in inputs}


def _text(processor: ProcessorMixin, prompt: str, images: int) -> str:
    """The text of a user's turn that starts with so many images.

    Raises:
        InputError: The prompt spells a placeholder, or the template fails.
    """
    check_words(processor, prompt)
    if processor.chat_template is None:
        return f"{image_token(processor)}\n" * images + prompt if images else prompt
    content = [{"type": "image"}] * images + [{"type": "text", "text": prompt}]
    turn: dict[str, object] = {"role": "user", "content": content}
    template = cast("_Template", processor.apply_chat_template)
    try:
        return template([turn], add_generation_prompt=True)
    except Exception as error:  # templates are programs: whatever they raise
        raise InputError(
            "chat template of the processor",
            expected=f"one that takes a user's turn with {images} images and a text",
            found=f"{type(error).__name__}: {first_sentence(error)}",
            fix="Save the processor of the model's author, or set "
            "processor.chat_template = None to put images before the text.",
        ) from error


class _Template(Protocol):
    """A chat template, whose content transformers types as plain text."""

    def __call__(
        self, turns: list[dict[str, object]], *, add_generation_prompt: bool
    ) -> str: ...


def check_words(processor: ProcessorMixin, text: str) -> None:
    """Refuse a user's text that spells a placeholder: it would stand for an image.

    Raises:
        InputError: It does, or it holds half a character.
    """
    if not text.isascii():
        _check_whole(text)
    names = ("image_token", "video_token", "audio_token")
    given = [getattr(processor, name, None) for name in names]
    spelt = [token for token in given if isinstance(token, str) and token in text]
    if spelt:
        raise InputError(
            "prompt",
            expected="words alone; the chat template places the images",
            found=f"{spelt[0]!r}, the placeholder that the processor replaces",
            fix="Leave it out, or write it with a space inside.",
        )


def _check_whole(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            "prompt",
            expected="text",
            found=f"half a character at {error.start} (a lone surrogate)",
            fix="Pass the prompt in UTF-8.",
        ) from error


def image_token(processor: ProcessorMixin) -> str:
    """The placeholder that stands for an image in a prompt."""
    # Each has one, but their base class declares none.
    return str(cast("_HasImageToken", processor).image_token)


class _HasImageToken(Protocol):
    image_token: str


class Generates(Protocol):
    """A model with transformers' ``generate``."""

    @property
    def generate(self) -> Callable[..., Tensor]:
        """Maps inputs and options to ids [B, S + new]."""


def continued(
    model: PreTrainedModel | Generates,
    inputs: dict[str, Tensor],
    max_new_tokens: int,
) -> list[int]:
    """The ids that greedy decoding appends to a single prompt.

    Args:
        model: A model with transformers' ``generate``.
        inputs: ``input_ids`` [1, S] and the other inputs.
        max_new_tokens: Tokens at most.
    """
    # Only some classes of transformers' models declare the method.
    generate = cast("Generates", model).generate
    ids = generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    new: list[int] = ids[0, inputs["input_ids"].shape[1] :].tolist()
    return new
