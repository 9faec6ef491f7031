"""Weight-only quantisation of an ONNX graph, by ONNX Runtime's own quantiser.

A ``MatMul`` with a constant matrix becomes a ``MatMulNBits``: the matrix in whole
numbers, a scale for each block of a column. What is multiplied with it stays as it is.
"""

from __future__ import annotations

import logging
from typing import Any, Literal

import torch
from transformers.exporters import ExportFormat, ExportQuantizer

Quantized = Literal["int8", "int4"]
"""What a matrix may be rounded to."""

BLOCK = 32
"""Rows of a column that share a scale."""


class WeightOnly(ExportQuantizer):
    """Rounds all weight matrices of a graph, in transformers' exporter.

    Args:
        to: What to.
    """

    supported_formats = (ExportFormat.ONNX,)
    required_packages = ("onnx", "onnx_ir", "onnxruntime")

    def __init__(self, to: Quantized) -> None:
        super().__init__()
        self._bits = {"int8": 8, "int4": 4}[to]

    def quantize(
        self, model: Any, sample_inputs: dict[str, Any], export_format: ExportFormat
    ) -> Any:
        """The graph with its matrices rounded; what is passed in is used up."""
        import onnx_ir  # noqa: PLC0415 - an optional package

        _transpose_weights(model.graph)
        quantizer = _quantizer()(
            onnx_ir.to_proto(model),
            bits=self._bits,
            block_size=BLOCK,
            is_symmetric=True,
        )
        quantizer.process()
        return onnx_ir.from_proto(quantizer.model.model)


def _quantizer() -> Any:
    """ONNX Runtime's quantiser, whose module sets up logging when it is imported."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    from onnxruntime.quantization import matmul_nbits_quantizer  # noqa: PLC0415 - optional

    root.handlers[:] = handlers
    root.setLevel(level)
    logging.getLogger(matmul_nbits_quantizer.__name__).setLevel(logging.ERROR)
    return matmul_nbits_quantizer.MatMulNBitsQuantizer


def _transpose_weights(graph: Any) -> None:
    """Store each linear layer's weight as its product reads it, under its own name."""
    import onnx_ir  # noqa: PLC0415 - an optional package

    for node in list(graph):
        weight = node.inputs[0] if node.op_type == "Transpose" else None
        if weight is None or not weight.is_initializer():
            continue
        matrix = weight.const_value.numpy().T.copy()
        tensor = onnx_ir.Tensor(matrix, name=f"{weight.name}.T")
        value = onnx_ir.Value(name=tensor.name, const_value=tensor)
        value.shape, value.dtype = onnx_ir.Shape(matrix.shape), tensor.dtype
        graph.register_initializer(value)
        onnx_ir.convenience.replace_all_uses_with(node.outputs[0], value)
        graph.remove(node, safe=True)
        if not weight.uses():
            graph.initializers.pop(weight.name)


def rounded(weight: torch.Tensor, to: Quantized) -> torch.Tensor:
    """A linear layer's weight as a graph holds it once it was rounded.

    By a graph of one product, with the identity.

    Args:
        weight: [out, in].
        to: What to.

    Returns:
        [out, in] float32.
    """
    import onnx_ir  # noqa: PLC0415 - an optional package
    import onnxruntime  # noqa: PLC0415 - an optional package

    matrix = onnx_ir.tensor(weight.detach().float().T.numpy().copy(), name="weight")
    rows, columns = weight.shape[1], weight.shape[0]
    value = onnx_ir.Value(name="weight", const_value=matrix)
    value.shape, value.dtype = onnx_ir.Shape([rows, columns]), matrix.dtype
    kind = onnx_ir.TensorType(matrix.dtype)
    one = onnx_ir.Value(name="one", shape=onnx_ir.Shape([rows, rows]), type=kind)
    product = onnx_ir.node("MatMul", [one, value])
    [output] = product.outputs
    output.dtype, output.shape = matrix.dtype, onnx_ir.Shape([rows, columns])
    graph = onnx_ir.Graph(
        [one], [output], nodes=[product], initializers=[value], opset_imports={"": 20}
    )
    model = WeightOnly(to).quantize(
        onnx_ir.Model(graph, ir_version=10), {}, ExportFormat.ONNX
    )
    session = onnxruntime.InferenceSession(onnx_ir.to_proto(model).SerializeToString())
    identity = torch.eye(rows).numpy()
    [found] = session.run(None, {"one": identity})
    return torch.from_numpy(found).T.contiguous()
