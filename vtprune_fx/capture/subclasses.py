"""Inputs that are tensors around tensors, such as quantised weights.

A graph of ATen operators is traced from the inner tensors: the class of such a tensor
defines what an operator does with them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import cast

from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


def has_any(values: Iterable[object]) -> bool:
    """Whether any of some values is a tensor around tensors."""
    return any(map(is_traceable_wrapper_subclass, values))


def parts(values: Iterable[object]) -> list[object]:
    """The inner tensors of values; a value without inner tensors is its only part."""
    return [part for value in values for part in _parts(value)]


def _parts(value: object) -> Iterator[object]:
    if not is_traceable_wrapper_subclass(value):
        yield value
        return
    names, _ = value.__tensor_flatten__()
    for name in names:
        yield from _parts(getattr(value, name))


def rebuilt(values: Iterable[object], parts: Iterable[object]) -> list[object]:
    """The same values with other parts of the same sizes."""
    given = iter(parts)
    return [replaced(value, lambda _: next(given)) for value in values]


def replaced(value: object, part: Callable[[object], object]) -> object:
    """A value with ``part(p)`` in place of each of its parts ``p``."""
    if not is_traceable_wrapper_subclass(value):
        return part(value)
    names, context = value.__tensor_flatten__()
    inner = {name: replaced(getattr(value, name), part) for name in names}
    return type(value).__tensor_unflatten__(
        cast("dict[str, Tensor]", inner), context, value.size(), value.stride()
    )
