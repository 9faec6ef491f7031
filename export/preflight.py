"""What TensorRT's parser refuses in a graph, ahead of anything slow.

The parser stops at the first node that it refuses. To name them all, what such a node
gives is made an input of the graph, and the rest is parsed again.
"""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vtprune_fx.errors import ExportError
from vtprune_fx.export.tensorrt_library import library, log

if TYPE_CHECKING:
    import onnx_ir

_SCOPES, _TRACE = "pkg.torch.onnx.name_scopes", "pkg.torch.onnx.stack_trace"
"""Where torch.onnx notes what a node was made of."""


@dataclass(frozen=True)
class Parsed:
    """A network, and the parser that owns its weights."""

    network: Any
    parser: Any


@dataclass(frozen=True)
class Refusal:
    """A node that the parser refuses.

    Attributes:
        node: Its name in the graph.
        operator: What it is.
        module: Path of the module that it came from, as ``named_modules`` has it.
        source: File and line that it came from.
        reason: What the parser says.
    """

    node: str
    operator: str
    module: str
    source: str
    reason: str

    def __str__(self) -> str:
        place = f"module {self.module or '(the model itself)'}, {self.source}"
        return f"{self.operator} ({self.node}) in {place}: {self.reason}"


def parse(builder: Any, file: Path) -> Parsed:
    """Parse a graph into a network.

    Args:
        builder: A TensorRT builder.
        file: An ONNX file, its weights beside it.

    Raises:
        ExportError: The parser refuses nodes; the message names every one.
    """
    import onnx_ir  # noqa: PLC0415 - an optional package

    model = onnx_ir.load(file)
    parsed = _parse(builder, model, file)
    if not parsed.parser.num_errors:
        return parsed
    refusals = _refusals(builder, model, file, parsed.parser)
    raise ExportError(
        f"graph {file.stem}",
        expected="operators that TensorRT takes",
        found=f"{len(refusals)} that its parser refuses:\n"
        + "\n".join(map(str, refusals)),
        fix="\nChange these modules, or run the model on ONNX Runtime.",
    )


def _parse(builder: Any, model: onnx_ir.Model, file: Path) -> Parsed:
    import onnx_ir  # noqa: PLC0415 - an optional package

    trt = library()
    flag = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    network = builder.create_network(flag)
    parser = trt.OnnxParser(network, log())
    parser.parse(onnx_ir.to_proto(model).SerializeToString(), str(file))
    return Parsed(network, parser)


def _refusals(
    builder: Any, model: onnx_ir.Model, file: Path, parser: Any
) -> list[Refusal]:
    """Every node that is refused, in order; empties the graph of them."""
    found: list[Refusal] = []
    while parser.num_errors:
        error = parser.get_error(0)
        named = {node.name: node for node in model.graph}
        node = named.get(error.node_name())
        if node is None:  # about the graph as a whole
            found += [] if found else [Refusal("", "the graph", "", "", error.desc())]
            break
        found.append(_refusal(node, error.desc()))
        if not _take_out(model.graph, node):
            break
        parser = _parse(builder, model, file).parser
    return found


def _refusal(node: onnx_ir.Node, reason: str) -> Refusal:
    scopes = ast.literal_eval(node.metadata_props.get(_SCOPES, "[]"))
    frames = re.findall(
        r'File "(.+?)", line (\d+)', node.metadata_props.get(_TRACE, "")
    )
    source = ":".join(frames[-1]) if frames else "a place that is not known"
    # The last scope is the operator's own.
    module = scopes[-2] if len(scopes) > 1 else ""
    return Refusal(str(node.name), node.op_type, module, source, reason)


def _take_out(graph: onnx_ir.Graph, node: onnx_ir.Node) -> bool:
    """Replace a node by inputs, or say that it gives something of unknown type."""
    import onnx_ir  # noqa: PLC0415 - an optional package

    if any(value.type is None or value.shape is None for value in node.outputs):
        return False
    for value in node.outputs:
        given = onnx_ir.Value(name=value.name, type=value.type, shape=value.shape)
        for index, output in reversed(list(enumerate(graph.outputs))):
            if output is value:
                del graph.outputs[index]
        value.replace_all_uses_with(given)
        value.name = None
        graph.inputs.append(given)
    graph.remove(node)
    return True
