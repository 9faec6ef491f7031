"""What TensorRT's parser refuses in a graph, before anything slow.

The parser stops at the first node that it refuses. To name them all, the outputs of
such a node are made inputs of the graph, and the rest is parsed again.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import numpy.typing as npt

from vtprune_fx.errors import ExportError
from vtprune_fx.export.tensorrt_library import library, log

if TYPE_CHECKING:
    import onnx_ir

    from vtprune_fx.export.tensorrt_types import Builder, Network, Parser

_SCOPES, _TRACE = "pkg.torch.onnx.name_scopes", "pkg.torch.onnx.stack_trace"
"""Where torch.onnx notes what a node was made of."""


Weight: TypeAlias = npt.NDArray[np.generic]

_SMALL = 1024
"""Bytes up to which a constant stays in the graph: axes and the like."""


@dataclass(frozen=True)
class Parsed:
    """A network, the parser that it needs, and the weights that both read."""

    network: Network
    parser: Parser
    weights: Mapping[str, Weight]


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


def parse(builder: Builder, model: onnx_ir.Model, name: str) -> Parsed:
    """Parse a graph into a network. Weights are read where they are.

    Args:
        builder: A TensorRT builder.
        model: The graph. Where nodes are refused they are taken out of it.
        name: What errors call it.

    Raises:
        ExportError: The parser refuses nodes; the message names every one.
    """
    parsed = _parse(builder, model)
    if not parsed.parser.num_errors:
        return parsed
    refusals = _refusals(builder, model, parsed)
    raise ExportError(
        f"graph {name}",
        expected="operators that TensorRT takes",
        found=f"{len(refusals)} that its parser refuses:\n"
        + "\n".join(map(str, refusals)),
        fix="\nChange these modules, or run the model on ONNX Runtime.",
    )


def _parse(builder: Builder, model: onnx_ir.Model) -> Parsed:
    trt = library()
    flag = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    network = builder.create_network(flag)
    parser: Parser = trt.OnnxParser(network, log())
    graph, weights = _without_weights(model)
    parser.load_model_proto(graph)
    for name, array in weights.items():
        parser.load_initializer(name, array.ctypes.data, array.nbytes)
    parser.parse_model_proto()
    return Parsed(network, parser, weights)


def _without_weights(
    model: onnx_ir.Model,
) -> tuple[bytes, dict[str, Weight]]:
    """The serialised graph, and its weights apart: a file takes at most 2 GiB."""
    import onnx_ir  # noqa: PLC0415 - an optional package

    weights: dict[str, Weight] = {}
    kept = {}
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        if tensor is None or tensor.nbytes <= _SMALL:
            continue
        kept[name], weights[name] = tensor, np.ascontiguousarray(tensor.numpy())
        shape = onnx_ir.Shape(weights[name].shape)
        value.const_value = onnx_ir.ExternalTensor(
            "weights", 0, tensor.nbytes, tensor.dtype, shape=shape, name=name
        )
    graph = onnx_ir.to_proto(model).SerializeToString()
    for name, tensor in kept.items():
        model.graph.initializers[name].const_value = tensor
    return graph, weights


def _refusals(builder: Builder, model: onnx_ir.Model, parsed: Parsed) -> list[Refusal]:
    """Every node that is refused, in order; takes them out of the graph."""
    found: list[Refusal] = []
    while parsed.parser.num_errors:
        error = parsed.parser.get_error(0)
        named = {node.name: node for node in model.graph}
        node = named.get(error.node_name())
        if node is None:  # about the graph, not about a node
            found += [] if found else [Refusal("", "the graph", "", "", error.desc())]
            break
        found.append(_refusal(node, error.desc()))
        if not _take_out(model.graph, node):
            break
        parsed = _parse(builder, model)
    return found


def _refusal(node: onnx_ir.Node, reason: str) -> Refusal:
    scopes = ast.literal_eval(node.metadata_props.get(_SCOPES, "[]"))
    frames = re.findall(
        r'File "(.+?)", line (\d+)', node.metadata_props.get(_TRACE, "")
    )
    source = ":".join(frames[-1]) if frames else "an unknown place"
    # The last scope is the operator's, the one before it the module's.
    module = scopes[-2] if len(scopes) > 1 else ""
    return Refusal(str(node.name), node.op_type, module, source, reason)


def _take_out(graph: onnx_ir.Graph, node: onnx_ir.Node) -> bool:
    """Replace a node by inputs; False if an output's type or shape is unknown."""
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
