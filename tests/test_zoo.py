"""Every model of the zoo, pruned, against the oracle: no model is known by name."""

from __future__ import annotations

import pytest

from tests.zoo import ZOO, assert_generates_like_the_oracle, recipe_of

SOME = {"LLaVA-NeXT", "Qwen2-VL", "Gemma 3", "Qwen3-VL"}
"""What the default suite runs: any resolution, three axes, masks of its own, features
that enter later layers."""

IMAGES = ((3, "image", 6), (2, "image", 1, "image", 9))
VIDEOS = ((3, "video", 6), (2, "image", 1, "video", 9))


def names(some: set[str]) -> list[object]:
    return [
        name if name in some else pytest.param(name, marks=pytest.mark.slow)
        for name in ZOO
    ]


@pytest.mark.parametrize("name", names(SOME))
def test_images_are_the_oracle(name: str) -> None:
    assert_generates_like_the_oracle(name, IMAGES, recipe_of(name))


@pytest.mark.parametrize(
    "name",
    [
        name if name == "Video-LLaVA" else pytest.param(name, marks=pytest.mark.slow)
        for name, kind in ZOO.items()
        if kind.video
    ],
)
def test_videos_beside_images_are_the_oracle(name: str) -> None:
    assert_generates_like_the_oracle(name, VIDEOS, recipe_of(name))
