"""Inputs that are tensors around tensors, such as quantised weights.

A graph of ATen operators is traced from what they are made of: an operator on such a
tensor is what its class makes of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


def has_any(values: Iterable[object]) -> bool:
    """Whether any of some values is a tensor around tensors."""
    return any(map(is_traceable_wrapper_subclass, values))


def parts(values: Iterable[object]) -> list[Any]:
    """What values are made of; what is no tensor around tensors stays itself."""
    return [part for value in values for part in _parts(value)]


def _parts(value: Any) -> Iterator[Any]:
    if not is_traceable_wrapper_subclass(value):
        yield value
        return
    names, _ = value.__tensor_flatten__()
    for name in names:
        yield from _parts(getattr(value, name))


def rebuilt(values: Iterable[object], parts: Iterable[object]) -> list[Any]:
    """The same values, made of other parts of the same sizes."""
    given = iter(parts)
    return [replaced(value, lambda _: next(given)) for value in values]


def replaced(value: Any, part: Callable[[Any], Any]) -> Any:
    """A value with ``part(p)`` in place of each of its parts ``p``."""
    if not is_traceable_wrapper_subclass(value):
        return part(value)
    names, context = value.__tensor_flatten__()
    inner: dict[str, Tensor] = {n: replaced(getattr(value, n), part) for n in names}
    return type(value).__tensor_unflatten__(
        inner, context, value.size(), value.stride()
    )
