"""The TensorRT that is installed: the full one, else TensorRT for RTX.

Both have the same interface; the second builds and parses without a GPU.
Only ``compute_capability`` and the manifest differ.
"""

from __future__ import annotations

import functools
import importlib
from typing import TYPE_CHECKING, Any

from vtprune_fx.errors import InputError, MissingDependencyError

if TYPE_CHECKING:
    from vtprune_fx.export.tensorrt_types import Builder, Log, Named

_NAMES = ("tensorrt", "tensorrt_rtx")


@functools.cache
def library() -> Any:
    """The module ``tensorrt`` where it works, else ``tensorrt_rtx``.

    Raises:
        MissingDependencyError: Neither can be imported.
    """
    for name in _NAMES:
        try:
            return importlib.import_module(name)
        except (ImportError, OSError):  # also bindings whose libraries are missing
            continue
    raise MissingDependencyError(
        "TensorRT",
        expected="the package tensorrt or tensorrt-rtx",
        found="neither can be imported",
        fix='Run `pip install "vtprune-fx[tensorrt]"` on a machine with an NVIDIA GPU, '
        'or `pip install "vtprune-fx[tensorrt-rtx]"` to build engines anywhere.',
    )


def version() -> dict[str, str]:
    """Name and version of the library, as the manifest has it."""
    module = library()
    return {module.__name__: module.__version__}


@functools.cache
def log() -> Log:
    """The only logger of the process: TensorRT allows no second one.

    Its list ``errors`` holds what went wrong since it was last cleared. Nothing is
    printed.
    """
    base = library().ILogger
    wrong = {base.Severity.INTERNAL_ERROR, base.Severity.ERROR}

    class Errors(base):  # type: ignore[misc, valid-type] # the library is not typed
        def __init__(self) -> None:
            super().__init__()
            self.errors: list[str] = []

        def log(self, severity: object, message: str) -> None:
            if severity in wrong:
                self.errors.append(message)

    errors: Log = Errors()
    return errors


def new_builder() -> Builder:
    """A builder that reports errors to ``log``."""
    builder: Builder = library().Builder(log())
    return builder


def compute_capability(text: str | None) -> Named | None:
    """What ``set_compute_capability`` takes for ``8.9``, or None for None.

    Raises:
        InputError: The library does not build for it.
        MissingDependencyError: There is no library.
    """
    kinds = getattr(library(), "ComputeCapability", None)
    if text is None:
        return None
    known: dict[str, Named] = {
        f"{name[2:-1]}.{name[-1]}": member
        for name, member in getattr(kinds, "__members__", {}).items()
        if name.startswith("SM")
    }
    if text not in known:
        raise InputError(
            "--compute-capability",
            expected=f"one of {', '.join(known)}"
            if known
            else "none: full TensorRT builds for the GPU of the machine",
            found=text,
            fix="Omit it, or name another one.",
        )
    return known[text]
