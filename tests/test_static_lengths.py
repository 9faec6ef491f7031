"""Prompts whose length was traced as a number, as a plain ``torch.compile`` does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed
from torch.fx import GraphModule
from transformers import LlavaForConditionalGeneration

from tests.tiny import (
    Compiled,
    Inner,
    assert_matches_oracle,
    batch,
    recipe_for,
    tiny_llava,
)
from vtprune_fx import vtprune_backend
from vtprune_fx.api import prune
from vtprune_fx.capture.aten import lower
from vtprune_fx.errors import PlanError
from vtprune_fx.planning.report import PruneReport

SHORT = recipe_for(2, {0: 3, 1: 5})


def compiled(model: nn.Module, inner: Inner, **options: Any) -> Callable[..., Any]:
    told: dict[str, Any] = {"recipe": SHORT, "inner": inner}
    forward: Callable[..., Any] = torch.compile(
        model.forward, backend=vtprune_backend, options=told, **options
    )
    return torch.no_grad()(forward)


@pytest.mark.parametrize(
    "prompts",
    [
        ((3, 6),),
        pytest.param(((5, 9), (2, 4), (8, 3)), marks=pytest.mark.slow),
        ((3, 2, 6), (0, 1, 20)),  # two images each
        ((2,), (5, 9), (4,), (3,)),  # one image among four samples
        # 32 tokens, as wide as the decoder, and heads times head width
        pytest.param(((5, 11),), marks=pytest.mark.slow),
        ((5, 11), (2, 4), (3, 9), (0, 1)),  # the same, and as many samples as heads
        ((0, 1),),  # 17: the vision tower's own length
        ((0, 0),),  # 16: patches
        ((21, 11),),  # 48: the MLP
        pytest.param(((30, 10),), marks=pytest.mark.slow),  # 56: an image's side
        pytest.param(((40, 44),), marks=pytest.mark.slow),  # 100: the vocabulary
    ],
    ids=str,
)
def test_static_prompt_is_the_oracle(prompts: tuple[tuple[int, ...], ...]) -> None:
    model, inner = tiny_llava(layers=2), Inner()
    inputs = batch(model, *prompts)
    outputs = compiled(model, inner, fullgraph=True, dynamic=False)(**inputs)
    assert_matches_oracle(outputs, inner.keep_sets, model, SHORT, inputs)
    assert len(inner.graphs) == 1


def test_a_second_length_makes_the_graph_dynamic_and_a_third_no_graph() -> None:
    model, inner = tiny_llava(layers=2), Inner()
    run = compiled(model, inner, fullgraph=True)
    for prompt in ((3, 6), (5, 11), (20, 3)):
        inputs = batch(model, prompt)
        outputs = run(**inputs)
        assert_matches_oracle(outputs, inner.keep_sets, model, SHORT, inputs)
    assert len(inner.graphs) == 2


@pytest.mark.parametrize("inner", ["eager", "aot_eager", "inductor"])
def test_a_fresh_model_needs_no_call_ahead_and_no_option(inner: str) -> None:
    """Dynamo breaks the graph where transformers counts the placeholders."""
    model = LlavaForConditionalGeneration(tiny_llava(layers=2).config).eval()
    model.load_state_dict(tiny_llava(layers=2).state_dict())
    inputs = batch(model, (3, 6), (2, 0, 9))
    reports: list[PruneReport] = []
    told: dict[str, Any] = {
        "recipe": SHORT,
        "inner": inner,
        "on_report": reports.append,
    }
    whole: Any = torch.compile(model, backend=vtprune_backend, options=told)
    with torch.no_grad():
        outputs = whole(**inputs)
    [report] = reports
    assert_matches_oracle(outputs, report.keep_sets, model, SHORT, inputs)


def test_a_prompt_of_which_one_token_would_be_left_is_refused() -> None:
    model, recipe = tiny_llava(layers=2), recipe_for(2, {0: 6, 1: 10})
    inputs = batch(model, (0, 1))
    with pytest.raises(BackendCompilerFailed, match=r"at least 18 tokens.*found 17"):
        Compiled(model, recipe)(**inputs)
    with pytest.raises(PlanError, match=r"at least 18 tokens.*found 17"):
        prune(model, inputs, recipe)
    Compiled(model, recipe)(**batch(model, (0, 2)))


class _SquareMixer(nn.Module):
    """Mixes tokens by a matrix that is as large as the prompt must then be."""

    def __init__(self) -> None:
        super().__init__()
        self.mixer = nn.Parameter(torch.ones(8, 8))

    def forward(self, ids: Tensor, features: Tensor) -> Tensor:
        embedded = torch.zeros(*ids.shape, 4)
        placed = embedded.masked_scatter((ids == 1)[..., None], features)
        return self.mixer @ placed


def test_a_length_that_has_to_be_another_size_is_refused() -> None:
    graphs: list[GraphModule] = []

    def keep(module: GraphModule, _: object) -> GraphModule:
        graphs.append(module)
        lower(module)
        return module

    mix = torch.compile(_SquareMixer(), backend=keep, dynamic=False)
    with pytest.raises(BackendCompilerFailed, match=r"needs it to be 8.*mark_dynamic"):
        mix(torch.ones(1, 8, dtype=torch.long), torch.ones(8, 4))
