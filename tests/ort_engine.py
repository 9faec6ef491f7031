"""A stand-in for a TensorRT engine on a machine without GPU: ONNX Runtime behind the
same calls. Tensors come as addresses, as they do to an engine."""

from __future__ import annotations

import ctypes
import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx_ir
import onnxruntime

Shape = tuple[int, ...]

_NAMES = {"FLOAT": "FLOAT", "FLOAT16": "HALF", "INT64": "INT64"}


class OrtEngine:
    """Engine and execution context in one.

    Args:
        model: The graph.
        ranges: For each input its smallest, usual and largest shape.
    """

    def __init__(self, model: onnx_ir.Model, ranges: dict[str, list[Shape]]) -> None:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        serialized = onnx_ir.to_proto(model).SerializeToString()
        self._session = onnxruntime.InferenceSession(serialized, options)
        self._inputs = {str(value.name): value for value in model.graph.inputs}
        self._outputs = {str(value.name): value for value in model.graph.outputs}
        # An engine does not promise the graph's order.
        self._names = sorted([*self._inputs, *self._outputs])
        self._ranges = ranges
        self._shapes: dict[str, Shape] = {}
        self._addresses: dict[str, int] = {}
        self.runs = 0
        self.num_io_tensors = len(self._names)

    def create_execution_context(self) -> OrtEngine:
        return self

    def get_tensor_name(self, index: int) -> str:
        return self._names[index]

    def get_tensor_dtype(self, name: str) -> Any:
        return SimpleNamespace(name=_NAMES[self._value(name).dtype.name])  # type: ignore[union-attr]

    def get_tensor_profile_shape(self, name: str, profile: int) -> list[Shape]:
        assert profile == 0
        return self._ranges[name]

    def set_input_shape(self, name: str, shape: Shape) -> bool:
        self._shapes[name] = shape
        return True

    def get_tensor_shape(self, name: str) -> Shape:
        sizes: dict[str, int] = {}
        for given, shape in self._shapes.items():
            symbols = self._inputs[given].shape
            assert symbols is not None
            sizes |= {str(s): n for s, n in zip(symbols, shape, strict=True)}
        dims = self._outputs[name].shape
        assert dims is not None
        return tuple(int(n) for n in dims.evaluate(sizes).numpy())

    def set_tensor_address(self, name: str, address: int) -> bool:
        self._addresses[name] = address
        return address != 0

    def execute_async_v3(self, stream: int) -> bool:
        feed = {name: self._memory(name, self._shapes[name]) for name in self._inputs}
        results = self._session.run(list(self._outputs), feed)
        for name, result in zip(self._outputs, results, strict=True):
            assert result.shape == self.get_tensor_shape(name)
            self._memory(name, result.shape)[...] = result
        self.runs += 1
        return stream == 0

    def _value(self, name: str) -> onnx_ir.Value:
        return (self._inputs | self._outputs)[name]

    def _memory(self, name: str, shape: Shape) -> np.ndarray[Any, Any]:
        dtype = self._value(name).dtype
        assert dtype is not None
        size = math.prod(shape) * dtype.numpy().itemsize
        held = (ctypes.c_byte * size).from_address(self._addresses[name])
        return np.frombuffer(memoryview(held), dtype=dtype.numpy()).reshape(shape)
