"""Writing pruned models for other runtimes, and running what was written.

``export_onnx`` and ``load`` are the two calls: a folder is written by the first, and
the second gives an object with ``generate`` for it.
"""

from __future__ import annotations

if __name__ != "vtprune_fx.export":
    raise ImportError("import vtprune_fx.export: a bare `export` makes second classes")

from vtprune_fx.export.manifest import is_export
from vtprune_fx.export.onnx_model import OnnxModel, load, require_onnxruntime
from vtprune_fx.export.to_onnx import export_onnx, prefill_inputs, write_onnx

__all__ = [
    "OnnxModel",
    "export_onnx",
    "is_export",
    "load",
    "prefill_inputs",
    "require_onnxruntime",
    "write_onnx",
]
