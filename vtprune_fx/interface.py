"""What goes into a pruned graph and what comes out of it, without pruning it.

Names are those of an ONNX export: both are the paths of the tensors in what the model
takes and returns.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import sympy
from torch.utils import _pytree as pytree
from transformers.exporters.utils import get_leaf_tensors

from vtprune_fx.capture import dynamic_shapes
from vtprune_fx.graph import size_expr

if TYPE_CHECKING:
    from torch import Tensor
    from torch.export import ExportedProgram

    from vtprune_fx.plan import PrunePlan

PROMPT = "prompt"
"""Name of the prompt's length in shapes."""


@dataclass(frozen=True)
class Port:
    """One input or output.

    Attributes:
        name: Its name.
        dtype: Its type: ``float16``.
        shape: Its sizes: numbers, and formulas in ``batch``, ``prompt``, ``images``.
    """

    name: str
    dtype: str
    shape: tuple[str, ...]


@dataclass(frozen=True)
class Interface:
    """Inputs and outputs of a pruned prefill graph.

    Attributes:
        inputs: What it takes.
        outputs: What it returns: logits of the tokens left, and a cache as long in each
            layer as what enters that layer's attention.
    """

    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]


def interface(
    program: ExportedProgram, inputs: Mapping[str, Any], plan: PrunePlan
) -> Interface:
    """Inputs and outputs of the graph that a plan makes of a program.

    Args:
        program: What ``capture.export`` made.
        inputs: What it was traced with.
        plan: The recipe, placed on it.
    """
    named = {node.name: node for node in program.graph.nodes}
    taken = program.graph_signature.user_inputs
    values = {name: named[name].meta["val"] for name in taken if isinstance(name, str)}
    symbols = _symbols(values, inputs)
    return Interface(
        tuple(_port(name, value, symbols, 0) for name, value in values.items()),
        tuple(
            _port(name, value, symbols, gone)
            for name, value, gone in _outputs(program, plan)
        ),
    )


def _symbols(
    values: Mapping[str, Tensor], inputs: Mapping[str, Any]
) -> dict[sympy.Expr, sympy.Symbol]:
    """The names that ``capture.export`` gives sizes, for the graph's own symbols."""
    found: dict[sympy.Expr, sympy.Symbol] = {}
    for name, dimensions in dynamic_shapes(inputs).items():
        for axis, dimension in (dimensions or {}).items():
            size = size_expr(values[name].shape[axis])
            found[size] = sympy.Symbol(dimension.__name__)
    return found


def _outputs(
    program: ExportedProgram, plan: PrunePlan
) -> Iterator[tuple[str, Tensor, int]]:
    """Name, value at full length, and tokens that have left, of each output."""
    place = {node.name: i for i, node in enumerate(program.graph.nodes)}
    named = {node.name: node for node in program.graph.nodes}
    nodes = [named[str(name)] for name in program.graph_signature.user_outputs]
    values = [node.meta["val"] for node in nodes]
    returned = pytree.tree_unflatten(values, program.call_spec.out_spec)
    for name, node in zip(get_leaf_tensors(returned), nodes, strict=True):
        behind = (c.dropped for c in plan.cuts if place[c.edge] < place[node.name])
        yield name, node.meta["val"], max(behind, default=0)


def _port(
    name: str, value: Tensor, symbols: dict[sympy.Expr, sympy.Symbol], gone: int
) -> Port:
    prompt = sympy.Symbol(PROMPT)
    sizes = (
        size_expr(size).subs(symbols).subs(prompt, prompt - gone)
        for size in value.shape
    )
    return Port(name, str(value.dtype).removeprefix("torch."), tuple(map(str, sizes)))
