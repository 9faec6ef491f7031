"""What goes into a pruned graph and what comes out of it, without pruning it.

Names are those of an ONNX export: paths of the tensors in what the model takes and
returns. Only logits and the cache are shown of the latter.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import sympy
from torch.utils import _pytree as pytree
from transformers.exporters.utils import get_leaf_tensors

from vtprune_fx.graph.sizes import size_expr
from vtprune_fx.models.arguments import CACHE_NAMES, PAST

if TYPE_CHECKING:
    from torch import Tensor
    from torch.export import ExportedProgram

    from vtprune_fx.analysis.anatomy import Anatomy
    from vtprune_fx.planning.plan import PrunePlan

PROMPT = "prompt"
"""Name of the prompt's length in shapes."""


@dataclass(frozen=True)
class Port:
    """One input or output.

    Attributes:
        name: Its name.
        dtype: Its type: ``float16``.
        shape: Its sizes: numbers, and formulas in ``batch``, ``prompt``, ``images``,
            ``features`` (rows of what encoders gave).
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


def interface(program: ExportedProgram, anatomy: Anatomy, plan: PrunePlan) -> Interface:
    """Inputs and outputs of the graph that a plan makes of a program.

    Args:
        program: What ``capture.export`` made.
        anatomy: What was found in its graph.
        plan: The recipe, placed on it.
    """
    inputs = list(_inputs(program))
    symbols = {
        anatomy.batch: sympy.Symbol("batch"),
        anatomy.tokens: sympy.Symbol(PROMPT),
    }
    for name, value in inputs:
        rows = sympy.Symbol("images" if name.startswith("pixel") else "features")
        for size in map(size_expr, value.shape):
            if isinstance(size, sympy.Symbol):
                symbols.setdefault(size, rows)
    return Interface(
        tuple(_port(name, value, symbols, 0) for name, value in inputs),
        tuple(
            _port(name, value, symbols, gone)
            for name, value, gone in _outputs(program, plan)
        ),
    )


def _inputs(program: ExportedProgram) -> Iterable[tuple[str, Tensor]]:
    """Name and value of each input."""
    named = {node.name: node for node in program.graph.nodes}
    values = [named[str(n)].meta["val"] for n in program.graph_signature.user_inputs]
    _, given = pytree.tree_unflatten(values, program.call_spec.in_spec)
    return get_leaf_tensors(given).items()


def _outputs(
    program: ExportedProgram, plan: PrunePlan
) -> Iterator[tuple[str, Tensor, int]]:
    """Name, value at full length, and tokens dropped before, of each output."""
    place = {node.name: i for i, node in enumerate(program.graph.nodes)}
    named = {node.name: node for node in program.graph.nodes}
    # What a model does not return (features without images, say) has no node.
    nodes = [named.get(str(name)) for name in program.graph_signature.user_outputs]
    values = [None if node is None else node.meta["val"] for node in nodes]
    returned = pytree.tree_unflatten(values, program.call_spec.out_spec)
    tensors = [node for node in nodes if node is not None]
    for name, node in zip(get_leaf_tensors(returned), tensors, strict=True):
        field, _, rest = name.partition(".")
        if field not in ("logits", *CACHE_NAMES):
            continue
        before = (c.dropped for c in plan.cuts if place[c.edge] < place[node.name])
        shown = f"{PAST}.{rest}" if rest else field
        yield shown, node.meta["val"], max(before, default=0)


def _port(
    name: str, value: Tensor, symbols: dict[sympy.Expr, sympy.Symbol], gone: int
) -> Port:
    prompt = sympy.Symbol(PROMPT)
    sizes = (
        size_expr(size).subs(symbols).subs(prompt, prompt - gone)
        for size in value.shape
    )
    return Port(name, str(value.dtype).removeprefix("torch."), tuple(map(str, sizes)))
