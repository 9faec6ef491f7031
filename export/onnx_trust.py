"""What the graphs of an ONNX export may hold, checked before anything opens them.

Refused are graphs whose weights lie outside of the folder, and operators that load
files or libraries.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import onnx_ir

from vtprune_fx.export.manifest import refused
from vtprune_fx.export.trust import COMPONENTS, DISTRUST

_OWN_OPERATORS = frozenset({"MatMulNBits"})
"""ONNX Runtime's own operators that exports hold."""


def check_graphs(folder: Path) -> None:
    """Check that a folder's graphs read nothing but their own weights.

    Raises:
        ExportError: They might.
    """
    for name in COMPONENTS:
        _check_graph(folder, f"{name}.onnx")


def _check_graph(folder: Path, name: str) -> None:
    try:
        model = onnx_ir.load(folder / name)
    except Exception as error:  # whatever a parser says of what is no ONNX
        raise refused(folder, f"{name} to be ONNX", str(error)) from error
    data = f"{name}.data"
    for tensor in _tensors(model):
        if isinstance(tensor, onnx_ir.ExternalTensor) and tensor.location != data:
            found = f"weights in {tensor.location!r}"
            raise refused(folder, f"{name} to have its weights in {data}", found)
    for node in _nodes(model):
        if not _is_known(node, model):
            found = f"operator {node.domain}::{node.op_type}"
            raise refused(folder, f"{name} to hold ONNX operators", found, DISTRUST)


def _is_known(node: onnx_ir.Node, model: onnx_ir.Model) -> bool:
    """Whether an operator is ONNX's, one of ours, or a function of the graph's file."""
    if node.domain in ("", "ai.onnx") or node.op_identifier() in model.functions:
        return True
    return node.domain == "com.microsoft" and node.op_type in _OWN_OPERATORS


def _nodes(model: onnx_ir.Model) -> Iterator[onnx_ir.Node]:
    yield from model.graph.all_nodes()
    for function in model.functions.values():
        yield from function.all_nodes()


def _tensors(model: onnx_ir.Model) -> Iterator[object]:
    """All constants: initializers of all graphs, and attributes of nodes."""
    for graph in model.graphs():
        for value in graph.initializers.values():
            yield value.const_value
    for node in _nodes(model):
        for attribute in node.attributes.values():
            if attribute.type == onnx_ir.AttributeType.TENSOR:
                yield attribute.value
            elif attribute.type == onnx_ir.AttributeType.TENSORS:
                yield from attribute.value
