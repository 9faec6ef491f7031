"""Writing pruned models for other runtimes, and running what was written.

``write_onnx`` and ``write_tensorrt`` write a folder, and ``load`` gives an object with
``generate`` for it.
"""

from __future__ import annotations

if __name__ != "vtprune_fx.export":
    raise ImportError("import vtprune_fx.export: a bare `export` makes second classes")

from vtprune_fx.export.manifest import is_export
from vtprune_fx.export.onnx_model import OnnxModel, require_onnxruntime
from vtprune_fx.export.opening import load
from vtprune_fx.export.tensorrt_model import TensorRTModel
from vtprune_fx.export.tensorrt_profile import Sizes, Span
from vtprune_fx.export.to_onnx import (
    OnnxOptions,
    export_onnx,
    prefill_inputs,
    write_onnx,
)
from vtprune_fx.export.to_tensorrt import write_tensorrt
from vtprune_fx.export.to_triton import write_triton

__all__ = [
    "OnnxModel",
    "OnnxOptions",
    "Sizes",
    "Span",
    "TensorRTModel",
    "export_onnx",
    "is_export",
    "load",
    "prefill_inputs",
    "require_onnxruntime",
    "write_onnx",
    "write_tensorrt",
    "write_triton",
]
