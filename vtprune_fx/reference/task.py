"""A question about a picture, for the reference model."""

from __future__ import annotations

from dataclasses import dataclass

from PIL import Image

from vtprune_fx.reference.questions import draw_samples


@dataclass(frozen=True)
class Task:
    """A question about a picture.

    Attributes:
        prompt: The question.
        image: The picture.
        answer: The right answer, where there is one.
    """

    prompt: str
    image: Image.Image
    answer: str | None = None


def reference_task(seed: int) -> Task:
    """The first question about a single picture of the test split with this seed."""
    samples = draw_samples("test", seed, 100)
    sample = next(sample for sample in samples if len(sample.pictures) == 1)
    question = sample.questions[0]
    image = Image.fromarray(sample.pictures[0].pixels)
    return Task(question.text, image, question.answer)
