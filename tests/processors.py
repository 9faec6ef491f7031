"""Tiny random models with the processors that transformers has for their families.

What a processor makes of pictures and text is what a model gets: image sizes, tiles,
grids, placeholders and padding are its.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import (
    LlavaNextImageProcessorPil,
    LlavaNextProcessor,
    PreTrainedTokenizerFast,
)

from tests import zoo

WORDS = tuple(f"w{number}" for number in range(1, zoo.TEXT))
PLACES = {
    "LLaVA-NeXT": "<image>",
    "Qwen2.5-VL": "<|vision_start|> <|image_pad|> <|vision_end|>",
}
"""What stands for an image in a prompt, as the families' chat templates write it."""


def _tokenizer(image: str, video: str) -> PreTrainedTokenizerFast:
    """One token for each word, with the ids of the zoo's placeholders."""
    ids = {"<pad>": zoo.PAD, **{word: n for n, word in enumerate(WORDS, start=1)}}
    special = {"<|vision_start|>": 97, "<|vision_end|>": 96}
    ids |= special | {video: zoo.VIDEO, image: zoo.IMAGE, "<unk>": 95}
    words = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        unk_token="<unk>",
        pad_token="<pad>",
        additional_special_tokens=[*special, image, video],
        padding_side="left",
    )


@functools.cache
def processor(name: str) -> Any:
    """The processor of a family; a part of Qwen's, for videos, needs torchvision."""
    if name == "Qwen2.5-VL":
        pytest.importorskip("torchvision", reason="the extra 'families' has it")
    made: Any = {"LLaVA-NeXT": _llava_next, "Qwen2.5-VL": _qwen2_5_vl}[name]()
    return made


def _llava_next() -> LlavaNextProcessor:
    config: Any = zoo.ZOO["LLaVA-NeXT"].config()
    side = config.vision_config.image_size
    return LlavaNextProcessor(
        LlavaNextImageProcessorPil(
            size={"shortest_edge": side},
            crop_size={"height": side, "width": side},
            image_grid_pinpoints=config.image_grid_pinpoints,
        ),
        _tokenizer("<image>", "<video>"),
        patch_size=config.vision_config.patch_size,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        num_additional_image_tokens=1,
        image_token="<image>",
    )


def _qwen2_5_vl() -> Any:
    config: Any = zoo.ZOO["Qwen2.5-VL"].config().vision_config
    area = (config.patch_size * config.spatial_merge_size) ** 2
    sizes = {
        "patch_size": config.patch_size,
        "temporal_patch_size": config.temporal_patch_size,
        "merge_size": config.spatial_merge_size,
        "size": {"shortest_edge": 4 * area, "longest_edge": 64 * area},
    }
    # Where torchvision is not installed to import these says so on the screen.
    return transformers.Qwen2_5_VLProcessor(
        transformers.Qwen2VLImageProcessor(**sizes),
        _tokenizer("<|image_pad|>", "<|video_pad|>"),
        transformers.Qwen2VLVideoProcessor(**sizes),
    )


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """A picture of noise."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(
        256, (height, width, 3), dtype=torch.uint8, generator=generator
    )
    return Image.fromarray(pixels.numpy())


def inputs_of(
    name: str, *prompts: tuple[Sequence[tuple[int, int]], int], seed: int = 0
) -> dict[str, Tensor]:
    """Prompts as a family's processor returns them, padded on the left.

    Args:
        name: Of the family.
        prompts: For each sample the sizes of its pictures, and how many words follow.
        seed: Of words and pictures.
    """
    generator = torch.Generator().manual_seed(seed)
    place = PLACES[name]
    texts, pictures = [], []
    for sizes, words in prompts:
        drawn = torch.randint(len(WORDS), (words,), generator=generator).tolist()
        texts.append(" ".join([place] * len(sizes) + [WORDS[n] for n in drawn]))
        pictures += [picture(*size, seed + n) for n, size in enumerate(sizes)]
    made = processor(name)(
        text=texts, images=pictures, padding=True, return_tensors="pt"
    )
    return dict(made)
