"""Sizes, values and inserted nodes of graphs, on graphs of a few nodes."""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any

import pytest
import sympy
import torch
from torch import Tensor

from tests.graphs import Builder, as_text
from vtprune_fx.graph.fakes import fake_mode_of, lengths_from_data, uncached_fakes
from vtprune_fx.graph.insert import Inserter
from vtprune_fx.graph.nodes import replace_inputs, walk_back
from vtprune_fx.graph.sizes import (
    assume_at_least,
    axes_of,
    mentions,
    size_expr,
    size_hint,
)
from vtprune_fx.graph.stamps import STAMP, Stamp, StampKind
from vtprune_fx.graph.trace import kind_of
from vtprune_fx.graph.values import (
    SHORTER,
    Shorter,
    dropped_tokens,
    set_value,
    tensor_of,
    value_at_full_length,
)

if TYPE_CHECKING:
    from torch.fx import GraphModule, Node

aten = torch.ops.aten

HERE = Stamp(StampKind.SCORE, 3)


class Small:
    """``out = neg(x)`` with x [B, S, 4], and weights [4, 4]."""

    def __init__(self) -> None:
        self.b = Builder()
        self.samples, self.tokens = self.b.size("B", 2), self.b.size("S", 12)
        self.x = self.b.input("x", self.samples, self.tokens, 4)
        self.weight = self.b.input("weight", 4, 4)
        with self.b.inside("model.layers.3"):
            self.out = self.b.call(aten.neg.default, self.x, name="out")
        self.out.meta["stack_trace"] = "line 7"
        self.module: GraphModule = self.b.module(self.out)

    @property
    def symbol(self) -> sympy.Symbol:
        symbol: sympy.Symbol = size_expr(self.tokens)
        return symbol


@pytest.fixture
def small() -> Small:
    return Small()


# ------------------------------------------------------------------------------- sizes


def test_sizes_are_expressions_with_an_example(small: Small) -> None:
    assert size_expr(7) == sympy.Integer(7)
    assert size_expr(small.tokens - 3) == small.symbol - 3
    assert (size_hint(7), size_hint(small.tokens), size_hint(small.tokens - 3)) == (
        7,
        12,
        9,
    )


@pytest.mark.parametrize(
    ("shape", "axes"),
    [
        (("B", "S", 4), (1,)),
        (("B", 1, "S", "S"), (2, 3)),
        (("B", 4), ()),
        # As long in the example, and still another size.
        (("B", 12), ()),
        (("S",), (0,)),
    ],
)
def test_token_axes_are_found_by_symbol(
    small: Small, shape: tuple[Any, ...], axes: tuple[int, ...]
) -> None:
    sizes = {"B": small.samples, "S": small.tokens}
    with small.b.mode:
        value = torch.empty([sizes.get(size, size) for size in shape])
    assert axes_of(value, small.symbol) == axes


@pytest.mark.parametrize(
    ("make", "found"),
    [
        (lambda s: s.x.meta["val"], True),
        (lambda s: s.weight.meta["val"], False),
        (lambda s: s.tokens, True),
        (lambda s: s.tokens * 2 - 1, True),
        (lambda s: s.samples, False),
        (lambda s: (1, [s.samples, s.tokens]), True),
        (lambda s: (1, [s.samples]), False),
        (lambda s: None, False),
        (lambda s: 12, False),
    ],
)
def test_a_symbol_is_looked_for_everywhere(
    small: Small, make: Any, *, found: bool
) -> None:
    assert mentions(make(small), small.symbol) is found


def test_a_lower_bound_is_known_afterwards(small: Small) -> None:
    ranges = small.b.shapes.var_to_range
    assert ranges[small.symbol].lower < 9
    assume_at_least(small.module.graph, small.symbol, 9)
    assert ranges[small.symbol].lower == 9


# ------------------------------------------------------------------------------ values


@pytest.mark.parametrize("dropped", [0, 3, None, sympy.Symbol("n")])
def test_a_value_is_shorter_once_tokens_are_gone(small: Small, dropped: Any) -> None:
    full = small.out.meta["val"]
    set_value(small.out, full, dropped)
    assert value_at_full_length(small.out) is full
    assert dropped_tokens(small.out) == dropped
    # One of the two keys, never both.
    assert ("val" in small.out.meta) is (dropped == 0)
    assert (SHORTER in small.out.meta) is (dropped != 0)
    assert tensor_of(small.out) is (full if dropped == 0 else None)


def test_a_value_may_be_set_again(small: Small) -> None:
    full = small.out.meta["val"]
    set_value(small.out, full, 3)
    set_value(small.out, full, 5)
    assert small.out.meta[SHORTER] == Shorter(full, 5)
    set_value(small.out, full, 0)
    assert SHORTER not in small.out.meta


def test_a_number_is_no_tensor(small: Small) -> None:
    small.out.meta["val"] = small.tokens
    assert tensor_of(small.out) is None


