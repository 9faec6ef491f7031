"""Writing pruned models for other runtimes, and running the written folders.

``write_onnx`` and ``write_tensorrt`` write a folder; ``load`` returns an object with
``generate`` for it. ``register_target`` adds another runtime: its exporter writes a
folder with ``write_export``, and ``load`` opens it through the target's record.
"""

from __future__ import annotations

if __name__ != "vtprune_fx.export":
    raise ImportError("import vtprune_fx.export: a bare `export` makes second classes")

from vtprune_fx.export.folder import write_export
from vtprune_fx.export.graph_model import GraphModel, GraphRunner
from vtprune_fx.export.manifest import Manifest, is_export
from vtprune_fx.export.onnx_model import OnnxModel, require_onnxruntime
from vtprune_fx.export.opening import load
from vtprune_fx.export.target import (
    ExportTarget,
    GraphSpec,
    TensorSpec,
    TritonSupport,
    register_target,
)
from vtprune_fx.export.tensorrt_model import TensorRTModel
from vtprune_fx.export.tensorrt_profile import EngineSizes, Span
from vtprune_fx.export.to_onnx import (
    OnnxOptions,
    export_onnx,
    manifest_fields,
    write_onnx,
)
from vtprune_fx.export.to_tensorrt import write_tensorrt
from vtprune_fx.export.to_triton import write_triton
from vtprune_fx.models.encoding import prefill_inputs

Sizes = EngineSizes
"""The earlier name of ``EngineSizes``."""

__all__ = [
    "EngineSizes",
    "ExportTarget",
    "GraphModel",
    "GraphRunner",
    "GraphSpec",
    "Manifest",
    "OnnxModel",
    "OnnxOptions",
    "Sizes",
    "Span",
    "TensorRTModel",
    "TensorSpec",
    "TritonSupport",
    "export_onnx",
    "is_export",
    "load",
    "manifest_fields",
    "prefill_inputs",
    "register_target",
    "require_onnxruntime",
    "write_export",
    "write_onnx",
    "write_tensorrt",
    "write_triton",
]
