"""Recordings of published code, and models to hold against them.

``golden/README.md`` says how they were made and what each array means.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling

from vtprune_fx.recipes.loading import load_recipe
from vtprune_fx.recipes.schema import Cut, Provenance, Recipe

GOLDEN = Path(__file__).parent / "golden"
CASES = tuple(sorted(path.stem for path in (GOLDEN / "fitprune").glob("*.npz")))
"""Names of the recorded FitPrune runs: ``<model>_T<text tokens>_r<reduction in %>``."""

SPARSE_CASES = tuple(sorted(path.stem for path in (GOLDEN / "sparsevlm").glob("*.npz")))
"""Names of the recorded SparseVLM runs."""

FIRST_VISUAL = 35
VISUAL_TOKENS = 576
IMAGE_TOKEN_ID = 2
"""Stands for LLaVA's -200. No recorded prompt or answer contains it (checked)."""


@dataclass(frozen=True, eq=False)
class GoldenCase:
    """One recorded run.

    Attributes:
        name: Name of its file, without the suffix.
        arrays: Everything in the file.
    """

    name: str
    arrays: dict[str, npt.NDArray[np.generic]]

    @property
    def model_name(self) -> str:
        """Folder of the run's model. Cases with the same one share the weights."""
        return self.name.split("_T")[0]

    @property
    def config_name(self) -> str:
        """File of the model's configuration."""
        return "config.json"

    @property
    def has_decode(self) -> bool:
        """Whether decode steps were recorded."""
        return "dec_tokens" in self.arrays

    def tensor(self, array: str) -> Tensor:
        """One recorded array as a tensor of its own."""
        return torch.from_numpy(self.arrays[array].copy())

    @property
    def input_ids(self) -> Tensor:
        """The prompt, the image token in every visual token's place. [1, n]."""
        recorded = self.tensor("input_ids")
        image = torch.full((VISUAL_TOKENS,), IMAGE_TOKEN_ID)
        after = recorded[FIRST_VISUAL + 1 :]
        return torch.cat((recorded[:FIRST_VISUAL], image, after))[None]

    @property
    def features(self) -> Tensor:
        """The visual embeddings, as a projector would give them. [576, h]."""
        embeds = self.tensor("inputs_embeds")[0]
        return embeds[FIRST_VISUAL : FIRST_VISUAL + VISUAL_TOKENS]

    def recipe(self) -> Recipe:
        """The deletions of the recorded run."""
        scheme: list[int] = self.arrays["delete_scheme"].tolist()
        cuts = [Cut(layer=at, drop=drop) for at, drop in enumerate(scheme) if drop > 0]
        return Recipe(
            schema_version=1,
            name=self.name.lower().replace("_", "-"),
            method="fitprune",
            score="fitprune",
            positions="kept",
            layers=len(scheme),
            visual_tokens=VISUAL_TOKENS,
            cuts=tuple(cuts),
            provenance=Provenance(source="published FitPrune code, commit d28e418c"),
        )

    def kept(self, layer: int) -> list[int]:
        """Original positions of all tokens present after a layer's cut, ascending."""
        visual = self.arrays["kept_vis"][layer].nonzero()[0] + FIRST_VISUAL
        tokens = self.input_ids.shape[1]
        after = range(FIRST_VISUAL + VISUAL_TOKENS, tokens)
        return [*range(FIRST_VISUAL), *visual.tolist(), *after]


