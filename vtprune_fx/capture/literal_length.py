"""Graphs traced with a prompt length that is a number: give the number a name.

Without a dynamic mark Dynamo writes the prompt's length into a graph as a literal,
``view(1, 31, -1, 16)``, and 31 may just as well be a width, a number of patches or of
heads. Which literals stand for the length is found by running the graph on fakes in
which each suspect, a literal or a dimension of an input, is a separate symbol:
operators equate those that have to be equal, and what ends up equal to the length of
the visual tokens' mask is the prompt's length. Everything else remains a number.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import TypeAlias

import sympy
import torch
from torch import Tensor, nn
from torch._dispatch.python import enable_python_dispatcher
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule, Interpreter, Node
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv
from torch.fx.node import Argument, map_aggregate

from vtprune_fx.capture.subclasses import replaced
from vtprune_fx.errors import AnatomyError, first_sentence
from vtprune_fx.graph.sizes import axes_of, size_expr, size_hint

EXAMPLE = "example_value"
"""Key of ``node.meta`` under which Dynamo keeps a fake."""

_Size: TypeAlias = int | torch.SymInt
_Arguments: TypeAlias = tuple[tuple[Argument, ...], dict[str, Argument]]
_SizeOf: TypeAlias = Callable[[Node, int, _Size], _Size]


def places_images(module: GraphModule) -> bool:
    """Whether Dynamo's graph places image features into the embeddings."""
    return any(_is_placement(node) for node in module.graph.nodes)


def literal_length(module: GraphModule) -> int | None:
    """The prompt's length where Dynamo's graph has it as a number."""
    for node in filter(_is_placement, module.graph.nodes):
        length = _mask_of(node).meta[EXAMPLE].shape[1]
        if isinstance(length, int):
            return length
    return None


def free_length(module: GraphModule, length: int) -> FreedLength:
    """Find out which numbers in a graph are the prompt's length, to run it with others.

    Args:
        module: Dynamo's graph. Its placeholders carry fakes.
        length: What ``literal_length`` found.

    Raises:
        AnatomyError: Another axis of the same size cannot be distinguished from it.
    """
    suspects = _Suspects(module, length)
    try:
        suspects.learn()
    except Exception as error:  # whatever an operator says of sizes that do not fit
        raise _ambiguous(length, first_sentence(error)) from error
    if not isinstance(suspects.tokens, sympy.Symbol):
        raise _ambiguous(length, f"an operator needs it to be {suspects.tokens}")
    return FreedLength(suspects)


class FreedLength(Interpreter):
    """Runs a graph with the prompt's length as a symbol.

    ::

        ids: "i64[1, 31]"
        view: "f32[1, 31, 4, 16]" = linear.view(1, 31, -1, 16)

    runs as::

        ids: "i64[1, s]"
        size: "Sym(s)" = ids.size(1)
        view: "f32[1, s, 4, 16]" = linear.view(1, size, -1, 16)

    Attributes:
        mode: Of the fakes to run it on.
        inputs: Those fakes.
    """

    def __init__(self, suspects: _Suspects) -> None:
        super().__init__(suspects.graph_module, garbage_collect_values=False)
        fakes = _Fakes()
        tokens = fakes.symbol(suspects.length)

        def freed(node: Node, axis: int, size: _Size) -> _Size:
            return tokens if axis in suspects.axes_of(node) else fakes.size(size)

        self.mode = fakes.mode
        self.inputs = fakes.inputs(suspects.graph_module, freed)
        self._length = suspects.length
        self._is_token = {
            node: [suspects.is_tokens(symbol) for symbol in found]
            for node, found in suspects.literals.items()
        }
        self._measured, self._axis = suspects.measured()

    def fetch_args_kwargs_from_env(self, n: Node) -> _Arguments:
        """A node's arguments, the length read anew where a number stood for it."""
        is_token = iter(self._is_token[n])

        def read(leaf: Argument) -> Argument:
            if _is_suspect(leaf, self._length) and next(is_token):
                size: _Size = self.env[self._measured].shape[self._axis]
                return size
            return self.env[leaf] if isinstance(leaf, Node) else leaf

        return map_aggregate((n.args, n.kwargs), read)


