"""Loading an exported folder on whatever it was exported for."""

from __future__ import annotations

from pathlib import Path

from vtprune_fx.export import manifest, onnx_model
from vtprune_fx.export.onnx_model import OnnxModel
from vtprune_fx.export.tensorrt_model import load_tensorrt


def load(folder: Path, device: str | None = None) -> OnnxModel:
    """Load an exported folder.

    Args:
        folder: What ``vtprune export`` wrote.
        device: ``cpu`` or ``cuda``; left out, CUDA where it works. TensorRT's engines
            run on CUDA alone.

    Raises:
        ExportError: The folder is no whole export, or what runs it does not run on
            ``device``.
        MissingDependencyError: What runs it is not installed.
    """
    if manifest.read(folder).target == "tensorrt":
        return load_tensorrt(folder, device)
    return onnx_model.load(folder, device)
