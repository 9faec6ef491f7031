"""Weight-only quantisation of an ONNX graph, by ONNX Runtime's quantiser.

A ``MatMul`` with a constant matrix becomes a ``MatMulNBits``: the matrix in integers,
with a scale for each block of a column. The other factor is not rounded.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, Literal

import torch
from transformers.exporters import ExportFormat, ExportQuantizer

if TYPE_CHECKING:
    import onnx_ir

Quantized = Literal["int8", "int4"]
"""What a matrix may be rounded to."""

BLOCK = 32
"""Rows of a column that share a scale."""


class WeightOnly(ExportQuantizer):
    """Rounds all weight matrices of a graph, in transformers' exporter.

    Args:
        to: The type to round to.
    """

    supported_formats = (ExportFormat.ONNX,)
    required_packages = ("onnx", "onnx_ir", "onnxruntime")

    def __init__(self, to: Quantized) -> None:
        super().__init__()
        self._bits = {"int8": 8, "int4": 4}[to]

    def quantize(
        self,
        model: onnx_ir.Model,
        sample_inputs: dict[str, object],
        export_format: ExportFormat,
    ) -> onnx_ir.Model:
        """The graph with its matrices rounded. ``model`` must not be used again."""
        import onnx_ir  # noqa: PLC0415 - an optional package

        _transpose_weights(model.graph)
        quantizer = _quantizer()(
            onnx_ir.to_proto(model),
            bits=self._bits,
            block_size=BLOCK,
            is_symmetric=True,
        )
        quantizer.process()
        rounded_model: onnx_ir.Model = onnx_ir.from_proto(quantizer.model.model)
        return rounded_model


def _quantizer() -> Any:
    """ONNX Runtime's quantiser class (untyped); keeps the logging set-up as it was."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    from onnxruntime.quantization import matmul_nbits_quantizer  # noqa: PLC0415 - optional

    root.handlers[:] = handlers
    root.setLevel(level)
    logging.getLogger(matmul_nbits_quantizer.__name__).setLevel(logging.ERROR)
    return matmul_nbits_quantizer.MatMulNBitsQuantizer


def _transpose_weights(graph: onnx_ir.Graph) -> None:
    """Store each linear layer's weight transposed, as its product reads it."""
    import onnx_ir  # noqa: PLC0415 - an optional package

    for node in list(graph):
        weight = node.inputs[0] if node.op_type == "Transpose" else None
        if weight is None or not weight.is_initializer():
            continue
        assert weight.const_value is not None, "an initializer has a value"
        matrix = weight.const_value.numpy().T.copy()
        tensor = onnx_ir.Tensor(matrix, name=f"{weight.name}.T")
        value = onnx_ir.Value(name=tensor.name, const_value=tensor)
        value.shape, value.dtype = onnx_ir.Shape(matrix.shape), tensor.dtype
        graph.register_initializer(value)
        onnx_ir.convenience.replace_all_uses_with(node.outputs[0], value)
        graph.remove(node, safe=True)
        if not weight.uses():
            graph.initializers.pop(str(weight.name))


def rounded(weight: torch.Tensor, to: Quantized) -> torch.Tensor:
    """A linear layer's weight with the rounding that a quantised graph gives it.

    Read from a graph that multiplies the weight with the identity.

    Args:
        weight: [out, in].
        to: The type to round to.

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
