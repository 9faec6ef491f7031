"""Write the operators of rank rules for ONNX, which lacks them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.fx import GraphModule

from vtprune_fx.graph.insert import Inserter
from vtprune_fx.graph.stamps import Stamp, StampKind
from vtprune_fx.selection import attention_rank, recycling

if TYPE_CHECKING:
    import onnx_ir

_DOMAIN = "vtprune"


def spell_rank(module: GraphModule) -> None:
    """Replace these operators in a graph, in place; the rank by a function's name."""
    spelled: dict[object, Callable[..., Tensor]] = {
        attention_rank.attention_rank: _named,
        attention_rank.merge: recycling.merge,
    }
    graph, stamp = module.graph, Stamp(StampKind.CHOICE)
    nodes = [node for node in graph.nodes if node.target in spelled]
    for node in nodes:
        written = Inserter(graph).trace(node, stamp, spelled[node.target], *node.args)
        node.replace_all_uses_with(written)
        graph.erase_node(node)
    if nodes:
        module.recompile()


def _named(attended: Tensor, roles: Tensor) -> Tensor:
    of, name = (attended, roles), f"{_DOMAIN}::AttentionRank"
    return torch.onnx.ops.symbolic(name, of, dtype=torch.int64, shape=(), version=1)


def define_rank(model: onnx_ir.Model) -> None:
    """Add the function to a model that names it."""
    if not any(node.domain == _DOMAIN for node in model.graph.all_nodes()):
        return
    # onnxscript is an optional package.
    from vtprune_fx.export.onnx_rank_functions import FUNCTIONS  # noqa: PLC0415 - optional

    for function in FUNCTIONS:
        made = function.function_ir
        model.functions[made.identifier()] = made
    model.graph.opset_imports[_DOMAIN] = 1
