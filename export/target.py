"""The runtimes that exports are written for: one record each.

A record is all that loading, checking, ``vtprune verify`` and ``vtprune export triton``
know of a runtime. ``register_target`` adds one from outside of this package.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from vtprune_fx.errors import ExportError, InputError
from vtprune_fx.export.graph_model import GraphModel
from vtprune_fx.export.manifest import Manifest

Opener = Callable[[Path, Manifest, str | None], GraphModel]
"""Opens a checked folder: the folder, its manifest, and the device or None."""


@dataclass(frozen=True)
class TensorSpec:
    """An input or output of a graph.

    Attributes:
        name: Its name.
        type: Its type as ONNX names it: ``FLOAT16``.
        dims: Its sizes, -1 where they vary.
    """

    name: str
    type: str
    dims: tuple[int, ...]


@dataclass(frozen=True)
class GraphSpec:
    """What one graph of an export takes and returns."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


@dataclass(frozen=True)
class TritonSupport:
    """How Triton Inference Server runs the graphs of a target.

    Attributes:
        backend: Triton's name of the runtime.
        read: Takes a checked folder, its manifest and the number of prompts that Triton
            may join; returns the graphs by component name, or raises an ``ExportError``
            or ``InputError`` where Triton cannot run them.
    """

    backend: str
    read: Callable[[Path, Manifest, int], Mapping[str, GraphSpec]]


@dataclass(frozen=True)
class ExportTarget:
    """A runtime that exports are written for.

    Attributes:
        name: Its name in manifests, and transformers' name of the export format.
        suffix: End of the name of a graph's file, with the dot.
        open: Opens a folder whose files were checked.
        shows_keep_sets: Whether ``show_keep_sets`` of the opened model works, which
            ``vtprune verify`` needs.
        triton: How Triton runs the graphs; None if it does not.
    """

    name: str
    suffix: str
    open: Opener
    shows_keep_sets: bool = False
    triton: TritonSupport | None = None


_TARGETS: dict[str, ExportTarget] = {}


def register_target(target: ExportTarget) -> ExportTarget:
    """Make exports for a runtime loadable.

    Args:
        target: Its record.

    Returns:
        The record.

    Raises:
        InputError: Another record has its name.
    """
    if _TARGETS.setdefault(target.name, target) != target:
        raise InputError(
            f"export target {target.name!r}",
            expected="a name that no other target has",
            found="another target of this name",
            fix="Choose another name.",
        )
    return target


def target_of(folder: Path, contents: Manifest) -> ExportTarget:
    """The record of the runtime that a folder was written for.

    Raises:
        ExportError: No target of this name is registered.
    """
    return find_target(contents.target, f"export {folder}")


def find_target(name: str, where: str) -> ExportTarget:
    """The record with a name.

    Args:
        name: The target's name.
        where: What an error says first.

    Raises:
        ExportError: No target of this name is registered.
    """
    if name not in _TARGETS:
        raise ExportError(
            where,
            expected=f"a target among {', '.join(_TARGETS)}",
            found=repr(name),
            fix="Import the package that registers this target, or write the folder "
            "again with `vtprune export`.",
        )
    return _TARGETS[name]
