"""Prune a prompt about a video: Video-LLaVA, 8 frames.

    python examples/video.py

The model is tiny and has random weights, and the frames are noise. Of a real one only
the inputs differ: they come from its processor, `processor(text=..., videos=frames)`.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    VideoLlavaConfig,
    VideoLlavaForConditionalGeneration,
)

import vtprune_fx
from vtprune_fx.models import continued
from vtprune_fx.recipes import default_recipe

FRAMES, SIDE, PATCH, LAYERS = 8, 12, 4, 3
TOKENS = FRAMES * ((SIDE // PATCH) ** 2 + 1)
"""Visual tokens of a video: a frame has one for each patch, and one for the frame."""
VIDEO = 98
"""Their placeholder."""


def tiny() -> VideoLlavaForConditionalGeneration:
    """A Video-LLaVA with random weights."""
    text = LlamaConfig(
        vocab_size=100,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        eos_token_id=None,
        pad_token_id=0,
    )
    vision = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=SIDE,
        patch_size=PATCH,
    )
    torch.manual_seed(0)
    config = VideoLlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=99,
        video_token_index=VIDEO,
    )
    model = VideoLlavaForConditionalGeneration(config)
    model.train(mode=False)
    return model


def prompt() -> dict[str, Tensor]:
    """What a processor makes of a question about a video."""
    ids = torch.tensor([[5, 6, *[VIDEO] * TOKENS, 7, 8, 9]])
    frames = torch.randn(1, FRAMES, 3, SIDE, SIDE)
    mask = torch.ones_like(ids)
    return {"input_ids": ids, "attention_mask": mask, "pixel_values_videos": frames}


def main(inner: str = "inductor") -> str:
    """Answer once; returns what was cut, and the new tokens."""
    model, inputs = tiny(), prompt()
    vtprune_fx.compile(model, default_recipe(LAYERS, TOKENS), inner=inner)
    new = continued(model, inputs, max_new_tokens=8)
    return f"{vtprune_fx.report_of(model)}\nnew tokens: {new}"


if __name__ == "__main__":
    print(main(*sys.argv[1:]))
