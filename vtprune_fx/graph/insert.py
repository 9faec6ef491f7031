"""Reading and editing fx graphs: sizes, values, and inserting nodes.

``Graph.call_function`` leaves a node's ``meta`` empty and ``Graph.lint`` does not mind;
here every inserted node gets its value, the place it came from, and a stamp.

A value behind a cut is kept as a ``Shorter``: the fake tensor that it was at full
length, and how many tokens have left since. That is exact and free, while a fake tensor
with a new symbolic length costs milliseconds, thousands of times over in one graph.
``passes.RefreshValues`` turns them into plain ``val`` where somebody needs that.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import sympy
import torch
from torch import Tensor
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx import Graph, GraphModule, Node, map_arg
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import (
    compute_unbacked_bindings,
    free_unbacked_symbols,
)

STAMP = "vtprune"
"""Key of ``node.meta`` under which inserted nodes carry their ``Stamp``."""


@dataclass(frozen=True)
class Stamp:
    """Who inserted a node.

    Attributes:
        role: ``check``, ``score``, ``keep``, ``gather``, ``shift`` or ``rows``.
        layer: Decoder layer of the cut, -1 where the node serves all cuts.
    """

    role: str
    layer: int


Count: TypeAlias = int | sympy.Expr
"""A number of tokens: known when the graph is made, or a symbol where it is read from
the data."""

READ = "vtprune_read"
"""Key of ``node.meta`` of a count that is read from the data: its symbol and None, or
the tokens that leave and the node [B, S] of those that were there, if it counts the
others."""

SHORTER = "vtprune_shorter"
"""Key of ``node.meta`` that stands in for ``val`` behind a cut."""


@dataclass(frozen=True)
class Shorter:
    """A value with fewer tokens than the prompt.

    Attributes:
        full: What it would be at full length: a fake tensor, a symbolic int, a tuple.
        dropped: Tokens that have left, or None where its token axes differ in that, or
            sizes are counts that are read from the data.
    """

    full: Any
    dropped: Count | None


def value_at_full_length(node: Node) -> Any:
    """The node's value as if no token had left."""
    shorter = node.meta.get(SHORTER)
    return shorter.full if shorter else node.meta.get("val")


def dropped_tokens(node: Node) -> Count | None:
    """How many tokens the node's value lacks."""
    shorter = node.meta.get(SHORTER)
    return shorter.dropped if shorter else 0


def set_value(node: Node, full: Any, dropped: Count | None) -> None:
    """Record a value: as ``val`` while no token has left."""
    node.meta.pop("val", None)
    node.meta.pop(SHORTER, None)
    if dropped == 0:
        node.meta["val"] = full
    else:
        node.meta[SHORTER] = Shorter(full, dropped)


def size_expr(size: int | torch.SymInt) -> sympy.Expr:
    """A size as a sympy expression, aliases resolved by the shape environment."""
    if isinstance(size, int):
        return sympy.Integer(size)
    return size.node.expr


def size_hint(size: int | torch.SymInt) -> int:
    """The value of a size for the example that the graph was traced with."""
    if isinstance(size, int):
        return size
    hint = size.node.hint
    assert isinstance(hint, int), f"{size} has no hint"
    return hint


def tensor_of(node: Node) -> Tensor | None:
    """The node's fake tensor, or None where its value is something else."""
    value = node.meta.get("val")
    return value if isinstance(value, Tensor) else None


def axes_of(value: Tensor, symbol: sympy.Symbol) -> tuple[int, ...]:
    """The dimensions of ``value`` whose size is exactly ``symbol``."""
    return tuple(i for i, s in enumerate(value.shape) if size_expr(s) == symbol)


def mentions(value: object, symbol: sympy.Symbol) -> bool:
    """Whether a size in ``value`` (tensor, symbolic int, tuple) holds ``symbol``."""
    if isinstance(value, Tensor):
        return mentions(tuple(value.shape), symbol)
    if isinstance(value, (tuple, list)):
        return any(mentions(item, symbol) for item in value)
    return isinstance(value, torch.SymInt) and symbol in value.node.expr.free_symbols


def fake_mode_of(graph: Graph) -> FakeTensorMode:
    """The fake mode that the graph's values live in.

    Not ``detect_fake_mode``, which asks whoever is compiling first: the values of a
    graph whose length was a number live in a mode of their own (``literals``).
    """
    values = (node.meta.get("val") for node in graph.nodes)
    return next(v.fake_mode for v in values if isinstance(v, FakeTensor))


@contextlib.contextmanager
def uncached_fakes(mode: FakeTensorMode) -> Iterator[None]:
    """Run operators on fakes without remembering them.

    After cuts nearly every symbolic size is new; the mode's cache then only costs,
    about as much again as the operators.
    """
    enabled, mode.cache_enabled = mode.cache_enabled, False
    try:
        yield
    finally:
        mode.cache_enabled = enabled


@contextlib.contextmanager
def lengths_from_data(mode: FakeTensorMode) -> Iterator[None]:
    """Let operators on fakes return numbers, and sizes, that are new symbols.

    Dynamo forbids both where it may break a graph instead, and takes a backend that
    asks for one to ask for that: the graph would run as it came.
    """
    shapes = mode.shape_env
    assert shapes is not None, "Dynamo's sizes are symbols"
    settings = shapes.settings
    shapes.settings = dataclasses.replace(
        settings, allow_dynamic_output_shape_ops=True, allow_scalar_outputs=True
    )
    try:
        yield
    finally:
        shapes.settings = settings


