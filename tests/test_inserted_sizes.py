"""Sizes that are computed once more after a cut, from the lengths that are left."""

from __future__ import annotations

from typing import Any

import pytest
import sympy
import torch
from torch.fx import Interpreter
from torch.utils._sympy.functions import FloorDiv

from tests.graphs import Builder
from vtprune_fx.graph.insert import Inserter
from vtprune_fx.graph.sizes import size_expr, size_hint
from vtprune_fx.graph.stamps import STAMP, Stamp, StampKind
from vtprune_fx.graph.values import dropped_tokens, set_value, value_at_full_length

aten = torch.ops.aten

HERE = Stamp(StampKind.GATHER, 3)


class Sized:
    """``out = neg(x)`` with x [B, S, 4], and the nodes of B and of S less three."""

    def __init__(self) -> None:
        self.b = Builder()
        self.batch, self.tokens = self.b.size("B", 2), self.b.size("S", 12)
        x = self.b.input("x", self.batch, self.tokens, 4)
        self.samples = self.b.call(aten.sym_size.int, x, 0, name="samples")
        self.length = self.b.call(aten.sym_size.int, x, 1, name="length")
        set_value(self.length, self.length.meta["val"], 3)
        with self.b.inside("model.layers.3"):
            self.out = self.b.call(aten.neg.default, x, name="out")
        self.module = self.b.module(self.out)
        self.symbols = size_expr(self.batch), size_expr(self.tokens)

    def insert(self, expr: sympy.Expr) -> Any:
        """The node of a size, before ``out``."""
        nodes = self.samples, self.length
        known = dict(zip(self.symbols, nodes, strict=True))
        inserter = Inserter(self.module.graph)
        return inserter.size(self.out, HERE, expr, known)


def by_hand(kind: str, batch: int, tokens: int) -> int:
    """The sizes that are inserted below, in plain Python."""
    return {
        "twice": 2 * tokens,
        "all samples": batch * tokens,
        "a sum": tokens * tokens + batch,
        "a difference": tokens - 5,
        "rounded down": tokens // 4,
    }[kind]


def expression(kind: str, batch: sympy.Symbol, tokens: sympy.Symbol) -> sympy.Expr:
    """The same as the graph's values have them."""
    found: sympy.Expr = {
        "twice": 2 * tokens,
        "all samples": batch * tokens,
        "a sum": tokens * tokens + batch,
        "a difference": tokens - 5,
        "rounded down": FloorDiv(tokens, 4),
    }[kind]
    return found


KINDS = ("twice", "all samples", "a sum", "a difference", "rounded down")


@pytest.mark.parametrize("kind", KINDS)
def test_an_inserted_size_is_computed_by_a_run(kind: str) -> None:
    """At sizes that the graph was not made with."""
    sized = Sized()
    size = sized.insert(expression(kind, *sized.symbols))
    [output] = sized.module.graph.find_nodes(op="output")
    output.args = (size,)
    sized.module.recompile()
    for batch, tokens in ((1, 7), (3, 40)):
        found = Interpreter(sized.module).run(torch.zeros(batch, tokens, 4))
        assert found == by_hand(kind, batch, tokens)


@pytest.mark.parametrize("kind", KINDS)
def test_its_value_is_the_size_at_full_length(kind: str) -> None:
    """And says how many tokens are gone, as that of the length does."""
    sized = Sized()
    size = sized.insert(expression(kind, *sized.symbols))
    assert size_hint(value_at_full_length(size)) == by_hand(kind, 2, 12)
    assert dropped_tokens(size) == 3


def test_all_that_is_inserted_has_its_origin_and_stamp() -> None:
    sized = Sized()
    before = set(sized.module.graph.nodes)
    batch, tokens = sized.symbols
    sized.insert(2 * batch * tokens + 1)
    made = [node for node in sized.module.graph.nodes if node not in before]
    assert len(made) >= 2
    for node in made:
        assert node.meta[STAMP] == HERE
        assert node.meta["nn_module_stack"] == sized.out.meta["nn_module_stack"]
    assert made[-1].next is sized.out
    sized.module.graph.lint()