# ------------------------------------------------------------------------------- fakes


def test_the_mode_is_that_of_the_graphs_values(small: Small) -> None:
    assert fake_mode_of(small.module.graph) is small.b.mode


@pytest.mark.parametrize("before", [True, False])
def test_the_cache_is_off_for_a_while(small: Small, *, before: bool) -> None:
    mode = small.b.mode
    mode.cache_enabled = before
    seen: list[bool] = []

    def fail() -> None:
        with uncached_fakes(mode):
            seen.append(mode.cache_enabled)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert seen == [False]
    assert mode.cache_enabled is before


def test_lengths_from_data_are_allowed_for_a_while(small: Small) -> None:
    shapes = small.b.shapes
    settings = shapes.settings
    seen: list[bool] = []

    def fail() -> None:
        with lengths_from_data(small.b.mode):
            seen.append(shapes.settings.allow_scalar_outputs)
            seen.append(shapes.settings.allow_dynamic_output_shape_ops)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert seen == [True, True]
    assert shapes.settings is settings


# ------------------------------------------------------------------------------- nodes


def test_views_are_walked_back_through() -> None:
    b = Builder()
    x = b.input("x", b.size("B", 2), b.size("S", 12))
    made = b.call(aten.neg.default, x)
    wide = b.call(aten.unsqueeze.default, made, 1)
    view = b.call(aten.unsqueeze.default, wide, 1)
    through = frozenset({aten.unsqueeze.default})
    assert list(walk_back(view, through)) == [view, wide, made]
    assert list(walk_back(made, through)) == [made]
    assert list(walk_back(x, frozenset({"x"}))) == [x]


def test_inputs_are_replaced_wherever_they_stand() -> None:
    b = Builder()
    x = b.input("x", b.size("B", 2), 4)
    y = b.call(aten.neg.default, x)
    both = b.call(aten.cat.default, [x, x], 1)
    replace_inputs(both, {x: y})
    assert both.args == ([y, y], 1)
    replace_inputs(both, {x: y})
    assert both.all_input_nodes == [y]


# --------------------------------------------------------------------------- inserting


def check_origin(node: Node, small: Small) -> None:
    assert node.meta[STAMP] == HERE
    assert node.meta["nn_module_stack"] == small.out.meta["nn_module_stack"]
    assert node.meta["stack_trace"] == "line 7"


def test_an_operator_is_inserted_before_its_anchor(small: Small) -> None:
    node = Inserter(small.module.graph).call(
        small.out, HERE, aten.linear.default, small.x, small.weight
    )
    assert node.next is small.out
    check_origin(node, small)
    value = tensor_of(node)
    assert value is not None
    sizes = [size_expr(size) for size in value.shape]
    assert sizes == [size_expr(small.samples), small.symbol, sympy.Integer(4)]


def test_keywords_reach_the_operator(small: Small) -> None:
    node = Inserter(small.module.graph).call(
        small.out, HERE, aten.sum.dim_IntList, small.x, [1], dtype=torch.float64
    )
    assert node.meta["val"].dtype == torch.float64
    assert node.kwargs == {"dtype": torch.float64}


@pytest.mark.parametrize(
    ("first", "second", "drop", "gone"),
    [
        (0, 0, 0, 0),
        (3, 0, 0, 3),
        (3, 5, 0, 5),
        (3, 5, 2, 7),
        (0, 0, 4, 4),
        (None, 5, 0, None),
        (None, 5, 2, None),
    ],
)
def test_tokens_gone_are_those_of_the_inputs_and_the_operators_own(
    small: Small, first: int | None, second: int | None, drop: int, gone: int | None
) -> None:
    inserter = Inserter(small.module.graph)
    one = inserter.call(small.out, HERE, aten.neg.default, small.x)
    other = inserter.call(small.out, HERE, aten.neg.default, small.x)
    full = small.x.meta["val"]
    set_value(one, full, first)
    set_value(other, full, second)
    node = inserter.call(small.out, HERE, aten.add.Tensor, one, other, drop=drop)
    assert dropped_tokens(node) == gone


def test_symbols_of_counts_add_up(small: Small) -> None:
    inserter = Inserter(small.module.graph)
    n, m = (sympy.Symbol(s, integer=True, nonnegative=True) for s in "nm")
    one = inserter.call(small.out, HERE, aten.neg.default, small.x)
    set_value(one, small.x.meta["val"], n)
    node = inserter.call(small.out, HERE, aten.relu.default, one, drop=m)
    assert dropped_tokens(node) == n + m
    both = inserter.call(small.out, HERE, aten.add.Tensor, one, node)
    assert dropped_tokens(both) == n + m


def scaled(x: Tensor, factor: float, weight: Tensor) -> Tensor:
    return torch.relu(x @ weight) * factor


