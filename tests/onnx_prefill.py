"""Running an exported prefill graph on ONNX Runtime, its keep sets made outputs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import onnx_ir
import onnxruntime
import torch

from tests.tiny import Inputs, counted_positions
from vtprune_fx.export.graph_outputs import causal_output_of
from vtprune_fx.planning.report import in_prompt
from vtprune_fx.selection.recycling import keep_set

if TYPE_CHECKING:
    from vtprune_fx.recipes.schema import Recipe


class Prefill:
    """The prefill graph on ONNX Runtime.

    Attributes:
        outputs: Logits, and a cache with ``layers[i].keys``, as the comparison reads.
        keep_sets: For each layer with a cut, positions in the prompt as it came.
    """

    def __init__(self, graph: onnx_ir.Model, inputs: Inputs, recipe: Recipe) -> None:
        keep_names = _show_keep_sets(graph)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        serialized = onnx_ir.to_proto(graph).SerializeToString()
        session = onnxruntime.InferenceSession(serialized, options)
        names = [spec.name for spec in session.get_outputs()]
        feed = inputs | {"position_ids": counted_positions(inputs)}
        arrays = session.run(None, {name: feed[name].numpy() for name in feed})
        values = {n: torch.from_numpy(a) for n, a in zip(names, arrays, strict=True)}
        self.outputs = causal_output_of(values)
        found = {}
        for cut, name in zip(recipe.cuts, keep_names, strict=True):
            new = recipe.new_tokens(cut.drop)
            found[cut.layer] = keep_set(values[name], new) if new else values[name]
        self.keep_sets = in_prompt(found)


def _show_keep_sets(model: onnx_ir.Model) -> list[str]:
    """Make outputs of the keep sets, and name them in order.

    A cut sorts twice: tokens by score, then what stays by position. The values of the
    second sort, whose input is a part of the first's indices, are the keep set, or
    with new tokens the keys that it is made of.
    """
    shown = {value.name for value in model.graph.outputs}
    keep_sets = [
        node.outputs[0]
        for node in model.graph
        if node.op_type == "TopK" and _sorts_positions(node)
    ]
    for value in keep_sets:
        if value.name not in shown:
            value.type = onnx_ir.TensorType(onnx_ir.DataType.INT64)
            value.shape = onnx_ir.Shape([None, None])
            model.graph.outputs.append(value)
    return [str(value.name) for value in keep_sets]


def _sorts_positions(node: onnx_ir.Node) -> bool:
    """Whether what it sorts is a part of another sort's indices."""
    passed, value = [], node.inputs[0]
    while value is not None and (source := value.producer()) is not None:
        if source.op_type == "TopK":
            return "Slice" in passed
        if source.op_type not in {"Slice", "Mul", "Concat"}:
            return False
        passed.append(source.op_type)
        value = source.inputs[0]
    return False
