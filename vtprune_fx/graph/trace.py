"""Functions as the nodes they trace to."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, Node
from torch.fx.experimental.proxy_tensor import make_fx

from vtprune_fx.graph.sizes import size_expr
from vtprune_fx.graph.values import value_at_full_length


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
    definitions: Mapping[Any, Callable[..., Any]],
) -> Graph:
    """The graph of ``function(*args)``, a placeholder for each node among ``args``.

    Args:
        function: Takes tensors for the nodes, returns a tensor.
        args: Nodes and constants.
        mode: The fake mode of the nodes' values.
        definitions: Operators that the function calls, and what is traced in their
            place.
    """

    def with_constants(*tensors: Tensor) -> Tensor:
        given = iter(tensors)
        return function(*(next(given) if isinstance(a, Node) else a for a in args))

    nodes = (arg for arg in args if isinstance(arg, Node))
    with mode, enable_python_dispatcher():
        # One of its own for each: nodes of a kind may share a value, and tracing
        # tells arguments apart by identity.
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


def _like(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    return torch.empty_strided(
        value.shape, value.stride(), dtype=value.dtype, device=value.device
    )
