"""What an ONNX export may hold, checked before anything opens its files.

A folder may come from anywhere and its manifest agree with it, so hashes say nothing
about who wrote it. Refused are names of Python code, which transformers could be asked
to run, graphs whose weights lie outside of the folder, and operators that load files
or libraries.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx_ir

from vtprune_fx.export.manifest import refused

COMPONENTS = ("prefill", "decode")
"""The graphs of an export, and what the files with them are called."""

_DISTRUST = "Load it only where you trust who wrote it, with their own code."

_OWN_OPERATORS = frozenset({"MatMulNBits"})
"""ONNX Runtime's own operators that exports hold."""


def check_trust(folder: Path) -> None:
    """Check that loading a folder runs no code of its own and stays in it.

    Raises:
        ExportError: It might not.
    """
    for path in sorted(folder.iterdir()):
        if path.suffix == ".py":
            raise refused(folder, "no code", path.name, _DISTRUST)
        if path.suffix == ".json" and "auto_map" in _fields(folder, path.name):
            found = f"auto_map in {path.name}, which names Python code"
            raise refused(folder, "no code", found, _DISTRUST)
    _check_components(folder)
    for name in COMPONENTS:
        _check_graph(folder, f"{name}.onnx")


def _fields(folder: Path, name: str) -> dict[str, Any]:
    try:
        found = json.loads((folder / name).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise refused(folder, f"{name} to be JSON", str(error)) from error
    return found if isinstance(found, dict) else {}


def _check_components(folder: Path) -> None:
    """Check that transformers' own manifest names the two graphs and no other file."""
    fields = _fields(folder, "export.json")
    expected = {
        "export_format": "onnx",
        "files": {name: f"{name}.onnx" for name in COMPONENTS},
    }
    try:
        entries = fields["components"].items()
        files = {name: entry["file"] for name, entry in entries}
        found = {"export_format": fields["export_format"], "files": files}
    except (AttributeError, KeyError, TypeError) as error:
        raise refused(folder, "export.json with two graphs", repr(error)) from error
    if found != expected:
        raise refused(folder, f"export.json to say {expected}", str(found))


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
            raise refused(folder, f"{name} to hold ONNX operators", found, _DISTRUST)


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
