"""Inserting nodes into fx graphs.

``Graph.call_function`` gives a node an empty ``meta`` and ``Graph.lint`` does not mind;
here every inserted node gets its value, the place it came from, and a stamp.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterable, Mapping
from typing import TypeVar

import sympy
import torch
from torch import Tensor
from torch._dispatch.python import enable_python_dispatcher
from torch._ops import OpOverload
from torch.fx import Graph, Node, Proxy, map_arg
from torch.fx.experimental.symbolic_shapes import (
    compute_unbacked_bindings,
    free_unbacked_symbols,
)
from torch.fx.node import Argument
from torch.fx.proxy import GraphAppendingTracer
from torch.utils import _pytree as pytree
from torch.utils._sympy.interp import sympy_interp
from torch.utils._sympy.reference import PythonReferenceAnalysis

from vtprune_fx.graph.fakes import fake_mode_of
from vtprune_fx.graph.nodes import operator_of
from vtprune_fx.graph.sizes import Count
from vtprune_fx.graph.stamps import STAMP, Stamp
from vtprune_fx.graph.trace import Operator, kind_of, traced
from vtprune_fx.graph.values import (
    READ,
    dropped_tokens,
    set_value,
    value_at_full_length,
)

Args = TypeVar("Args")


class Inserter:
    """Inserts operators, and functions as the nodes they trace to.

    Running an operator on symbolic sizes costs more than remembering what came out, and
    a decoder's layers are alike: a function is traced once for each kind of arguments
    and copied afterwards, an operator run once. Equal kinds have equal sizes, so a
    copy's value is the remembered one.

    Args:
        graph: Where nodes are inserted.
        definitions: Operators that traced functions call, and what is traced in their
            place.
    """

    def __init__(
        self,
        graph: Graph,
        definitions: Mapping[OpOverload, Callable[..., Tensor]] | None = None,
    ) -> None:
        self._graph = graph
        self._definitions = dict(definitions or {})
        self._mode = fake_mode_of(graph)
        self._traced: dict[object, Graph] = {}
        self._values: dict[object, object] = {}

    def call(
        self,
        anchor: Node,
        stamp: Stamp,
        op: Operator,
        *args: Argument,
        drop: Count = 0,
        **kwargs: Argument,
    ) -> Node:
        """Insert one operator before ``anchor``.

        Args:
            anchor: The node whose place (module path, stack trace) the new one shares.
            stamp: Goes into the new node's ``meta``.
            op: The operator.
            args: Its arguments.
            drop: Tokens that the operator takes off its first argument. The result is
                then like that argument; otherwise its value is computed on fakes.
            kwargs: The operator's keyword arguments, none of them a node.
        """
        with self._graph.inserting_before(anchor):
            node = self._graph.call_function(op, args, kwargs)
        node.meta = _provenance(anchor, stamp)
        dropped = _add(map(dropped_tokens, node.all_input_nodes), drop)
        if drop:
            [first, *_] = node.all_input_nodes
            full = value_at_full_length(first)
        else:
            full = self.value(op, args, kwargs)
        set_value(node, full, dropped)
        return node

    def value(
        self,
        op: Operator,
        args: tuple[Argument, ...],
        kwargs: dict[str, Argument],
    ) -> object:
        """What ``op`` gives at full length; nodes stand for their values."""
        full = map_arg(args, value_at_full_length)
        named = sorted(map_arg(kwargs, value_at_full_length).items())
        key = (op, *map(kind_of, full), *((name, kind_of(v)) for name, v in named))
        if key not in self._values:
            with self._mode, enable_python_dispatcher():
                self._values[key] = op(*full, **dict(named))
        return self._values[key]

    def trace(
        self,
        anchor: Node,
        stamp: Stamp,
        function: Callable[..., Tensor],
        *args: object,
        dropped: Count = 0,
    ) -> Node:
        """Insert what ``function(*args)`` traces to, before ``anchor``.

        Args:
            anchor: As in ``call``.
            stamp: As in ``call``.
            function: Takes tensors for the nodes among ``args``, returns a tensor.
            args: Nodes and constants, or tuples of them, named or not.
            dropped: Tokens that were dropped from the nodes. What has a count that is
                read from the data for a size is recorded as it is.

        Returns:
            The node of the function's result.
        """
        template = self._template(function, args)
        values: dict[Node, Node] = {}
        leaves = pytree.tree_leaves(args)
        given = iter(leaf for leaf in leaves if isinstance(leaf, Node))
        with self._graph.inserting_before(anchor):
            for node in template.nodes:
                if node.op == "placeholder":
                    values[node] = next(given)
                elif node.op == "call_function":
                    values[node] = self._graph.node_copy(node, lambda n: values[n])
                    values[node].meta = _provenance(anchor, stamp)
                    value = node.meta["val"]
                    of_data = bool(free_unbacked_symbols(value))
                    set_value(values[node], value, None if of_data else dropped)
        [output] = template.find_nodes(op="output")
        result: Node = values[output.args[0]]
        return result

    def reads(self, function: Callable[[Args], Tensor], args: Args) -> Args:
        """A tuple of nodes, None in place of each that the function does not read."""
        template = self._template(function, (args,))
        given = iter(template.find_nodes(op="placeholder"))
        leaves, form = pytree.tree_flatten(args)
        found: Args = pytree.tree_unflatten(
            [
                leaf if not isinstance(leaf, Node) or next(given).users else None
                for leaf in leaves
            ],
            form,
        )
        return found

    def read(
        self,
        anchor: Node,
        stamp: Stamp,
        scalar: Node,
        least: int,
        symbol: Count,
        of: Node | None = None,
    ) -> Node:
        """Insert the reading of a count from the data: a symbolic int.

        Args:
            anchor: As in ``call``.
            stamp: As in ``call``.
            scalar: An int64 scalar.
            least: It is at least so large.
            symbol: What plans call the count, or that of the dropped tokens.
            of: [B, S], those of which so many are dropped, if the count is of the kept.
        """
        self._mode.allow_scalar_outputs = True
        with self._mode, enable_python_dispatcher():
            # A new scalar: the same one would be read to the same symbol.
            value = value_at_full_length(scalar).clone().item()
        bindings = compute_unbacked_bindings(self._mode.shape_env, value)
        torch._check(value >= least)
        with self._graph.inserting_before(anchor):
            call = self._graph.call_function
            node = call(torch.ops.aten.item.default, (scalar,))
            enough = call(operator.ge, (node, least))
            failed = f"a count at a cut must be at least {least}"
            check = call(torch.ops.aten._assert_scalar.default, (enough, failed))
        for made in (node, enough, check):
            made.meta = _provenance(anchor, stamp)
        set_value(node, value, 0)
        set_value(enough, value >= least, None)
        set_value(check, None, 0)
        node.meta |= {READ: (symbol, of), "unbacked_bindings": bindings}
        return node

    def size(
        self,
        anchor: Node,
        stamp: Stamp,
        expr: sympy.Expr,
        known: Mapping[sympy.Symbol, Node],
    ) -> Node:
        """Insert what computes a size.

        Args:
            anchor: As in ``call``.
            stamp: As in ``call``.
            expr: The size, not a number.
            known: Nodes of the symbols in it.
        """
        tracer = GraphAppendingTracer(self._graph)
        proxies = {symbol: Proxy(node, tracer) for symbol, node in known.items()}
        last = anchor.prev
        with self._graph.inserting_before(anchor):
            result: Node = sympy_interp(PythonReferenceAnalysis, proxies, expr).node
        while (node := last.next) is not anchor:
            node.meta = _provenance(anchor, stamp)
            dropped = _add(map(dropped_tokens, node.all_input_nodes), 0)
            full = map_arg(node.args, value_at_full_length)
            set_value(node, operator_of(node)(*full), dropped)
            last = node
        return result

    def copy(
        self, anchor: Node, stamp: Stamp, nodes: Iterable[Node]
    ) -> dict[Node, Node]:
        """Insert copies of nodes before ``anchor``, which read each other.

        Args:
            anchor: As in ``call``.
            stamp: As in ``call``.
            nodes: In their order in the graph.

        Returns:
            The copy of each node.
        """
        copies: dict[Node, Node] = {}
        with self._graph.inserting_before(anchor):
            for node in nodes:
                copied = self._graph.node_copy(node, lambda n: copies.get(n, n))
                copied.meta = _provenance(node, stamp)
                set_value(copied, value_at_full_length(node), dropped_tokens(node))
                copies[node] = copied
        return copies

    def _template(
        self, function: Callable[..., Tensor], args: tuple[object, ...]
    ) -> Graph:
        leaves, form = pytree.tree_flatten(args)
        kinds = tuple(
            kind_of(value_at_full_length(a)) if isinstance(a, Node) else a
            for a in leaves
        )
        key = (function, kinds, form)
        if key not in self._traced:
            self._traced[key] = traced(function, args, self._mode, self._definitions)
        return self._traced[key]


def _add(dropped: Iterable[Count | None], more: Count) -> Count | None:
    """Tokens gone from a result, by those gone from its inputs."""
    counts = list(dropped)
    known = [count for count in counts if count is not None]
    if len(known) < len(counts):
        return None
    return functools.reduce(_larger, known) + more if known else more


def _larger(count: Count, other: Count) -> Count:
    """The larger of two; symbols are of counts that are no less than 0."""
    more = count - other
    larger = more > 0 if isinstance(more, int) else more.is_nonnegative
    return count if larger else other


def _provenance(anchor: Node, stamp: Stamp) -> dict[str, object]:
    """Metadata of a node inserted at ``anchor``."""
    kept = ("nn_module_stack", "stack_trace")
    return {key: anchor.meta[key] for key in kept if key in anchor.meta} | {
        STAMP: stamp
    }