def assume_at_least(graph: Graph, symbol: sympy.Symbol, least: int) -> None:
    """Let the shape environment know a lower bound of a size that an input has."""
    for node in graph.find_nodes(op="placeholder"):
        value = node.meta.get("val")
        sizes = value.shape if isinstance(value, Tensor) else (value,)
        for size in sizes:
            if isinstance(size, torch.SymInt) and size_expr(size) == symbol:
                torch._check(size >= least)
                return


def walk_back(node: Node, through: frozenset[object]) -> Iterator[Node]:
    """``node``, then the first input again and again while the op is in ``through``."""
    yield node
    while node.op == "call_function" and node.target in through:
        first = node.args[0]
        assert isinstance(first, Node)
        node = first
        yield node


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
        definitions: Mapping[Any, Callable[..., Any]] | None = None,
    ) -> None:
        self._graph = graph
        self._definitions = dict(definitions or {})
        self._mode = fake_mode_of(graph)
        self._traced: dict[object, Graph] = {}
        self._values: dict[object, Any] = {}

    def call(
        self,
        anchor: Node,
        stamp: Stamp,
        op: Any,
        *args: Any,
        drop: Count = 0,
        **kwargs: Any,
    ) -> Node:
        """Insert one operator ahead of ``anchor``.

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
        full = value_at_full_length(args[0]) if drop else self.value(op, args, kwargs)
        set_value(node, full, dropped)
        return node

    def value(self, op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
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
        """Insert what ``function(*args)`` traces to, ahead of ``anchor``.

        Args:
            anchor: As in ``call``.
            stamp: As in ``call``.
            function: Takes tensors for the nodes among ``args``, returns a tensor.
            args: Nodes and constants.
            dropped: Tokens that have left the nodes. What has a count that is read
                from the data for a size is recorded as it is.

        Returns:
            The node of the function's result.
        """
        template = self._template(function, args)
        values: dict[Node, Any] = {}
        given = iter(arg for arg in args if isinstance(arg, Node))
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

    def reads(self, function: Callable[..., Tensor], *args: object) -> list[object]:
        """The arguments, None in place of each node that the function does not read."""
        template = self._template(function, args)
        given = iter(template.find_nodes(op="placeholder"))
        return [
            arg if not isinstance(arg, Node) or next(given).users else None
            for arg in args
        ]

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
            symbol: What plans call the count, or that of the tokens that leave.
            of: [B, S], those of which so many leave, if the count is of the others.
        """
        self._mode.allow_scalar_outputs = True
        with self._mode, enable_python_dispatcher():
            # A scalar of its own: the same one would be read to the same symbol.
            value = value_at_full_length(scalar).clone().item()
        bindings = compute_unbacked_bindings(self._mode.shape_env, value)
        torch._check(value >= least)
        with self._graph.inserting_before(anchor):
            call = self._graph.call_function
            node = call(torch.ops.aten.item.default, (scalar,))
            enough = call(operator.ge, (node, least))
            failed = f"at least {least} tokens must stay at a cut"
            check = call(torch.ops.aten._assert_scalar.default, (enough, failed))
        for made in (node, enough, check):
            made.meta = _provenance(anchor, stamp)
        set_value(node, value, 0)
        set_value(enough, value >= least, None)
        set_value(check, None, 0)
        node.meta |= {READ: (symbol, of), "unbacked_bindings": bindings}
        return node

    def copy(
        self, anchor: Node, stamp: Stamp, nodes: Iterable[Node]
    ) -> dict[Node, Node]:
        """Insert copies of nodes ahead of ``anchor``, which read each other.

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
        kinds = tuple(
            kind_of(value_at_full_length(a)) if isinstance(a, Node) else a for a in args
        )
        key = (function, kinds)
        if key not in self._traced:
            self._traced[key] = self._trace(function, args)
        return self._traced[key]

    def _trace(
        self, function: Callable[..., Tensor], args: tuple[object, ...]
    ) -> Graph:
        def with_constants(*tensors: Tensor) -> Tensor:
            given = iter(tensors)
            return function(*(next(given) if isinstance(a, Node) else a for a in args))

        nodes = (arg for arg in args if isinstance(arg, Node))
        with self._mode, enable_python_dispatcher():
            # One of its own for each: nodes of a kind may share a value, and tracing
            # tells arguments apart by identity.
            examples = [_like(value_at_full_length(node)) for node in nodes]
            traced = make_fx(
                with_constants,
                self._definitions,
                tracing_mode="real",
                pre_dispatch=True,
            )(*examples)
        assert not traced.graph.find_nodes(op="get_attr"), f"{function} has constants"
        traced.graph.eliminate_dead_code()
        return traced.graph


def _like(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    return torch.empty_strided(
        value.shape, value.stride(), dtype=value.dtype, device=value.device
    )


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


def _provenance(anchor: Node, stamp: Stamp) -> dict[str, Any]:
    """Metadata of a node inserted at ``anchor``."""
    kept = ("nn_module_stack", "stack_trace")
    return {key: anchor.meta[key] for key in kept if key in anchor.meta} | {
        STAMP: stamp
    }


def readable(module: GraphModule) -> str:
    """The graph as text, with shapes: for logs, docstrings and golden files."""
    return str(module.print_readable(print_output=False))


def replace_inputs(node: Node, current: Mapping[Node, Node]) -> None:
    """Let ``node`` read the current version of each of its inputs."""
    if current.keys().isdisjoint(node.all_input_nodes):
        return
    node.args = map_arg(node.args, lambda n: current.get(n, n))
    node.kwargs = map_arg(node.kwargs, lambda n: current.get(n, n))
