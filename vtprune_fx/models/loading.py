"""Load checkpoints and processors; raises InputError for unusable ones."""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    PreTrainedConfig,
    PreTrainedModel,
    ProcessorMixin,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
)
from transformers.utils import logging as transformers_logging

from vtprune_fx.errors import (
    InputError,
    MissingDependencyError,
    VtpruneError,
    first_sentence,
)
from vtprune_fx.models.fields import read_fields, refused_field
from vtprune_fx.models.processor_trial import try_processor
from vtprune_fx.optional import lacking

if TYPE_CHECKING:
    from collections.abc import Iterator


_LONGEST = 4096
"""Characters of a path at most, in Linux."""

_EXPECTED = "a checkpoint folder or the id of a model on the hub"


def open_checkpoint(
    model: str | Path, dtype: torch.dtype = torch.float32
) -> tuple[PreTrainedModel, ProcessorMixin]:
    """Open a vision-language checkpoint.

    Args:
        model: A folder, or the id of a model on the hub (``owner/name``).
        dtype: Type of the weights.

    Returns:
        The model, in evaluation mode, and its processor.

    Raises:
        InputError: There is no such checkpoint, it cannot be read, or its model takes
            no images.
        MissingDependencyError: A package that its processor needs does not load.
    """
    return load_model(model, dtype), load_processor(model)


def load_model(
    model: str | Path, dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    """The model of a checkpoint, as ``open_checkpoint`` opens it."""
    config = _config(model)
    _check_sees_images(model, config)
    with _reading(model, "weights"), quiet() if Path(model).is_dir() else nullcontext():
        loaded: PreTrainedModel = AutoModelForImageTextToText.from_pretrained(
            str(model), dtype=dtype, config=config, trust_remote_code=False
        )
    return loaded


def load_processor(model: str | Path) -> ProcessorMixin:
    """The processor of a checkpoint, as ``open_checkpoint`` opens it."""
    _check_exists(model)
    _check_processor(Path(model))
    with _reading(model, "a processor"):
        processor: object = AutoProcessor.from_pretrained(
            str(model), trust_remote_code=False
        )
    if not isinstance(processor, ProcessorMixin) or not (
        hasattr(processor, "image_processor") and hasattr(processor, "tokenizer")
    ):
        raise InputError(
            _where(model),
            expected="a processor for images and text",
            found=f"only a {type(processor).__name__}",
            fix="Save the model's own processor there with save_pretrained().",
        )
    return processor


@contextmanager
def quiet() -> Iterator[None]:
    """Hide the progress bars of transformers inside the block."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def _where(model: str | Path) -> str:
    return f"model {str(model)!r}"


def _config(model: str | Path) -> PreTrainedConfig:
    _check_exists(model)
    with _reading(model, "config.json"):
        config: PreTrainedConfig = AutoConfig.from_pretrained(
            str(model), trust_remote_code=False
        )
    return config


def _check_exists(model: str | Path) -> None:
    """Refuse paths that are no folder, and folders without a config.json."""
    path, found = Path(model), None
    if "\0" in str(model) or len(str(model)) > _LONGEST:
        found = "no path that can be"
    elif path.is_dir():
        if not (path / "config.json").is_file():
            found = "a folder without a config.json"
    elif path.exists():
        found = "a file"
    elif not _could_be_hub_id(model):
        found = "no such folder"
    if found:
        raise InputError(
            _where(model),
            expected=_EXPECTED,
            found=found,
            fix="Name the folder that save_pretrained() wrote, with config.json in it.",
        )


def _check_processor(folder: Path) -> None:
    """Refuse a folder whose processor would run code or be read from elsewhere.

    That a processor's class has code in the folder does no harm: transformers has the
    class, or it is an error. For a part's class transformers would ask the user.
    """
    if not folder.is_dir():
        return
    for path in sorted(folder.glob("*.json")):
        try:
            fields = read_fields(path)
        except (OSError, ValueError) as error:
            raise _not_read(folder, path.name, first_sentence(error)) from error
        wrong = refused_field(fields) if path.name in _OF_PROCESSORS else None
        if wrong is not None and wrong[0] != "auto_map":
            raise _not_read(folder, path.name, " ".join(wrong))
    with _reading(folder, "a processor"):
        try_processor(folder)


_OF_PROCESSORS = (
    *("processor_config.json", "preprocessor_config.json", "tokenizer_config.json"),
    *("video_preprocessor_config.json", "audio_tokenizer_config.json"),
)


def _not_read(folder: Path, name: str, found: str) -> InputError:
    return InputError(
        f"model {str(folder)!r}, file {name}",
        expected="a processor's file that stays in its folder and runs no code",
        found=found,
        fix="Save the processor of transformers there with save_pretrained().",
    )


def _could_be_hub_id(model: str | Path) -> bool:
    if isinstance(model, Path):
        return False
    owner, _, name = model.rpartition("/")
    return "/" not in owner and bool(name) and model[0] not in "./~"


def _check_sees_images(model: str | Path, config: PreTrainedConfig) -> None:
    known = type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    if known and getattr(config, "image_token_id", None) is not None:
        return
    raise InputError(
        _where(model),
        expected="a vision-language model with image tokens in its prompt",
        found=f"a model of type {config.model_type!r}",
        fix="Name a model such as LLaVA, Qwen2-VL, InternVL or PaliGemma.",
    )


@contextmanager
def _reading(model: str | Path, what: str) -> Iterator[None]:
    """Whatever goes wrong in the block becomes an error of ours about ``model``."""
    try:
        yield
    except VtpruneError:
        raise
    except Exception as error:  # many kinds: network, JSON, safetensors, imports
        missing = lacking(error, _where(model), what)
        raise missing or _unreadable(model, what, error) from error


def _unreadable(model: str | Path, what: str, error: Exception) -> VtpruneError:
    found = f"{type(error).__name__}: {first_sentence(error)}"
    if isinstance(error, ImportError):
        return MissingDependencyError(
            _where(model),
            expected=f"every package that {what} needs",
            found=found,
            fix="Install what the message names.",
        )
    local = Path(model).is_dir()
    return InputError(
        _where(model),
        expected=f"{what} that can be read" if local else _EXPECTED,
        found=found,
        fix="Write the folder anew with save_pretrained()."
        if local
        else "Check the spelling, the network and, for a gated model, the login.",
    )
