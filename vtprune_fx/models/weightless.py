"""Models of full size without their weights, and prompts for them.

A configuration is enough to trace a model: its weights are on torch's ``meta``
device, where a tensor is its shape and type. Inputs are made from the configuration
too, without a processor.
"""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch
from transformers import AutoConfig, AutoModelForImageTextToText
from transformers.modeling_outputs import BaseModelOutputWithPooling

from vtprune_fx.errors import InputError, first_sentence
from vtprune_fx.models.encoding import FEATURES
from vtprune_fx.models.fields import read_fields

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import PreTrainedConfig, PreTrainedModel

META = torch.device("meta")

SAMPLES = 2
"""Prompts in an example: ``torch.export`` takes a size of 1 for a constant."""


def config_names() -> list[str]:
    """Names of the configurations that ship with the package, sorted."""
    files = resources.files("vtprune_fx.models").joinpath("configs").iterdir()
    return sorted(f.name.removesuffix(".json") for f in files)


def load_config(source: str | Path) -> PreTrainedConfig:
    """Load a configuration of transformers.

    Args:
        source: A name that ``config_names()`` lists, a model's folder, or a
            ``config.json``. Nothing is downloaded.

    Raises:
        InputError: There is none, or it cannot be read.
    """
    try:
        if str(source) in config_names():
            configs = resources.files("vtprune_fx.models") / "configs"
            shipped = configs / f"{source}.json"
            with resources.as_file(shipped) as file:
                return _read(file)
        return _read(Path(source))
    except Exception as error:  # transformers reads it; many kinds
        raise InputError(
            f"--config {source}",
            expected="a model folder or a config.json of transformers, or one of "
            f"{', '.join(config_names())}",
            found=first_sentence(error),
            fix="Pass a folder that save_pretrained() wrote.",
        ) from error


def _read(path: Path) -> PreTrainedConfig:
    if not path.exists():
        raise FileNotFoundError("no such file or folder")
    read_fields(path / "config.json" if path.is_dir() else path)
    config: PreTrainedConfig = AutoConfig.from_pretrained(
        path, local_files_only=True, trust_remote_code=False
    )
    return config


def build(config: PreTrainedConfig) -> PreTrainedModel:
    """The model of a configuration, every weight on the ``meta`` device.

    Raises:
        InputError: The configuration is not of a vision-language model that prompts
            can be made for.
    """
    if config.model_type not in _IMAGES:
        raise InputError(
            f"config of type {config.model_type!r}",
            expected=f"one of {', '.join(sorted(_IMAGES))}",
            found="a model for which no inputs can be made without its processor",
            fix="Load the model, and pass vtprune_fx.explain what its processor makes.",
        )
    with META:
        model: PreTrainedModel = AutoModelForImageTextToText.from_config(
            config, dtype=config.dtype or torch.float16
        )
    model.train(mode=False)
    return model


def example_prompts(
    model: PreTrainedModel, visual_tokens: int | None, text_tokens: int
) -> dict[str, Any]:
    """Inputs to trace an export with: two prompts about images, shapes alone.

    Args:
        model: A model that ``build`` made.
        visual_tokens: Visual tokens of each prompt; those of one image by default.
        text_tokens: All its other tokens.

    Returns:
        ``input_ids`` and ``attention_mask`` [2, S], ``position_ids`` [2, S] or
        [3, 2, S], and pictures, or features where encoders take sizes
        (``encoding.encoded``).

    Raises:
        InputError: No images of the model take that many tokens, or there is no text.
    """
    if text_tokens < 1:
        raise InputError(
            "number of text tokens",
            expected="1 or more",
            found=str(text_tokens),
            fix="Pass the number of tokens in the prompt that are not visual.",
        )
    config = cast("_Config", model.config)
    taken, images = _IMAGES[model.config.model_type](config, visual_tokens)
    if visual_tokens not in {None, taken}:
        raise InputError(
            "number of visual tokens",
            expected=f"what images of this model take, such as {taken}",
            found=str(visual_tokens),
            fix="Pass that number, or omit it for one image.",
        )
    names = ("input_ids", "attention_mask", "position_ids")
    shape = (SAMPLES, taken + text_tokens)
    text = {name: torch.empty(shape, dtype=torch.long, device=META) for name in names}
    if getattr(model.base_model, "compute_3d_position_ids", None) is not None:
        text["position_ids"] = text["position_ids"].expand(3, *shape)
    return text | images


class _Vision(Protocol):
    """The part of a vision tower's configuration that is read."""

    image_size: int
    patch_size: int
    num_channels: int
    spatial_merge_size: int


class _Config(Protocol):
    """The part of a model's configuration that is read."""

    dtype: torch.dtype
    vision_config: _Vision
    image_grid_pinpoints: list[list[int]]

    def get_text_config(self) -> PreTrainedConfig: ...


Pictures = tuple[int, dict[str, object]]
"""Visual tokens of a prompt, and the image inputs of two such prompts."""


def _pixels(config: _Config, visual_tokens: int | None) -> Pictures:
    """Images of one size, a token for each patch: LLaVA."""
    vision = config.vision_config
    each = (vision.image_size // vision.patch_size) ** 2
    count = max(1, (visual_tokens or each) // each)
    size = (vision.num_channels, vision.image_size, vision.image_size)
    pixels = torch.empty((SAMPLES * count, *size), dtype=config.dtype, device=META)
    return count * each, {"pixel_values": pixels}


def _features(config: _Config, visual_tokens: int) -> Pictures:
    """Features of an encoder whose token count depends on the image size."""
    shape = (SAMPLES * visual_tokens, config.get_text_config().hidden_size)
    # A list as encoders of this kind give one, though typed as a tensor.
    rows = [torch.empty(shape, dtype=config.dtype, device=META)]
    given = BaseModelOutputWithPooling(pooler_output=cast("torch.Tensor", rows))
    return visual_tokens, {FEATURES: {"image": given}}


def _any_resolution(config: _Config, visual_tokens: int | None) -> Pictures:
    """LLaVA-NeXT: a scaled image, and the largest square grid with its row ends."""
    vision = config.vision_config
    side = vision.image_size // vision.patch_size
    square = max(min(grid) for grid in config.image_grid_pinpoints)
    wide = side * square // vision.image_size
    return _features(config, visual_tokens or side**2 + wide * (wide + 1))


def _patches(config: _Config, visual_tokens: int | None) -> Pictures:
    """Qwen2-VL: merged patches, by default of an image of 1008 x 1008 pixels."""
    vision = config.vision_config
    side = 1008 // (vision.patch_size * vision.spatial_merge_size)
    return _features(config, visual_tokens or side**2)


_IMAGES: dict[str, Callable[[_Config, int | None], Pictures]] = {
    # By model type: makes images of so many visual tokens, one image if None.
    "llava": _pixels,
    "llava_next": _any_resolution,
    "qwen2_vl": _patches,
}
