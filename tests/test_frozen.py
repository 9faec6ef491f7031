"""Weights that inductor freezes: a graph holds them, and passes see them as inputs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._inductor import config
from torch.fx import GraphModule, symbolic_trace

from tests.tiny import (
    Compiled,
    assert_matches_oracle,
    batch,
    recipe_for,
    tiny_llava,
)
from vtprune_fx import vtprune_backend
from vtprune_fx.capture.weights import hold, lifted
from vtprune_fx.models.ragged_attention import mark_dynamic
from vtprune_fx.planning.report import PruneReport

RECIPE = recipe_for(2, {0: 3, 1: 5})
PROMPTS = ((3, 6), (2, 9))


@pytest.fixture
def freezing() -> Iterator[None]:
    """As a user sets it."""
    with config.patch(freezing=True):
        yield


class Layer(torch.nn.Module):
    """A parameter, used twice, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.arange(6.0).view(2, 3))
        self.shift: Tensor
        self.register_buffer("shift", torch.tensor([1.0, -1.0]))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """[B, 3] and [B, 3] to [B, 2]."""
        return x @ self.weight.T + self.shift - y @ self.weight.T


def reads(module: GraphModule) -> list[str]:
    return [str(n.target) for n in module.graph.nodes if n.op == "get_attr"]


def test_weights_become_inputs_and_go_back() -> None:
    held = symbolic_trace(Layer())
    x, y = torch.ones(4, 3), torch.tensor([[0.0, 1.0, 2.0]])
    expected = held(x, y)
    before = str(held.graph)

    apart, weights = lifted(held)
    assert str(held.graph) == before
    assert reads(apart) == []
    assert [n.name for n in apart.graph.nodes][:2] == ["x", "y"]
    torch.testing.assert_close(apart(x, y, *weights), expected)

    hold(apart, weights)
    assert len(apart.graph.find_nodes(op="placeholder")) == 2
    torch.testing.assert_close(apart(x, y), expected)
    assert {id(p) for p in apart.parameters()} == {id(p) for p in held.parameters()}


def test_a_graph_without_weights_stays_itself() -> None:
    module = symbolic_trace(torch.nn.Flatten())
    assert lifted(module) == (module, [])


@pytest.mark.usefixtures("freezing")
def test_the_inner_backend_gets_a_graph_that_holds_its_weights() -> None:
    model = tiny_llava(layers=2)
    inputs, compiled = batch(model, *PROMPTS), Compiled(model, RECIPE)
    outputs = compiled(**inputs)
    [module] = compiled.recorded.graphs
    held = {p.data_ptr() for p in module.parameters()}
    layer = model.model.language_model.layers[1]
    assert layer.mlp.up_proj.weight.data_ptr() in held
    examples = [node.meta["val"] for node in module.graph.find_nodes(op="placeholder")]
    assert not any(isinstance(value, torch.nn.Parameter) for value in examples)
    kept = compiled.recorded.keep_sets
    assert_matches_oracle(outputs, kept, model, RECIPE, inputs)


@pytest.mark.usefixtures("freezing")
@pytest.mark.parametrize("dynamic", [True, False])
def test_frozen_inductor_is_the_oracle(dynamic: bool) -> None:
    model = tiny_llava(layers=2)
    inputs = batch(model, *PROMPTS)
    if dynamic:
        mark_dynamic(1, inputs["input_ids"], inputs["attention_mask"])
    reports: list[PruneReport] = []
    options: Any = {"recipe": RECIPE, "on_report": reports.append}
    run = torch.compile(model, backend=vtprune_backend, options=options)
    with torch.no_grad():
        outputs = run(**inputs)
    [report] = reports
    assert_matches_oracle(outputs, report.keep_sets, model, RECIPE, inputs)
