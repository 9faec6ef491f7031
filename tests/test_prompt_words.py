"""Text that spells a placeholder does not become an image."""

from __future__ import annotations

from typing import Any

import pytest
from PIL import Image

from vtprune_fx.errors import InputError
from vtprune_fx.models.prompts import batch_inputs, prompt_inputs


class Processor:
    """What is read of a processor before it runs."""

    image_token = "<image>"
    video_token = "<video>"
    chat_template = None

    def __call__(self, **_: Any) -> Any:
        raise AssertionError("text with a placeholder reached the processor")


@pytest.mark.parametrize("words", ["<image> What is it?", "Is <video> a tag?"])
@pytest.mark.parametrize("images", [0, 1])
def test_words_that_spell_a_placeholder_are_refused(words: str, images: int) -> None:
    processor: Any = Processor()
    picture = Image.new("RGB", (4, 4))
    with pytest.raises(InputError, match="placeholder that the processor replaces"):
        prompt_inputs(processor, words, picture if images else None)
    with pytest.raises(InputError, match="placeholder that the processor replaces"):
        batch_inputs(processor, [("What is it?", []), (words, [picture] * images)])


@pytest.mark.parametrize("words", ["What is an image?", "< image > is a tag"])
def test_other_words_reach_the_processor(words: str) -> None:
    processor: Any = Processor()
    with pytest.raises(AssertionError, match="reached the processor"):
        prompt_inputs(processor, words, None)
