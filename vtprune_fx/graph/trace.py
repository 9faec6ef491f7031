"""Functions as the nodes they trace to."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch._dispatch.python import enable_python_dispatcher
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from vtprune_fx.graph.sizes import size_expr
from vtprune_fx.graph.values import value_at_full_length

Operator = Callable[..., object]
"""An operator of torch, or a function of Python's module ``operator``."""


def kind_of(value: object) -> object:
    """What a traced function may depend on in a value: equal kinds trace alike."""
    if isinstance(value, torch.SymInt):
        return value.node.expr
    if isinstance(value, (tuple, list)):
        return tuple(map(kind_of, value))
    if not isinstance(value, Tensor):
        return value
    sizes = tuple(map(size_expr, (*value.shape, *value.stride())))
    return value.dtype, value.device, value.dim(), sizes


def traced(
    function: Callable[..., Tensor],
    args: tuple[object, ...],
    mode: FakeTensorMode,
    definitions: Mapping[OpOverload, Callable[..., Tensor]],
) -> Graph:
    """The graph of ``function(*args)``, a placeholder for each node in ``args``.

    Args:
        function: Takes tensors for the nodes, returns a tensor.
        args: Nodes and constants, or tuples of them.
        mode: The fake mode of the nodes' values.
        definitions: Operators that the function calls, and what is traced in their
            place.
    """
    leaves, form = pytree.tree_flatten(args)

    def with_constants(*tensors: Tensor) -> Tensor:
        given = iter(tensors)
        filled = [next(given) if isinstance(a, Node) else a for a in leaves]
        return function(*pytree.tree_unflatten(filled, form))

    nodes = (leaf for leaf in leaves if isinstance(leaf, Node))
    with mode, enable_python_dispatcher():
        # Another for each: nodes of a kind may share a value, and tracing
        # distinguishes arguments by identity.
        examples = [_like(value_at_full_length(node)) for node in nodes]
        module = make_fx(
            with_constants,
            dict(definitions),
            tracing_mode="real",
            pre_dispatch=True,
        )(*examples)
    assert not module.graph.find_nodes(op="get_attr"), f"{function} has constants"
    module.graph.eliminate_dead_code()
    return module.graph


def _like(value: object) -> object:
    if not isinstance(value, Tensor):
        return value
    return torch.empty_strided(
        value.shape, value.stride(), dtype=value.dtype, device=value.device
    )
