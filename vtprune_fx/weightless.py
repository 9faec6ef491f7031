"""Models of full size without their weights, and prompts for them.

A configuration is enough to trace a model: its weights are on torch's ``meta``
device, where a tensor is its shape and type. Inputs are made from the configuration
too, without a processor; how many tokens an image takes is what the model's own encoder
says.
"""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForImageTextToText

from vtprune_fx.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import PreTrainedConfig, PreTrainedModel

META = torch.device("meta")


def config_names() -> list[str]:
    """Names of the configurations that ship with the package, sorted."""
    files = resources.files("vtprune_fx").joinpath("configs").iterdir()
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
            shipped = resources.files("vtprune_fx") / "configs" / f"{source}.json"
            with resources.as_file(shipped) as file:
                return _read(file)
        return _read(Path(source))
    except (OSError, ValueError) as error:
        raise InputError(
            f"--config {source}",
            expected="a model folder or a config.json of transformers, or one of "
            f"{', '.join(config_names())}",
            found=str(error).splitlines()[0],
            fix="Pass a folder that save_pretrained() wrote.",
        ) from error


def _read(path: Path) -> PreTrainedConfig:
    if not path.exists():
        raise FileNotFoundError("no such file or folder")
    config: PreTrainedConfig = AutoConfig.from_pretrained(path, local_files_only=True)
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


def example_prompt(
    model: PreTrainedModel, visual_tokens: int | None, text_tokens: int
) -> dict[str, Tensor]:
    """What an export is traced with: one prompt about one image, shapes alone.

    Args:
        model: A model that ``build`` made.
        visual_tokens: Visual tokens of the prompt; those of one image if left out.
        text_tokens: All its other tokens.

    Returns:
        ``input_ids``, ``attention_mask`` and ``position_ids`` [1, S], and the pictures.

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
    images = _IMAGES[model.config.model_type](model.config, visual_tokens)
    taken = _tokens_of(model, images)
    if visual_tokens not in {None, taken}:
        raise InputError(
            "number of visual tokens",
            expected=f"what images of this model take, such as {taken}",
            found=str(visual_tokens),
            fix="Pass that number, or leave it out for one image.",
        )
    names = ("input_ids", "attention_mask", "position_ids")
    shape = (1, taken + text_tokens)
    text = {name: torch.empty(shape, dtype=torch.long, device=META) for name in names}
    return text | images


def _tokens_of(model: PreTrainedModel, images: dict[str, Tensor]) -> int:
    """How many tokens the images take, as the model's encoder says."""
    encode: Any = model.base_model.get_image_features  # declared by each class
    with torch.no_grad():
        found = encode(**images, return_dict=True).pooler_output
    each = [found] if isinstance(found, Tensor) else found
    width: int = model.config.get_text_config().hidden_size
    return sum(part.numel() for part in each) // width


def _fixed_size(config: Any, visual_tokens: int | None) -> dict[str, Tensor]:
    """Images of one size, which take as many tokens each: LLaVA."""
    vision = config.vision_config
    each = (vision.image_size // vision.patch_size) ** 2
    count = max(1, (visual_tokens or each) // each)
    shape = (count, vision.num_channels, vision.image_size, vision.image_size)
    return {"pixel_values": torch.empty(shape, dtype=config.dtype, device=META)}


_IMAGES: dict[str, Callable[[Any, int | None], dict[str, Tensor]]] = {
    # By model type: pictures for about so many visual tokens, one picture if None.
    "llava": _fixed_size,
}