def test_a_function_is_inserted_as_what_it_traces_to(small: Small) -> None:
    inserter = Inserter(small.module.graph)
    node = inserter.trace(small.out, HERE, scaled, small.x, 0.5, small.weight)
    made = [n for n in small.module.graph.nodes if STAMP in n.meta]
    assert [n.target for n in made] == [
        aten.matmul.default,
        aten.relu.default,
        aten.mul.Tensor,
    ]
    assert made[-1] is node
    assert node.args[1] == 0.5
    for each in made:
        check_origin(each, small)


def test_a_function_is_traced_once_for_arguments_of_a_kind(small: Small) -> None:
    calls = []

    def counted(x: Tensor, factor: float) -> Tensor:
        calls.append(factor)
        return x * factor

    inserter = Inserter(small.module.graph)
    for factor in (2.0, 2.0, 3.0):
        inserter.trace(small.out, HERE, counted, small.x, factor)
    assert calls == [2.0, 3.0]
    inserter.trace(small.out, HERE, counted, small.weight, 2.0)
    assert calls == [2.0, 3.0, 2.0]


def test_two_arguments_of_one_value_are_told_apart(small: Small) -> None:
    inserter = Inserter(small.module.graph)
    node = inserter.trace(small.out, HERE, torch.sub, small.x, small.out)
    assert node.args[:2] == (small.x, small.out)


def test_operators_are_traced_as_their_definitions(small: Small) -> None:
    inserter = Inserter(
        small.module.graph, {aten.relu.default: lambda x: x.clamp(min=0)}
    )
    inserter.trace(small.out, HERE, scaled, small.x, 0.5, small.weight)
    targets = {n.target for n in small.module.graph.nodes}
    assert aten.clamp.default in targets
    assert aten.relu.default not in targets


def test_what_a_function_does_not_read_is_none(small: Small) -> None:
    def first(given: tuple[Any, ...]) -> Tensor:
        x, _, factor = given
        scaled: Tensor = x * factor
        return scaled

    given: tuple[object, ...] = (small.x, small.weight, 2.0)
    found = Inserter(small.module.graph).reads(first, given)
    assert found == (small.x, None, 2.0)


def test_copies_read_each_other(small: Small) -> None:
    with small.module.graph.inserting_before(small.out):
        late = small.module.graph.call_function(aten.relu.default, (small.x,))
    late.meta |= {"val": small.x.meta["val"]}
    small.out.args = (late,)
    copies = Inserter(small.module.graph).copy(late, HERE, [late, small.out])
    assert copies[small.out].args == (copies[late],)
    assert copies[late].args == (small.x,)
    assert copies[small.out].next is late
    # Their origin is that of what they are copies of.
    check_origin(copies[small.out], small)
    assert "nn_module_stack" not in copies[late].meta


def test_a_count_is_read_with_a_check_of_its_bound(small: Small) -> None:
    inserter = Inserter(small.module.graph)
    total = inserter.call(small.out, HERE, aten.sum.default, small.x)
    count = inserter.call(small.out, HERE, aten.to.dtype, total, torch.int64)
    number = inserter.read(small.out, HERE, count, 2, sympy.Symbol("stay"))
    assert number.target == aten.item.default
    assert number.next.target == operator.ge
    assert number.next.args == (number, 2)
    message = "a count at a cut must be at least 2"
    assert number.next.next.args == (number.next, message)
    assert small.b.shapes.var_to_range[number.meta["val"].node.expr].lower == 2


@pytest.mark.parametrize(
    ("one", "other", "alike"),
    [
        ((2, 3), (2, 3), True),
        ((2, 3), (3, 2), False),
        ((6,), (2, 3), False),
    ],
)
def test_kinds_of_tensors_are_their_sizes(
    one: tuple[int, ...], other: tuple[int, ...], *, alike: bool
) -> None:
    kinds = kind_of(torch.empty(one)), kind_of(torch.empty(other))
    assert (kinds[0] == kinds[1]) is alike


def test_kinds_tell_types_strides_and_nesting_apart() -> None:
    plain = torch.empty(3, 3)
    assert kind_of(plain) != kind_of(plain.double())
    assert kind_of(torch.empty(2, 3)) != kind_of(torch.empty(3, 2).T)
    assert kind_of([plain, 1]) == kind_of((torch.empty(3, 3), 1))
    assert kind_of((plain,)) != kind_of(plain)


# ------------------------------------------------------------------------- the printer


def test_the_printer_shows_values_and_what_they_lack(small: Small) -> None:
    set_value(small.out, small.out.meta["val"], 3)
    small.out.meta[STAMP] = HERE
    assert as_text(small.module) == (
        "x: f32[B, S, 4]\n"
        "weight: f32[4, 4]\n"
        "out: f32[B, S, 4] - 3 tokens = aten.neg(x)    # score 3\n"
        "return [out]\n"
    )
