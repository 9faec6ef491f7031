"""Operators: score and choice, with attention or without; gathers; own lengths."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import vtprune_fx
from vtprune_fx.ops.lengths import own_length
from vtprune_fx.scorers import registry
from vtprune_fx.scorers.evidence import Evidence, strongest_from
from vtprune_fx.scorers.roles import VISUAL
from vtprune_fx.selection.operators import attend_and_choose, choose, take

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


# ------------------------------------------------------------- attention and choice


def heads(*, padded: bool) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Queries, keys, values and a mask: causal, or with padding that attends nothing.

    Four query heads, two for each key.
    """
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(2, 6, heads, 8, generator=generator).transpose(1, 2)
        for heads in (4, 2, 2)
    )
    if not padded:
        return query, key, value, None
    mask = torch.ones(2, 1, 6, 6, dtype=torch.bool).tril()
    return query, key, value, mask & (ROLES != 3)[:, None, None]


def fused(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    return scaled_dot_product_attention(
        query, key, value, mask, is_causal=mask is None, enable_gqa=True, scale=0.5
    )


def attended(
    score: str, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    what = (ROLES, 2, score, "{}", query, key, mask, 0.5, None, None, None, None)
    output, kept = attend_and_choose(value, *what)
    return output, kept


def asks_twice(seen: Evidence) -> Tensor:
    visual = seen.roles == VISUAL
    strongest_from(seen, visual)
    return strongest_from(seen, visual)[:, 0]


def asks_of_other_keys(seen: Evidence) -> Tensor:
    return strongest_from(seen._replace(key=-seen.key), seen.roles == VISUAL)[:, 0]


def asks_at_another_scale(seen: Evidence) -> Tensor:
    return strongest_from(seen._replace(scale=3.0), seen.roles == VISUAL)[:, 0]


def asks_nothing(seen: Evidence) -> Tensor:
    return (seen.query.sum(dim=(1, 3)) + seen.key.sum(dim=(1, 3))).float()


OWN = (asks_twice, asks_of_other_keys, asks_at_another_scale, asks_nothing)


@pytest.fixture
def own_scorers() -> Iterator[None]:
    for rate in OWN:
        vtprune_fx.register_scorer(rate.__name__, rate)
    yield
    for rate in OWN:
        del registry._REGISTERED[rate.__name__]


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(
    "score", ["fitprune", "sparsevlm", "last-token", *(r.__name__ for r in OWN)]
)
@pytest.mark.usefixtures("own_scorers")
def test_attention_beside_the_choice_is_what_it_was(
    score: str, *, padded: bool
) -> None:
    given = heads(padded=padded)
    output, kept = attended(score, *given)
    torch.testing.assert_close(output, fused(*given))
    nothing = (None, None, None, None)
    query, key, _, mask = given
    alone = choose(ROLES, 2, score, "{}", query, key, mask, 0.5, *nothing)
    assert torch.equal(kept, alone)


@pytest.mark.parametrize("padded", [False, True])
def test_gradients_of_attention_beside_the_choice_are_what_they_were(
    *, padded: bool
) -> None:
    *tensors, mask = heads(padded=padded)

    def gradients(attention: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        own = [tensor.detach().requires_grad_() for tensor in tensors]
        return torch.autograd.grad(attention(*own, mask).sin().sum(), own)

    found = gradients(lambda *given: attended("fitprune", *given)[0])
    torch.testing.assert_close(found, gradients(fused))


@pytest.mark.parametrize("padded", [False, True])
def test_attention_beside_the_choice_is_what_torch_expects(*, padded: bool) -> None:
    query, key, value, mask = heads(padded=padded)
    what = (ROLES, 2, "fitprune", "{}", query, key, mask, 0.5, None, None, None, None)
    torch.library.opcheck(attend_and_choose, (value, *what))


# ---------------------------------------------------------------- gathers and lengths


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
