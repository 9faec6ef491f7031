"""What other libraries wrap around a model, and what stands inside."""

from __future__ import annotations

from collections.abc import Iterator
from types import MethodType

from torch import nn
from torch._dynamo import OptimizedModule
from transformers import PreTrainedModel

from vtprune_fx.errors import InputError


def forward_of(model: nn.Module) -> object:
    """The ``forward`` that was set on the model itself, or None."""
    return vars(model).get("forward")


def layers_of(function: object) -> Iterator[object]:
    """A function, and what it wraps, as ``functools.wraps`` records it.

    Of a bound method its function: accelerate binds what it unwraps.
    """
    while function is not None:
        function = getattr(function, "__func__", function)
        yield function
        function = getattr(function, "__wrapped__", None)


def inner_model(model: nn.Module) -> PreTrainedModel:
    """The transformers model that prunes: inside of a PeftModel, or the model itself.

    Raises:
        InputError: It is not a model of transformers, or it is wrapped so that pruning
            would be without effect.
    """
    if isinstance(model, OptimizedModule):
        raise InputError(
            "model",
            expected="a model as it was loaded",
            found="one that torch.compile returned",
            fix="Pass the model itself: vtprune_fx.compile compiles it.",
        )
    base = getattr(model, "get_base_model", None)
    inner = model if base is None else base()
    if not isinstance(inner, PreTrainedModel):
        raise InputError(
            "model",
            expected="a model of transformers, or a PeftModel of one",
            found=type(inner).__name__,
            fix="Pass the transformers model that is inside.",
        )
    return inner


def check_can_prune(model: PreTrainedModel) -> None:
    """Refuse a model that would run past what ``compile`` sets on it.

    Raises:
        InputError: Hooks move its parts between devices, its ``forward`` was replaced,
            or its decoder reads images by cross attention.
    """
    name = type(model).__name__
    hooked = [part for part, module in model.named_modules() if _is_hooked(module)]
    if hooked:
        raise InputError(
            f"{name}, module {hooked[0] or 'model'}",
            expected="a model on one device",
            found="hooks of accelerate, which no graph can contain",
            fix="Load it without device_map, or call "
            "accelerate.hooks.remove_hook_from_submodules(model), then compile it.",
        )
    forward = forward_of(model)
    if forward is not None and forward != MethodType(type(model).forward, model):
        raise InputError(
            f"{name}.forward",
            expected="the model's class's",
            found="one that was set on the model, as accelerate sets it",
            fix="Compile the model first and wrap it then.",
        )
    text = model.config.get_text_config()
    if getattr(text, "cross_attention_layers", None):
        raise InputError(
            name,
            expected="a decoder whose prompt contains the visual tokens",
            found="one that reads images by cross attention",
            fix="Nothing in its prompt can be dropped: run it without compile.",
        )


def _is_hooked(module: nn.Module) -> bool:
    return hasattr(module, "_hf_hook")
