"""The verifier on hand-built graphs, and reports as data."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from tests.graphs import Spec, as_text
from tests.hand_passes import CUT_OP, PASSES, Case, node_named
from vtprune_fx.errors import VerifyError
from vtprune_fx.graph.values import set_value
from vtprune_fx.passes import Verifier
from vtprune_fx.planning.report import in_prompt

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch.fx import GraphModule

aten = torch.ops.aten

CASE = Case(Spec(layers=2, rotary=True, last_row=True), {0: 2, 1: 1}, form=CUT_OP)


def checked(names: list[str], spoil: Callable[[GraphModule], None]) -> None:
    """Run passes, spoil the graph, and verify it."""
    before, plan = CASE.planned()
    verifier = Verifier(before, plan.tokens, 3, {})
    for name in names:
        PASSES[name](plan, CASE.form)(before)
        verifier.check(before, name)
    spoil(before)
    verifier.check(before, "Spoiled")


ALL = ["InsertScores", "CheckTokens", "GatherTokens", "ShiftKeys", "ReadRows"]


def test_what_each_pass_wrote_is_right() -> None:
    checked([*ALL, "ShareAttention"], lambda module: None)


def record_too_few(module: GraphModule) -> None:
    node = node_named(module, "added0")
    set_value(node, node.meta["vtprune_shorter"].full, 1)


def read_the_longer_stream(module: GraphModule) -> None:
    node = node_named(module, "added0")
    shorter, *_ = node.all_input_nodes
    node.replace_input_with(shorter, node_named(module, "image_placed"))


def swap_outputs(module: GraphModule) -> None:
    [output] = module.graph.find_nodes(op="output")
    [returned] = output.args
    assert isinstance(returned, (list, tuple))
    output.args = (tuple(reversed(returned)),)


def insert_without_a_stamp(module: GraphModule) -> None:
    keys = node_named(module, "k0")
    with module.graph.inserting_after(keys):
        made = module.graph.call_function(aten.neg.default, (keys,))
    made.meta["val"] = keys.meta["val"]


def insert_what_depends_on_data(module: GraphModule) -> None:
    image = node_named(module, "is_image")
    with module.graph.inserting_before(node_named(module, "length")):
        module.graph.call_function(aten.nonzero.default, (image,))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (record_too_few, "its recorded value"),
        (read_the_longer_stream, "inputs that the operator takes"),
        (swap_outputs, "inputs and outputs kept"),
        (insert_without_a_stamp, "a Stamp in the metadata"),
        (insert_what_depends_on_data, "shape does not depend on data"),
    ],
)
def test_a_wrong_graph_is_refused_and_the_pass_named(
    spoil: Callable[[GraphModule], None], message: str
) -> None:
    with pytest.raises(VerifyError, match=f"pass Spoiled.*{message}"):
        checked(ALL, spoil)


def test_copies_of_a_graph_are_of_each_other_independent() -> None:
    """Otherwise one test's graph would be another's."""
    first, _ = CASE.planned()
    text = as_text(first)
    second, plan = CASE.planned()
    PASSES["InsertScores"](plan, CASE.form)(second)
    assert as_text(first) == text
    assert as_text(CASE.planned()[0]) == text
    assert as_text(second) != text


@pytest.mark.parametrize(
    ("kept", "found"),
    [
        ({}, {}),
        ({2: [0, 2, 3]}, {2: [0, 2, 3]}),
        # Positions at a later cut count what the earlier one left.
        ({2: [0, 2, 3, 5], 4: [0, 1, 3]}, {2: [0, 2, 3, 5], 4: [0, 2, 5]}),
        # Whatever the order in which they are given.
        ({4: [1, 2], 2: [0, 2, 3]}, {2: [0, 2, 3], 4: [2, 3]}),
        # New tokens came with no prompt, and stay new ones.
        ({1: [0, -1, 3], 5: [1, 2]}, {1: [0, -1, 3], 5: [-1, 3]}),
        ({1: [0, 2, 3], 5: [0, -1]}, {1: [0, 2, 3], 5: [0, -1]}),
    ],
)
def test_keep_sets_are_followed_back_to_the_prompt(
    kept: dict[int, list[int]], found: dict[int, list[int]]
) -> None:
    tensors = {layer: torch.tensor([row]) for layer, row in kept.items()}
    back = in_prompt(tensors)
    assert {layer: row[0].tolist() for layer, row in back.items()} == found
