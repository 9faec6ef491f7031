"""Graphs that hold their weights, as Dynamo makes them where inductor freezes.

Passes read graphs whose weights are inputs. So weights are lifted out before the
passes and put back after them, where inductor folds and packs them.

Before ``lifted``, and after ``hold``::

    ids: "i64[1, 31]"
    weight: "f32[64, 32]" = self.l__self___embed_tokens_weight

Between the two::

    ids: "i64[1, 31]"
    weight: "f32[64, 32]"
"""

from __future__ import annotations

import copy

from torch import Tensor
from torch.fx import GraphModule, Interpreter
from torch.nn import Parameter

from vtprune_fx.capture.subclasses import parts


def lifted(module: GraphModule) -> tuple[GraphModule, list[Tensor]]:
    """Make inputs of the tensors that a graph holds.

    Args:
        module: Dynamo's graph; not changed.

    Returns:
        The same graph with further inputs after its inputs, and the tensors to pass
        there. A graph that holds none is returned as it is.
    """
    found = _held(module)
    if not found:
        return module, []
    graph = copy.deepcopy(module.graph)
    named = {node.name: node for node in graph.nodes}
    last = graph.find_nodes(op="placeholder")[-1]
    for name in found:
        with graph.inserting_after(last):
            last = graph.placeholder(name)
        last.meta = named[name].meta
        named[name].replace_all_uses_with(last)
        graph.erase_node(named[name])
    return GraphModule(module, graph), list(found.values())


def _held(module: GraphModule) -> dict[str, Tensor]:
    """Tensors by the names of the nodes that read them."""
    interpreter = Interpreter(module)
    values = {
        node.name: interpreter.fetch_attr(str(node.target))
        for node in module.graph.find_nodes(op="get_attr")
    }
    return {name: each for name, each in values.items() if isinstance(each, Tensor)}


def hold(module: GraphModule, weights: list[Tensor]) -> None:
    """Put tensors that were lifted out of a graph back into it.

    Args:
        module: A graph whose last inputs are those tensors, or their parts
            (``subclasses.parts``). Changed in place.
        weights: The tensors.
    """
    tensors = parts(weights)
    inputs = list(module.graph.find_nodes(op="placeholder"))
    for node, tensor in zip(inputs[len(inputs) - len(tensors) :], tensors, strict=True):
        assert isinstance(tensor, Tensor), "tensors are made of tensors"
        name = f"held_{node.name}"
        if isinstance(tensor, Parameter):
            module.register_parameter(name, tensor)
        else:
            module.register_buffer(name, tensor)
        with module.graph.inserting_before(node):
            held = module.graph.get_attr(name)
        held.meta = node.meta
        node.replace_all_uses_with(held)
        module.graph.erase_node(node)
    module.recompile()
