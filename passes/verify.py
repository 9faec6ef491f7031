"""The verifier: is the graph that a pass wrote a right one?

``Graph.lint`` accepts a graph whose shapes no longer fit. This runs every operator on
tensors without data (device ``meta``) of concrete sizes, from the placeholders on, and
compares what comes out with every node's recorded value. Sizes are chosen so that
different axes never agree by accident. Concrete sizes cost a tenth of symbolic ones,
and add no guards. Where autocast is on, which does not know that device, fakes
on the graph's device take their place.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, cast

import sympy
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule, Node
from torch.fx.node import map_aggregate
from torch.utils import _pytree as pytree

from vtprune_fx.errors import VerifyError
from vtprune_fx.graph.sizes import Count, size_expr
from vtprune_fx.graph.stamps import STAMP
from vtprune_fx.graph.values import READ, dropped_tokens, value_at_full_length
from vtprune_fx.ops.lengths import own_length

aten = torch.ops.aten


_DYNAMIC: frozenset[object] = frozenset(
    {
        # Shapes or host values that depend on data.
        aten.nonzero.default,
        aten.item.default,
        aten._local_scalar_dense.default,
        aten.masked_select.default,
        aten.unique_consecutive.default,
    }
)


_PUTS = {aten.index_put.default, aten.index_put_.default}


@dataclass(frozen=True)
class Interface:
    """What a pass must not change: the inputs, and which values come out."""

    placeholders: tuple[str, ...]
    outputs: tuple[str, ...]

    @classmethod
    def of(cls, module: GraphModule) -> Interface:
        """The interface of a module."""
        nodes = module.graph.nodes
        placeholders = tuple(n.name for n in nodes if n.op == "placeholder")
        [output] = [n for n in nodes if n.op == "output"]
        return cls(placeholders, tuple(map(str, pytree.tree_leaves(output.args[0]))))


class Verifier:
    """Checks a module after each pass.

    Args:
        module: The module before any pass.
        tokens: The symbol of the prompt's length.
        dropped: How many tokens are dropped in all.
        counts: Numbers for counts that are read from the data.
    """

    def __init__(
        self,
        module: GraphModule,
        tokens: sympy.Symbol,
        dropped: int,
        counts: Mapping[sympy.Symbol, int],
    ) -> None:
        self._before = Interface.of(module)
        self._own = frozenset(module.graph.nodes)
        self._sizes = Sizes(module, tokens, dropped, counts)
        self._seen: dict[Node, _Seen] = {}
        self._fakes = FakeTensorMode(allow_non_fake_inputs=True)

    def check(self, module: GraphModule, pass_name: str) -> None:
        """Check what a pass wrote.

        Raises:
            VerifyError: Inputs or outputs changed, an inserted node's shape depends on
                data, an operator cannot run on its inputs, or a recorded value is not
                what the operator gives.
        """
        _check_interface(module, self._before, pass_name)
        _check_inserted(module, self._own, pass_name)
        with torch.no_grad(), self._fakes if _autocasts(module) else nullcontext():
            for node in module.graph.nodes:
                if node.op != "output":
                    self._check_value(module, node, pass_name)

    def _check_value(self, module: GraphModule, node: Node, pass_name: str) -> None:
        """Run one node, unless it, its inputs and its record are what they were."""
        if READ in node.meta:
            number = self._read(*node.meta[READ])
            self._sizes.know(node.meta["val"], number)
            self._seen[node] = _Seen((), number, ())
            return
        inputs = [self._seen[n].value for n in node.all_input_nodes]
        recorded = value_at_full_length(node), dropped_tokens(node)
        as_it_was = (
            node.target,
            node.args,
            node.kwargs,
            *map(id, (*recorded, *inputs)),
        )
        seen = self._seen.get(node)
        if seen is not None and seen.checked == as_it_was:
            return
        values = {n: self._seen[n].value for n in node.all_input_nodes}
        value = _run(node, module, values, self._sizes, pass_name)
        self._seen[node] = _Seen(as_it_was, value, (recorded, inputs))

    def _read(self, symbol: Count, of: Node | None) -> int:
        """A number for a count that is read from the data."""
        count = self._sizes.count(symbol)
        return count if of is None else self._seen[of].value.shape[1] - count


@dataclass(frozen=True)
class _Seen:
    """A node that was found right.

    Attributes:
        checked: All that its result depends on; objects by identity.
        value: Its result.
        alive: Keeps those objects, so that no other takes over their identity.
    """

    checked: tuple[object, ...]
    value: Any
    alive: object


def _check_interface(module: GraphModule, before: Interface, pass_name: str) -> None:
    after = Interface.of(module)
    if after != before:
        raise VerifyError(
            f"pass {pass_name}",
            expected=f"inputs and outputs kept: {before}",
            found=str(after),
            fix="A pass may not change a graph's interface.",
        )


def _check_inserted(
    module: GraphModule, known: frozenset[Node], pass_name: str
) -> None:
    """Check what was not in the graph before any pass."""
    for node in module.graph.nodes:
        if node in known:
            continue
        if _depends_on_data(node):
            raise VerifyError(
                f"pass {pass_name}, node {node.name}",
                expected="an operator whose shape does not depend on data",
                found=str(node.target),
                fix="Use a gather with a fixed number of indices.",
            )
        if STAMP not in node.meta:
            raise VerifyError(
                f"pass {pass_name}, node {node.name}",
                expected="a Stamp in the metadata of an inserted node",
                found="none",
                fix="Insert nodes with graph.Inserter.",
            )


def _depends_on_data(node: Node) -> bool:
    """Whether sizes after it do, other than counts that are read on purpose."""
    if node.target in _DYNAMIC:
        return READ not in node.meta
    return node.target == aten.index.Tensor and _indexes_by_mask(node)


def _indexes_by_mask(node: Node) -> bool:
    if node.target not in {aten.index.Tensor, *_PUTS}:
        return False
    indices = cast("list[Node | None]", node.args[1])
    masks = (n for n in indices if n is not None)
    return any(value_at_full_length(n).dtype == torch.bool for n in masks)


def _run(
    node: Node,
    module: GraphModule,
    values: Mapping[Node, Any],
    sizes: Sizes,
    pass_name: str,
) -> Any:
    if node.op == "placeholder":
        return sizes.concrete(node)
    if node.op == "get_attr":
        constant = _attribute(module, str(node.target))
        return constant.to(_stand_in(constant.device))
    if node.target in _PUTS and _indexes_by_mask(node):
        # Whatever is put there, the result is like what it is put into.
        return values[cast("Node", node.args[0])]
    if node.target == own_length:
        # A compiler may not know the length; the record says it.
        like = values[cast("Node", node.args[0])]
        _compare(node, like, sizes.concrete(node), pass_name)
        return like
    if _depends_on_data(node) or not _is_computable(node, values):
        return None
    args, kwargs = map_aggregate(
        (node.args, node.kwargs), lambda arg: _without_data(arg, values)
    )
    operator: Any = node.target  # whatever cannot be called is reported below
    try:
        found = operator(*args, **kwargs)
    except Exception as error:
        raise VerifyError(
            f"pass {pass_name}, node {node.format_node()}",
            expected="inputs that the operator takes",
            found=f"{_describe((args, kwargs))}: {error}",
            fix="The pass wrote a wrong graph.",
        ) from error
    if dropped_tokens(node) is not None:
        _compare(node, found, sizes.concrete(node), pass_name)
    return found


def _compare(node: Node, found: object, expected: object, pass_name: str) -> None:
    if _describe(found) != _describe(expected):
        raise VerifyError(
            f"pass {pass_name}, node {node.format_node()}",
            expected=f"its recorded value, {_describe(expected)}",
            found=_describe(found),
            fix="The pass wrote a wrong graph, or recorded a wrong value.",
        )


def _without_data(arg: Any, values: Mapping[Node, Any]) -> Any:
    """An argument as the dry run passes it."""
    if isinstance(arg, Node):
        return values[arg]
    return _stand_in(arg) if isinstance(arg, torch.device) else arg


def _stand_in(device: torch.device) -> torch.device:
    """The device of the dry run: one without data, unless autocast casts."""
    known = torch.amp.is_autocast_available(device.type)
    if known and torch.is_autocast_enabled(device.type):
        return device
    return torch.device("meta")


def _is_computable(node: Node, values: Mapping[Node, Any]) -> bool:
    """Whether no input comes from a value that depends on data."""
    return all(
        values[n] is not None or value_at_full_length(n) is None
        for n in node.all_input_nodes
    )


class Sizes:
    """Numbers for symbols: primes, so that different axes do not agree by accident.

    Args:
        module: The graph.
        tokens: The symbol of the prompt's length.
        dropped: Tokens that will be dropped: the prompt is given more than that.
        counts: Numbers for counts that are read from the data.
    """

    def __init__(
        self,
        module: GraphModule,
        tokens: sympy.Symbol,
        dropped: int,
        counts: Mapping[sympy.Symbol, int],
    ) -> None:
        symbols = sorted(_input_symbols(module) - {tokens}, key=str)
        few = sympy.primerange(29, 10000)
        self._tokens = tokens
        self._numbers: dict[sympy.Symbol, int] = dict(zip(symbols, few, strict=False))
        self._numbers[tokens] = int(sympy.nextprime(1000 + 2 * dropped))
        self._known: dict[tuple[sympy.Expr, int], int] = {}
        self._counts = counts
        self._sums: dict[sympy.Expr, int] = {}

    def count(self, count: Count) -> int:
        """A number of tokens."""
        if isinstance(count, int):
            return count
        if count not in self._sums:
            self._sums[count] = int(count.subs(self._counts))
        return self._sums[count]

    def know(self, value: torch.SymInt, number: int) -> None:
        """Take ``number`` for a count that the graph reads, in plain values too."""
        if isinstance(symbol := size_expr(value), sympy.Symbol):
            self._numbers[symbol] = number

    def concrete(self, node: Node) -> Any:
        """The node's value with numbers for symbols, and without data."""
        dropped = self.count(dropped_tokens(node) or 0)
        return self._value(value_at_full_length(node), dropped)

    def _value(self, value: Any, dropped: int) -> Any:
        if isinstance(value, (tuple, list)):
            return type(value)(self._value(item, dropped) for item in value)
        if isinstance(value, torch.SymInt):
            return self._size(value, dropped)
        if isinstance(value, torch.SymBool):
            return bool(value.node.expr.subs(self._numbers))
        if not isinstance(value, Tensor):
            return value
        shape = [self._size(s, dropped) for s in value.shape]
        stride = [self._size(s, dropped) for s in value.stride()]
        device = _stand_in(value.device)
        return torch.empty_strided(shape, stride, dtype=value.dtype, device=device)

    def _size(self, size: int | torch.SymInt, dropped: int) -> int:
        if isinstance(size, int):
            return size
        expr = size_expr(size)
        if (expr, dropped) not in self._known:
            tokens = self._numbers[self._tokens] - dropped
            numbers = self._numbers | {self._tokens: tokens}
            self._known[expr, dropped] = int(expr.subs(numbers))
        return self._known[expr, dropped]


