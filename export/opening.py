"""Running an exported folder, whatever its graphs run on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from vtprune_fx.export.manifest import Manifest
from vtprune_fx.export.onnx_model import OnnxModel, open_onnx
from vtprune_fx.export.tensorrt_model import open_tensorrt
from vtprune_fx.export.trust import trusted

_OPENERS: dict[str, Callable[[Path, Manifest, str | None], OnnxModel]] = {
    "onnx": open_onnx,
    "tensorrt": open_tensorrt,
}
"""What opens a folder that was found whole and safe, by the manifest's target."""


def load(folder: Path, device: str | None = None) -> OnnxModel:
    """Load an exported folder: an object with ``generate``.

    No code in the folder runs, and no path leads out of it.

    Args:
        folder: What ``vtprune export`` wrote.
        device: ``cpu`` or ``cuda``; left out, CUDA where it works. TensorRT's engines
            run on CUDA alone.

    Raises:
        ExportError: The folder is no whole export, holds what is not safe to load, or
            does not run on ``device``.
        MissingDependencyError: The runtime is not installed.
    """
    contents = trusted(folder)
    return _OPENERS[contents.target](folder, contents, device)
