"""Score and choice as one operator, gathers as one operator, lengths of their own."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor

from vtprune_fx.choice import choose, take
from vtprune_fx.passes.own_lengths import own_length

ROLES = torch.tensor([[0, 1, 1, 1, 1, 2], [3, 1, 1, 1, 1, 2]])
NOTHING = (None, None, None, 1.0, None, None, None, None)
"""What scores that look at a token's number alone are given beside roles."""


def test_the_lowest_leave_and_the_others_stay_in_order() -> None:
    """By hand: the i-th of four scores i * 40503 mod 65536: 0, 40503, 15470, 55973."""
    kept = choose(ROLES, 2, "uniform", "{}", *NOTHING)
    assert kept.tolist() == [[0, 2, 4, 5], [0, 2, 4, 5]]


def test_options_reach_the_scorer() -> None:
    kept = {
        str(choose(ROLES, 2, "random", json.dumps({"seed": seed}), *NOTHING).tolist())
        for seed in range(8)
    }
    assert len(kept) > 1


def test_an_operator_chooses_what_torch_expects_of_one() -> None:
    torch.library.opcheck(choose, (ROLES, 2, "uniform", "{}", *NOTHING))


@pytest.mark.parametrize(
    ("shape", "axes"),
    [((2, 5), [1]), ((2, 3, 5, 4), [2]), ((1, 5, 4), [1]), ((1, 1, 5, 5), [2, 3])],
)
def test_each_sample_takes_its_own(shape: tuple[int, ...], axes: list[int]) -> None:
    value = torch.randn(shape, dtype=torch.double, requires_grad=True)
    keep = torch.tensor([[0, 2, 4], [1, 2, 3]])
    taken = take(value, keep, axes)
    for sample in range(2):
        expected = value[sample % len(value)]
        for axis in axes:
            expected = expected.index_select(axis - 1, keep[sample])
        assert torch.equal(taken[sample], expected)
    torch.library.opcheck(take, (value, keep, axes))
    assert torch.autograd.gradcheck(lambda given: take(given, keep, axes), value)


def test_a_length_of_its_own_is_a_symbol_that_compiles_once() -> None:
    graphs = []

    def count(module: torch.fx.GraphModule, _: list[Tensor]) -> torch.fx.GraphModule:
        graphs.append(module)
        return module

    def doubled(positions: Tensor) -> Tensor:
        twice: Tensor = own_length(positions) * 2
        return twice

    compiled = torch.compile(doubled, backend=count, fullgraph=True)
    rows = torch.arange(10).reshape(2, 5)
    assert torch.equal(compiled(rows), rows * 2)
    [graph] = graphs
    [node] = graph.graph.find_nodes(
        op="call_function", target=torch.ops.vtprune.own_length.default
    )
    length = node.meta["example_value"].shape[1]
    assert isinstance(length, torch.SymInt)
    assert str(length).startswith("u")
