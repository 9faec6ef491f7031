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
from vtprune_fx.passes import Inserter, Pass, Stamp, default_pipeline

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
        [output] = module.graph.find_nodes(op="output")
        vocabulary = tiny_llava(layers=2).config.get_text_config().vocab_size
        logits: Node
        [logits] = (
            node
            for node in output.all_input_nodes
            if value_at_full_length(node).shape[-1] == vocabulary
        )
        inserter = Inserter(module.graph)
        [source] = logits.all_input_nodes[:1]
        negated = inserter.call(logits, Stamp("check", -1), aten.neg.default, source)
        logits.replace_input_with(source, negated)
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


def compiled_logits(
    model: Any, inputs: Inputs, **how: Any
) -> tuple[Tensor, PruneReport]:
    vtprune_fx.compile(model, RECIPE, inner="eager", **how)
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