def _autocasts(module: GraphModule) -> bool:
    inputs = module.graph.find_nodes(op="placeholder")
    values = (node.meta.get("val") for node in inputs)
    devices = {value.device for value in values if isinstance(value, Tensor)}
    return any(_stand_in(device) == device for device in devices)


def _input_symbols(module: GraphModule) -> set[sympy.Symbol]:
    symbols: set[sympy.Symbol] = set()
    for node in module.graph.find_nodes(op="placeholder"):
        value = node.meta.get("val")
        sizes = value.shape if isinstance(value, Tensor) else (value,)
        for size in sizes:
            if isinstance(size, torch.SymInt):
                symbols |= size_expr(size).free_symbols
    return symbols


def _attribute(module: GraphModule, path: str) -> Any:
    value: Any = module
    for part in path.split("."):
        value = getattr(value, part)
    return value


def _describe(value: object) -> str:
    """Shape and type, comparable and readable."""
    if isinstance(value, Tensor):
        kind = str(value.dtype).removeprefix("torch.")
        return f"{kind}{list(value.shape)}"
    if isinstance(value, (tuple, list)):
        return "(" + ", ".join(map(_describe, value)) + ")"
    if isinstance(value, dict):
        return ", ".join(f"{k}={_describe(v)}" for k, v in value.items())
    return str(value)
