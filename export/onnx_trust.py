"""What the graphs of an ONNX export may hold, checked before anything opens them.

Every message of the file is looked at, at every depth: graphs inside of operators,
local functions and the defaults of their attributes, sparse weights. Refused are
weights outside of the graph's file of weights, and all operators but ONNX's and
those that exports hold. A local function cannot take the name of an operator: ONNX
Runtime would run its operator in the function's place.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx
from google.protobuf.message import DecodeError

from vtprune_fx.export.manifest import refused
from vtprune_fx.export.trust import COMPONENTS, DISTRUST
from vtprune_fx.files import read_whole

if TYPE_CHECKING:
    from google.protobuf.message import Message

_RUNTIME_OPERATORS = frozenset({"MatMulNBits"})
"""Operators of ONNX Runtime's, not of ONNX, that exports hold."""

_FUNCTIONS = frozenset({"vtprune"})
"""Domains of the functions that exports hold."""

_ONNX = ("", "ai.onnx")

_LOCATION = frozenset({"location", "offset", "length", "checksum"})

_MOST_BYTES = 2**31
"""No graph is larger: protobuf has no longer messages."""


def check_graphs(folder: Path) -> None:
    """Check that a folder's graphs read nothing but their weights.

    Raises:
        ExportError: They might.
    """
    for name in COMPONENTS:
        _check_graph(folder, f"{name}.onnx")


def _check_graph(folder: Path, name: str) -> None:
    model = onnx.ModelProto()
    try:
        model.ParseFromString(read_whole(folder / name, _MOST_BYTES))
    except (OSError, DecodeError) as error:
        raise refused(folder, f"{name} to be ONNX", str(error)) from error
    if not model.graph.node or not model.graph.output:
        raise refused(folder, f"{name} to be ONNX", "a graph without outputs")
    functions = {(f.domain, f.name, f.overload) for f in model.functions}
    for domain, function, _ in functions:
        if domain not in _FUNCTIONS:
            found = f"a function {domain}::{function}"
            raise refused(folder, f"{name} to hold ONNX operators", found, DISTRUST)
    if model.training_info:
        raise refused(folder, f"{name} without training", "training_info", DISTRUST)
    for message in _messages(model):
        if isinstance(message, onnx.TensorProto):
            _check_weights(folder, name, message)
        elif isinstance(message, onnx.NodeProto) and not _is_known(message, functions):
            found = f"operator {message.domain}::{message.op_type}"
            raise refused(folder, f"{name} to hold ONNX operators", found, DISTRUST)


def _check_weights(folder: Path, name: str, tensor: Any) -> None:
    """Check that a tensor is in the graph, or in the file of its weights."""
    entries = [(entry.key, entry.value) for entry in tensor.external_data]
    if tensor.data_location != onnx.TensorProto.EXTERNAL and not entries:
        return
    data, expected = f"{name}.data", f"{name} to have its weights in {name}.data"
    where = dict(entries)
    if where.get("location") != data:
        raise refused(folder, expected, f"weights in {where.get('location')!r}")
    size = (folder / data).stat().st_size if (folder / data).is_file() else 0
    numbers = [where.get("offset", "0"), where.get("length", "0")]
    fits = all(
        n.isascii() and n.isdigit() and len(n) < len(str(2**63)) for n in numbers
    )
    if not set(where) <= _LOCATION or len(where) < len(entries) or not fits:
        raise refused(folder, expected, f"a strange place of {tensor.name!r}")
    if sum(map(int, numbers)) > size:
        found = f"{tensor.name!r} beyond the {size:,} bytes of it"
        raise refused(folder, expected, found)


def _is_known(node: Any, functions: set[tuple[str, str, str]]) -> bool:
    """Whether an operator is ONNX's, one of ours, or a function of the graph's file."""
    if node.domain in _ONNX:
        return bool(onnx.defs.has(node.op_type))
    if node.domain in _FUNCTIONS:
        return (node.domain, node.op_type, node.overload) in functions
    return node.domain == "com.microsoft" and node.op_type in _RUNTIME_OPERATORS


def _messages(message: Message) -> Iterator[Message]:
    """A message and all in it, at every depth but for pairs of strings."""
    waiting = [message]
    while waiting:
        current = waiting.pop()
        yield current
        for field, value in current.ListFields():
            if field.message_type is None or field.message_type.name in _STRINGS:
                continue
            waiting += value if field.is_repeated else [value]


_STRINGS = ("StringStringEntryProto", "OperatorSetIdProto")
