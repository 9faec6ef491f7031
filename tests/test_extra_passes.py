"""A pass from outside: what ``prune``, ``compile`` and the backend do with it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch.fx import GraphModule

import vtprune_fx
from tests.tiny import (
    Inputs,
    batch,
    exported_program,
    planned,
    recipe_for,
    tiny_llava,
)
from vtprune_fx.errors import InputError, VerifyError
from vtprune_fx.graph.values import set_value, value_at_full_length
from vtprune_fx.ops.lengths import own_length
from vtprune_fx.passes import (
    Inserter,
    Pass,
    Stamp,
    StampKind,
    cut_nodes,
    default_pipeline,
)

if TYPE_CHECKING:
    from torch import Tensor
    from torch.fx import Node

    from vtprune_fx.planning.plan import PrunePlan
    from vtprune_fx.planning.report import PruneReport

aten = torch.ops.aten
RECIPE = recipe_for(2, {0: 3})


class NegateLogits(Pass):
    """Return minus the logits, for all to see that it ran."""

    requires = frozenset({"GatherTokens"})

    def __init__(self, plan: PrunePlan) -> None:
        self.plan = plan

    def edit(self, module: GraphModule) -> bool:
        logits = logits_of(module)
        inserter = Inserter(module.graph)
        [source] = logits.all_input_nodes[:1]
        negated = inserter.call(
            logits, Stamp(StampKind.CHECK), aten.neg.default, source
        )
        logits.replace_input_with(source, negated)
        return True


def logits_of(module: GraphModule) -> Node:
    """The output as wide as the vocabulary."""
    [output] = module.graph.find_nodes(op="output")
    vocabulary = tiny_llava(layers=2).config.get_text_config().vocab_size
    logits: Node
    [logits] = (
        node
        for node in output.all_input_nodes
        if value_at_full_length(node).shape[-1] == vocabulary
    )
    return logits


class ScaleByLengths(Pass):
    """Multiply the logits by how many tokens each cut keeps."""

    requires = frozenset({"GatherTokens"})

    def edit(self, module: GraphModule) -> bool:
        logits = logits_of(module)
        inserter = Inserter(module.graph)
        [source] = logits.all_input_nodes[:1]
        scaled = source
        for layer, nodes in cut_nodes(module.graph).items():
            stamp = Stamp(StampKind.CHECK, layer)
            ones = inserter.call(logits, stamp, aten.ones_like.default, nodes.keep)
            kept = inserter.call(logits, stamp, aten.sum.default, ones)
            scaled = inserter.call(logits, stamp, aten.mul.Tensor, scaled, kept)
        logits.replace_input_with(source, scaled)
        return True


class Late(Pass):
    runs_after = frozenset({"RefreshValues"})

    def edit(self, module: GraphModule) -> bool:
        return False


class NeedsAnother(Late):
    requires = frozenset({"Missing"})


class Wrong(Pass):
    def edit(self, module: GraphModule) -> bool:
        [output] = module.graph.find_nodes(op="output")
        logits = output.args[0][0]
        set_value(logits, value_at_full_length(logits).double(), 3)
        return True


def test_prune_runs_it_and_reports_it() -> None:
    inputs = batch(tiny_llava(layers=2), (3, 6))
    plain = vtprune_fx.prune(exported_program(), recipe=RECIPE)
    pruned = vtprune_fx.prune(exported_program(), recipe=RECIPE, passes=[NegateLogits])
    assert [p.name for p in pruned.report.passes][-2:] == [
        "NegateLogits",
        "RefreshValues",
    ]
    expected = -plain(**inputs).logits
    torch.testing.assert_close(pruned(**inputs).logits, expected)


def test_compile_runs_it() -> None:
    model = tiny_llava(layers=2)
    inputs = batch(model, (3, 6))
    plain, _ = compiled_logits(model, inputs)
    negated, report = compiled_logits(model, inputs, passes=[NegateLogits])
    assert "NegateLogits" in [record.name for record in report.passes]
    torch.testing.assert_close(negated, -plain)


def test_it_finds_cuts_by_their_stamps() -> None:
    model = tiny_llava(layers=2)
    recipe = recipe_for(2, {0: 3, 1: 5})
    inputs = batch(model, (3, 6))
    tokens = inputs["input_ids"].shape[1]
    kept = (tokens - 3) * (tokens - 3 - 5)
    plain, _ = compiled_logits(model, inputs, recipe)
    scaled, _ = compiled_logits(model, inputs, recipe, passes=[ScaleByLengths()])
    torch.testing.assert_close(scaled, plain * kept, rtol=1e-4, atol=1e-2)


def test_a_compiled_graph_returns_keep_sets_of_free_lengths() -> None:
    """With a fixed relation to the prompt's length each would be another shape."""
    graphs: list[GraphModule] = []

    def inner(module: GraphModule, _: list[Tensor], **kwargs: object) -> GraphModule:
        graphs.append(module)
        return module

    model = tiny_llava(layers=2)
    compiled_logits(model, batch(model, (3, 6)), recipe_for(2, {0: 3, 1: 5}), inner)
    [pruned] = graphs
    [output] = pruned.graph.find_nodes(op="output")
    keep_sets = output.args[0][-2:]
    assert [node.target for node in keep_sets] == [own_length, own_length]
    assert list(keep_sets) == [n.keep for n in cut_nodes(pruned.graph).values()]


def compiled_logits(
    model: Any, inputs: Inputs, recipe: Any = RECIPE, inner: Any = "eager", **how: Any
) -> tuple[Tensor, PruneReport]:
    vtprune_fx.compile(model, recipe, inner=inner, **how)
    with torch.no_grad():
        logits: Tensor = model(**inputs).logits
    report = vtprune_fx.report_of(model)
    vtprune_fx.undo(model)
    assert report is not None
    return logits, report


def test_its_place_is_before_what_finishes_a_graph_unless_it_names_that() -> None:
    _, plan = planned({0: 3})
    made = default_pipeline(plan, "aten", "export", [Late(), NegateLogits]).passes
    names = [pass_.name for pass_ in made][-3:]
    assert names == ["NegateLogits", "RefreshValues", "Late"]


def test_what_it_requires_has_to_be_there() -> None:
    with pytest.raises(InputError, match="pass NeedsAnother: expected Missing before"):
        vtprune_fx.prune(exported_program(), recipe=RECIPE, passes=[NeedsAnother()])


def test_what_it_writes_wrongly_is_caught() -> None:
    with pytest.raises(VerifyError, match="pass Wrong"):
        vtprune_fx.prune(exported_program(), recipe=RECIPE, passes=[Wrong()])