@dataclass(frozen=True, eq=False)
class SparseCase(GoldenCase):
    """One recorded run of SparseVLM (1.x code) or SparseVLM+ (2.0 code)."""

    @property
    def plus(self) -> bool:
        """Whether it is SparseVLM+."""
        return self.name.startswith("v2")

    @property
    def model_name(self) -> str:
        """Folder of the run's model."""
        return "_".join(self.name.split("_")[1:4])

    @property
    def config_name(self) -> str:
        """File of the model's configuration."""
        return "config_theta1e10.json" if "theta1e10" in self.name else "config.json"

    @property
    def layers(self) -> list[int]:
        """Layers that prune."""
        found: list[int] = self.arrays["pruning_loc"].tolist()
        return found

    def recipe(self) -> Recipe:
        """The counts of the recorded run."""
        drops = {at: int((~self.tensor(f"L{at}_keep")).sum()) for at in self.layers}
        method = "sparsevlm-plus" if self.plus else "sparsevlm"
        return load_recipe(
            {
                "schema_version": 1,
                "name": self.name.lower().replace("_", "-"),
                "method": method,
                "score": method,
                "positions": "kept" if self.plus else "compacted",
                "recycle": None if self.plus else {"tau": 0.3, "theta": 0.1},
                "layers": len(self.arrays["kv_len"]),
                "visual_tokens": VISUAL_TOKENS,
                "cuts": [
                    {"layer": at, "drop": drop, "site": "after_layer"}
                    for at, drop in drops.items()
                ],
                "provenance": {"source": "published SparseVLM code, commit 26a5f488"},
            }
        )

    def by_rank(self) -> Recipe:
        """The same counts, as they follow from the rank that every layer has.

        One for each rater: the recorded attention has full rank.
        """
        counted, raters = self.recipe(), len(self.arrays["raters"])
        cuts = [
            {
                "layer": cut.layer,
                "site": cut.site,
                "by_rank": {
                    "rule": "keep",
                    "scale": 1,
                    "bias": int(self.tensor(f"L{cut.layer}_keep").sum()) - raters,
                },
            }
            for cut in counted.cuts
        ]
        return load_recipe(counted.model_dump() | {"cuts": cuts})

    def kept(self, layer: int) -> list[int]:
        """What is present behind a pruning layer: positions, -1 for new tokens."""
        source, stays = (
            self.tensor(f"L{layer}_src_before"),
            self.tensor(f"L{layer}_keep"),
        )
        visual = source[stays].clamp(min=-1).tolist()
        visual += [-1] * (0 if self.plus else len(self.arrays[f"L{layer}_cl_centers"]))
        after = range(FIRST_VISUAL + VISUAL_TOKENS, self.input_ids.shape[1])
        return [*range(FIRST_VISUAL), *visual, *after]


def load_sparse_case(name: str) -> SparseCase:
    """Read a recorded run of SparseVLM; ``SPARSE_CASES`` has the names."""
    with np.load(GOLDEN / "sparsevlm" / f"{name}.npz", allow_pickle=False) as arrays:
        return SparseCase(name, dict(arrays))


def load_case(name: str) -> GoldenCase:
    """Read a recorded run; ``CASES`` has the names."""
    with np.load(GOLDEN / "fitprune" / f"{name}.npz", allow_pickle=False) as arrays:
        return GoldenCase(name, dict(arrays))


def llava_from_golden(case: GoldenCase) -> LlavaForConditionalGeneration:
    """A new LLaVA in float32 whose decoder and head are the recorded model's.

    The vision tower and the projector are random: feed the features that were recorded
    with ``forward(..., mm_encoder_outputs=encoded(case.features))``.
    """
    folder = GOLDEN / "models" / case.model_name
    fields = json.loads((folder / case.config_name).read_text(encoding="utf-8"))
    config = LlavaConfig(
        vision_config=_vision_config(),
        text_config=LlamaConfig(**fields),
        image_token_index=IMAGE_TOKEN_ID,
        image_seq_length=VISUAL_TOKENS,
    )
    model = LlavaForConditionalGeneration(config)
    model.train(mode=False)
    _load_decoder(model, folder / "model.safetensors")
    return model


@functools.cache
def shared_llava(model_name: str) -> LlavaForConditionalGeneration:
    """The same, built once for all tests that leave the model as it is."""
    case = next(name for name in CASES if name.startswith(f"{model_name}_T"))
    return llava_from_golden(load_case(case))


def encoded(features: Tensor) -> dict[str, BaseModelOutputWithPooling]:
    """Features as ``forward`` takes them in ``mm_encoder_outputs``. [v, h]."""
    # LLaVA puts a list of tensors where the class says one tensor.
    listed = cast("Tensor", [features])
    return {"image": BaseModelOutputWithPooling(pooler_output=listed)}


def _vision_config() -> CLIPVisionConfig:
    """A tiny vision tower that gives 24 x 24 = 576 visual tokens."""
    return CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=48,
        patch_size=2,
        projection_dim=16,
    )


def _load_decoder(model: LlavaForConditionalGeneration, file: Path) -> None:
    weights = {name: tensor.float() for name, tensor in load_file(file).items()}
    head = {"weight": weights.pop("lm_head.weight")}
    model.lm_head.load_state_dict(head)
    decoder = {name.removeprefix("model."): value for name, value in weights.items()}
    model.model.language_model.load_state_dict(decoder)
