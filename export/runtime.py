"""Running an exported folder, whatever its graphs run on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from vtprune_fx.export import manifest, onnx_model
from vtprune_fx.export.onnx_model import OnnxModel
from vtprune_fx.export.tensorrt_model import load_tensorrt

_LOADERS: dict[str, Callable[[Path, str | None], OnnxModel]] = {
    "onnx": onnx_model.load,
    "tensorrt": load_tensorrt,
}
"""What loads a folder, by the manifest's target."""


def load(folder: Path, device: str | None = None) -> OnnxModel:
    """Load an exported folder: an object with ``generate``.

    Args:
        folder: What ``vtprune export`` wrote.
        device: ``cpu`` or ``cuda``; left out, CUDA where it works. TensorRT's engines
            run on CUDA alone.

    Raises:
        ExportError: The folder is no whole export, or does not run on ``device``.
        MissingDependencyError: The runtime is not installed.
    """
    return _LOADERS[manifest.read(folder).target](folder, device)