class _Suspects(Interpreter):
    """Runs a graph with a symbol for each number that may be the prompt's length."""

    def __init__(self, module: GraphModule, length: int) -> None:
        super().__init__(module, garbage_collect_values=False)
        self.graph_module = module
        self.length = length
        self.literals: dict[Node, list[_Size]] = {}
        self.tokens: sympy.Expr = sympy.Integer(length)
        self._fakes = _Fakes()

    def learn(self) -> None:
        """Run the graph: operators equate what has to be equal."""
        inputs = self._fakes.inputs(self.graph_module, self._input_size)
        with self._fakes.mode, enable_python_dispatcher(), torch.no_grad():
            self.run(*inputs, enable_io_processing=False)
        placement = next(filter(_is_placement, self.graph_module.graph.nodes))
        self.tokens = size_expr(self.env[_mask_of(placement)].shape[1])

    def fetch_args_kwargs_from_env(self, n: Node) -> _Arguments:
        """A node's arguments, with a new symbol for each suspect."""
        found = self.literals[n] = []

        def suspect(leaf: Argument) -> Argument:
            if _is_suspect(leaf, self.length):
                found.append(self._fakes.symbol(self.length))
                return found[-1]
            return self.env[leaf] if isinstance(leaf, Node) else leaf

        return map_aggregate((n.args, n.kwargs), suspect)

    def is_tokens(self, size: _Size) -> bool:
        """Whether a size turned out to be the prompt's length."""
        return bool(size_expr(size) == self.tokens)

    def measured(self) -> tuple[Node, int]:
        """An input, and which of its axes is the prompt's length."""
        inputs = _placeholders(self.graph_module)
        return next((node, axis) for node in inputs for axis in self.axes_of(node))

    def axes_of(self, placeholder: Node) -> tuple[int, ...]:
        """The token axes of an input."""
        value = self.env[placeholder]
        return axes_of(value, self.tokens) if isinstance(value, Tensor) else ()

    def _input_size(self, node: Node, _: int, size: _Size) -> _Size:
        # A parameter's sizes are the model's.
        if _is_suspect(size, self.length) and not _is_parameter(node):
            return self._fakes.symbol(self.length)
        return self._fakes.size(size)


class _Fakes:
    """Makes fakes in a separate mode, with symbols for Dynamo's symbols.

    In Dynamo's shape environment, what is learnt here would become guards.
    """

    def __init__(self) -> None:
        # No duck shapes: equal numbers are not equal axes.
        self._shapes = ShapeEnv(duck_shape=False)
        self.mode = FakeTensorMode(shape_env=self._shapes, allow_non_fake_inputs=True)
        self._known: dict[sympy.Expr, _Size] = {}
        self._symbols = itertools.count()

    def symbol(self, hint: int) -> _Size:
        """A new symbol."""
        source = ConstantSource(f"size_{next(self._symbols)}")
        symbol = self._shapes.create_symbol(hint, source, DimDynamic.DYNAMIC)
        return self._shapes.create_symintnode(symbol, hint=hint, source=source)

    def size(self, size: _Size) -> _Size:
        """The same size in this mode."""
        if isinstance(size, int):
            return size
        expr = size_expr(size)
        if expr not in self._known:
            self._known[expr] = self.symbol(size_hint(size))
        return self._known[expr]

    def inputs(self, module: GraphModule, size: _SizeOf) -> list[object]:
        """A fake for each of a graph's inputs; ``size(node, axis, size)`` is its size.

        Its dimensions lie in memory in the same order as those of Dynamo's.
        """
        return [self._input(node, size) for node in _placeholders(module)]

    def _input(self, node: Node, size: _SizeOf) -> object:
        def fake(value: object) -> object:
            if isinstance(value, torch.SymInt):
                return self.size(value)
            if not isinstance(value, Tensor):
                return value
            return self._tensor(value, functools.partial(size, node))

        return replaced(node.meta[EXAMPLE], fake)

    def _tensor(self, value: Tensor, size: Callable[[int, _Size], _Size]) -> Tensor:
        sizes = [size(axis, old) for axis, old in enumerate(value.shape)]
        order = sorted(range(value.dim()), key=lambda d: -size_hint(value.stride()[d]))
        with self.mode:
            dense = torch.empty(
                [sizes[d] for d in order], dtype=value.dtype, device=value.device
            )
            return dense.permute([order.index(d) for d in range(value.dim())])


def _placeholders(module: GraphModule) -> list[Node]:
    return list(module.graph.find_nodes(op="placeholder"))


def _is_parameter(node: Node) -> bool:
    return isinstance(node.meta[EXAMPLE], nn.Parameter)


def _is_suspect(leaf: object, length: int) -> bool:
    return type(leaf) is int and leaf == length


def _ambiguous(length: int, why: str) -> AnatomyError:
    return AnatomyError(
        f"prompt of {length} tokens, traced as a number",
        expected="a length that differs from the other sizes in the graph",
        found=why,
        fix="Mark it before the first call, for each input that has it: "
        "torch._dynamo.mark_dynamic(inputs['input_ids'], 1).",
    )


def _is_placement(node: Node) -> bool:
    return "masked_scatter" in str(node.target)


def _mask_of(placement: Node) -> Node:
    mask = placement.args[1] if len(placement.args) > 1 else placement.kwargs["mask"]
    assert isinstance(mask, Node)
    return mask
