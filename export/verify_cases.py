"""Prompts that an export is checked on: at random, and at the limits of what fits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from vtprune_fx.export.manifest import Manifest

FOLLOWING = 3
"""Tokens that follow each prompt."""

NEW_TOKENS = 8
"""Tokens that are generated."""

ANSWERED = "two, answered"
"""The case whose prompts are answered too."""

Shape = tuple[int, ...]
"""Text tokens of a prompt before, between and after its images."""


@dataclass(frozen=True, eq=False)
class Case:
    """One batch.

    Attributes:
        name: What is special about it.
        inputs: As a processor gives them, padded on the left.
        following: Tokens that come on the cache. [B, FOLLOWING]
        new_tokens: Tokens that ``generate`` shall add to each prompt.
    """

    name: str
    inputs: dict[str, Tensor]
    following: Tensor
    new_tokens: int = 0

    @property
    def has_images(self) -> bool:
        """Whether it is pruned."""
        return "pixel_values" in self.inputs


def draw_cases(
    model: LlavaForConditionalGeneration, contents: Manifest, seed: int
) -> Iterator[Case]:
    """Draw a batch of each kind that an export takes.

    Args:
        model: The model that was exported.
        contents: The export's manifest.
        seed: Of texts and images.
    """
    drawing = _Drawing(model, contents, seed)
    for name, shapes in _shapes(contents, drawing.per_image).items():
        case = drawing.case(name, shapes)
        if case is not None:
            yield case


def _shapes(contents: Manifest, per_image: int) -> dict[str, list[Shape]]:
    recipe, visual = contents.recipe, contents.visual_tokens
    # As many images as the example had; between two stands one token of text.
    more = (1,) * (visual // per_image - 1)
    # Two tokens must be left, and text must follow the images.
    least = max(1, recipe.needed(visual) + 2 - visual - len(more))
    cases: dict[str, list[Shape]] = {
        "one": [(5, *more, 9)],
        "the shortest": [(0, *more, least)],
        ANSWERED: [(3, *more, 12), (1, *more, 2)],
        "four, padded": [(3, *more, 20), (0, *more, 4), (12, *more, 2), (1, *more, 1)],
        "one more image": [(3, 4, *more, 6)],
        "text alone": [(14,), (5,)],
    }
    if recipe.of is not None:  # counts on the number of visual tokens
        del cases["one more image"]
    return cases


class _Drawing:
    def __init__(
        self, model: LlavaForConditionalGeneration, contents: Manifest, seed: int
    ) -> None:
        vision: Any = model.config.vision_config
        self._image = (3, vision.image_size, vision.image_size)
        self._words = int(model.config.get_text_config().vocab_size)
        self._contents = contents
        self._generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            seen = model.get_image_features(
                pixel_values=torch.zeros(1, *self._image), return_dict=True
            )
        self.per_image = sum(len(features) for features in seen.pooler_output)

    def case(self, name: str, shapes: list[Shape]) -> Case | None:
        """A batch, in the export's sizes where they are fixed; None if it is longer."""
        batch, prompt = self._contents.batch, self._contents.prompt
        if self._contents.recipe.adaptive:
            batch = 1  # counts by rank: prompts run one by one
        if batch is not None:
            shapes = (shapes * batch)[:batch]
        rows = [self._row(shape) for shape in shapes]
        images = sum(len(shape) - 1 for shape in shapes)
        longest = max(map(len, rows))
        length = longest if prompt is None or not images else prompt
        if longest > length:
            return None
        inputs = _padded(rows, length)
        if images:
            size = (images, *self._image)
            inputs["pixel_values"] = torch.randn(size, generator=self._generator)
        new_tokens = NEW_TOKENS if name == ANSWERED else 0
        return Case(name, inputs, self._text(len(rows), FOLLOWING), new_tokens)

    def _row(self, shape: Shape) -> Tensor:
        image = torch.full((self.per_image,), self._contents.image_token_id)
        parts = [self._text(shape[0])]
        for count in shape[1:]:
            parts += [image, self._text(count)]
        return torch.cat(parts)

    def _text(self, *size: int) -> Tensor:
        """Ids at random, none of them the image's."""
        drawn = torch.randint(0, self._words - 1, size, generator=self._generator)
        return drawn + (drawn >= self._contents.image_token_id)


def _padded(rows: list[Tensor], length: int) -> dict[str, Tensor]:
    ids = torch.zeros(len(rows), length, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for index, row in enumerate(rows):
        ids[index, length - len(row) :] = row
        mask[index, length - len(row) :] = 1
    return {"input_ids": ids, "attention_mask": mask}
