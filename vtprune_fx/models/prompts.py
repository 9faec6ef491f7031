"""Prompts and images as a model's inputs, and the greedy answer to them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from PIL import Image
from torch import Tensor
from transformers import ProcessorMixin

from vtprune_fx.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Sequence


def prompt_inputs(
    processor: ProcessorMixin, prompt: str, image: Image.Image | None
) -> dict[str, Tensor]:
    """A user's question as the model's inputs, by the processor's chat template.

    Args:
        processor: The model's processor.
        prompt: The question.
        image: What it is about, if anything.

    Returns:
        ``input_ids`` [1, S], ``attention_mask`` [1, S], and ``pixel_values``
        [1, 3, H, W] where there is an image.

    Raises:
        InputError: The question spells a placeholder.
    """
    check_words(processor, prompt)
    content = [{"type": "image"}] if image is not None else []
    turn: dict[str, Any] = {
        "role": "user",
        "content": [*content, {"type": "text", "text": prompt}],
    }
    if processor.chat_template is None:
        text = f"{image_token(processor)}\n{prompt}" if image is not None else prompt
    else:
        text = processor.apply_chat_template([turn], add_generation_prompt=True)
    inputs = processor(images=image, text=text, return_tensors="pt")
    return {name: inputs[name] for name in inputs}


def batch_inputs(
    processor: ProcessorMixin,
    prompts: Sequence[tuple[str, Sequence[Image.Image]]],
) -> dict[str, Tensor]:
    """Questions about images as one batch, padded on the left.

    Args:
        processor: The model's processor.
        prompts: What is asked, and the images that it is about, which stand before it.

    Returns:
        What the model takes: ``input_ids`` and ``attention_mask`` [B, S],
        ``pixel_values``.

    Raises:
        InputError: A question spells a placeholder.
    """
    texts = []
    for text, images in prompts:
        check_words(processor, text)
        content = [{"type": "image"} for _ in images]
        turn: Any = {"role": "user", "content": [*content, {"type": "text"}]}
        turn["content"][-1]["text"] = text
        if processor.chat_template is None:
            texts.append(f"{image_token(processor)}\n" * len(images) + text)
        else:
            texts.append(
                processor.apply_chat_template([turn], add_generation_prompt=True)
            )
    inputs = processor(
        images=[image for _, images in prompts for image in images],
        text=texts,
        return_tensors="pt",
        padding=True,
        padding_side="left",
    )
    return {name: inputs[name] for name in inputs}


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
    concrete: Any = processor  # each has one, but their base class declares none
    return str(concrete.image_token)


def continued(model: Any, inputs: dict[str, Tensor], max_new_tokens: int) -> list[int]:
    """The ids that greedy decoding appends to a single prompt.

    Args:
        model: Anything with transformers' ``generate``.
        inputs: ``input_ids`` [1, S] and what goes with them.
        max_new_tokens: Tokens at most.
    """
    ids = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    new: list[int] = ids[0, inputs["input_ids"].shape[1] :].tolist()
    return new
