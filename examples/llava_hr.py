"""Prune a model that transformers does not have: LLaVA-HR, two vision towers in one.

    python examples/llava_hr.py         # a tiny one answers (random weights)
    python examples/llava_hr.py full    # where the published recipe cuts at full size

A CLIP tower sees a small picture and a ConvNeXt a large one; adapters mix what the
second sees into the first (Luo et al., arXiv:2403.03003). As a tower of transformers'
LLaVA that is all there is to write: what is pruned is the graph, whatever made its
visual tokens.

Letters in shapes: I images, P patches of the small picture, w and c widths of the
towers.
"""

from __future__ import annotations

import math
import sys
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, interpolate
from transformers import (
    AutoConfig,
    AutoModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    ConvNextConfig,
    ConvNextModel,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling

import vtprune_fx
from vtprune_fx.models import continued
from vtprune_fx.models.weightless import META, example_prompts
from vtprune_fx.recipes import Recipe, default_recipe, load_recipe

IMAGE = 99
"""Placeholder of an image in the tiny model's prompts."""


class TwoTowersConfig(PreTrainedConfig):
    """CLIP's and ConvNeXt's, the second for the picture as it comes."""

    model_type = "llava_hr_towers"
    sub_configs_defaults: ClassVar[Any] = {
        "low": CLIPVisionConfig,
        "high": ConvNextConfig,
    }
    low: Any = None
    high: Any = None

    @property
    def hidden_size(self) -> int:
        """Of the features, w."""
        return int(self.low.hidden_size)

    @property
    def num_channels(self) -> int:
        """Of a picture."""
        return int(self.high.num_channels)

    @property
    def image_size(self) -> int:
        """Width of the large picture."""
        return int(self.high.image_size)

    @property
    def patch_size(self) -> int:
        """Width of what a visual token stands for in the large picture."""
        return self.image_size * int(self.low.patch_size) // int(self.low.image_size)


class Adapter(nn.Module):
    """F_l + f_l(F_l) + g f_h(F_h), the gate g by the means of both."""

    def __init__(self, low: int, high: int) -> None:
        super().__init__()
        self.low = nn.Sequential(
            nn.Conv2d(low, low, 7, padding=3, groups=low),
            nn.GELU(),
            nn.Conv2d(low, low, 1),
        )
        self.high = nn.Sequential(
            nn.Conv2d(high, high, 1), nn.GELU(), nn.Conv2d(high, low, 1)
        )
        self.gate = nn.Sequential(
            nn.Linear(2 * low, low // 2), nn.GELU(), nn.Linear(low // 2, 1), nn.Tanh()
        )

    def forward(self, low: Tensor, high: Tensor) -> Tensor:
        """[I, P, w] and [I, c, H, H] -> [I, P, w]."""
        side = math.isqrt(low.shape[1])
        grid = low.mT.reshape(low.shape[0], low.shape[2], side, side)
        grid = grid + self.low(grid)
        above = avg_pool2d(self.high(high), high.shape[-1] // side)
        means = torch.cat((grid, above), dim=1).mean(dim=(2, 3))
        mixed: Tensor = grid + above * self.gate(means)[:, :, None, None]
        return mixed.flatten(2).mT


class TwoTowers(PreTrainedModel):
    """One picture in, features of P patches out."""

    config_class = TwoTowersConfig
    config: TwoTowersConfig
    _supports_sdpa = True

    def __init__(self, config: TwoTowersConfig) -> None:
        super().__init__(config)
        self.low, self.high = CLIPVisionModel(config.low), ConvNextModel(config.high)
        wide, narrow = config.high.hidden_sizes[-1], config.hidden_size
        # One before each quarter of the CLIP tower except the first.
        self.adapters = nn.ModuleList(Adapter(narrow, wide) for _ in range(3))
        self.from_low = nn.Linear(narrow, narrow)
        self.from_high = nn.Linear(wide, narrow)
        self.post_init()  # type: ignore[no-untyped-call] # not seen as transformers'

    def forward(self, pixel_values: Tensor, **_: object) -> BaseModelOutputWithPooling:
        """[I, 3, R, R] -> one hidden state [I, P, w]."""
        high = self.high(pixel_values).last_hidden_state
        size = self.config.low.image_size
        small = interpolate(pixel_values, (size, size), mode="bilinear")
        low = self.low.pre_layrnorm(self.low.embeddings(small)[:, 1:])
        layers = self.low.encoder.layers
        for index, layer in enumerate(layers):
            if index and index % (len(layers) // 4) == 0:
                low = self.adapters[index * 4 // len(layers) - 1](low, high)
            low = layer(low, attention_mask=None)
        pooled = avg_pool2d(high, high.shape[-1] // math.isqrt(low.shape[1]))
        mixed = self.from_low(low) + self.from_high(pooled.flatten(2).transpose(1, 2))
        return BaseModelOutputWithPooling(
            last_hidden_state=mixed, hidden_states=(mixed,)
        )


AutoConfig.register(TwoTowersConfig.model_type, TwoTowersConfig, exist_ok=True)
AutoModel.register(TwoTowersConfig, TwoTowers, exist_ok=True)


def tiny() -> LlavaConfig:
    """16 visual tokens, 32 wide."""
    low = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        image_size=16,
        patch_size=4,
    )
    high = ConvNextConfig(
        hidden_sizes=[8, 16], depths=[1, 1], num_stages=2, image_size=64
    )
    text = LlamaConfig(
        vocab_size=100,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    return _llava(low, high, text, image_token_index=IMAGE)


def full() -> LlavaConfig:
    """LLaVA-HR-7B: 1,024 visual tokens of pictures 1,024 wide."""
    low = CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=448,
        patch_size=14,
    )
    high = ConvNextConfig(
        hidden_sizes=[192, 384, 768, 1536], depths=[3, 3, 27, 3], image_size=1024
    )
    return _llava(low, high, LlamaConfig(vocab_size=32064), dtype=torch.float16)


def _llava(
    low: CLIPVisionConfig, high: ConvNextConfig, text: LlamaConfig, **fields: Any
) -> LlavaConfig:
    return LlavaConfig(
        vision_config=TwoTowersConfig(low=low.to_dict(), high=high.to_dict()),
        text_config=text,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        **fields,
    )


def answer(recipe: Recipe, inner: str) -> str:
    """Let a tiny model with random weights make 8 tokens of a random picture."""
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(tiny())
    model.train(mode=False)
    ids = torch.tensor([[5, 6, *[IMAGE] * 16, 7, 8]])
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.randn(1, 3, 64, 64),
    }
    vtprune_fx.compile(model, recipe, inner=inner)
    new = continued(model, inputs, max_new_tokens=8)
    return f"{vtprune_fx.report_of(model)}\nnew tokens: {new}"


def plan(recipe: Recipe) -> str:
    """Trace the model of full size, without weights, and show where it would be cut."""
    with META:
        model = LlavaForConditionalGeneration(full())
    model.train(mode=False)
    prompts = example_prompts(model, visual_tokens=None, text_tokens=75)
    return str(vtprune_fx.explain(model, prompts, recipe))


def main(size: str = "tiny", inner: str = "inductor") -> str:
    """Run the tiny one, or explain the one of full size."""
    if size == "full":
        return plan(load_recipe("fitprune-llava-hr-7b-60"))
    return answer(default_recipe(layers=3, visual_tokens=16), inner)


if __name__ == "__main__":
    print(main(*sys.argv[1:]))
