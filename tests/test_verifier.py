"""The verifier catches wrong edits, and says which pass and which node."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from tests.tiny import calls, planned
from vtprune_fx.errors import VerifyError
from vtprune_fx.graph.stamps import STAMP, Stamp, StampKind
from vtprune_fx.graph.values import dropped_tokens, set_value, value_at_full_length
from vtprune_fx.ops.lengths import own_length
from vtprune_fx.passes import (
    Form,
    OwnLengths,
    Pass,
    Pipeline,
    RefreshValues,
    Target,
    cut_nodes,
    default_pipeline,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from vtprune_fx.planning.plan import PrunePlan

aten = torch.ops.aten


class WrongEdit(Pass):
    """Runs an edit, which returns the node that the error has to name."""

    def __init__(self, edit: Callable[[GraphModule], Node | None]) -> None:
        self._edit = edit
        self.spoilt: Node | None = None

    def edit(self, module: GraphModule) -> bool:
        self.spoilt = self._edit(module)
        return True


def assert_caught(
    edit: Callable[[GraphModule], Node | None],
    drops: dict[int, int] | None = None,
) -> VerifyError:
    """Run the real passes and then a wrong one, all under the verifier."""
    module, plan = planned(drops or {0: 3, 1: 5})
    wrong = WrongEdit(edit)
    with pytest.raises(VerifyError, match="pass WrongEdit") as caught:
        Pipeline(plan, *default_pipeline(plan).passes, wrong).run(module)
    if wrong.spoilt is not None:
        # As %name where the error quotes the whole node.
        where = caught.value.where.replace("%", "")
        assert where.startswith(f"pass WrongEdit, node {wrong.spoilt.name}")
    return caught.value


def gathers(module: GraphModule, layer: int) -> list[Node]:
    return [
        node
        for node in calls(module, aten.index.Tensor)
        if STAMP in node.meta and node.meta[STAMP] == Stamp(StampKind.GATHER, layer)
    ]


def gather_of(module: GraphModule, layer: int, value: str) -> Node:
    [found] = [
        node
        for node in gathers(module, layer)
        if isinstance(node.args[0], Node) and node.args[0].name == value
    ]
    return found


def residual(module: GraphModule, layer: int) -> Node:
    """The gather of the residual stream at a cut: [B, S, E], indexed in place."""
    [found] = [
        node
        for node in gathers(module, layer)
        if _is_model_wide(node.args[0]) and node.users
    ]
    return found


def _is_model_wide(node: Any) -> bool:
    """[B, S, 32], computed by the model itself."""
    value = value_at_full_length(node)
    return STAMP not in node.meta and value.dim() == 3 and value.shape[2] == 32


def named(module: GraphModule, name: str) -> Node:
    found: Node = next(n for n in module.graph.nodes if n.name == name)
    return found


def test_a_pass_that_changes_nothing_is_fine() -> None:
    module, plan = planned({0: 3, 1: 5})
    wrong = WrongEdit(lambda module: None)
    records = Pipeline(plan, *default_pipeline(plan).passes, wrong).run(module)
    assert [record.name for record in records][-1] == "WrongEdit"


# -------------------------------------------------------------------------- gathers


def test_gather_along_the_wrong_axis() -> None:
    def edit(module: GraphModule) -> Node:
        node = residual(module, 0)
        value, indices = node.args
        assert isinstance(indices, (list, tuple))
        node.args = (value, [indices[0], None, indices[1]])
        return node

    assert "its recorded value" in str(assert_caught(edit))


def test_gather_of_one_axis_of_a_mask() -> None:
    """The first of the two gathers of the mask is left out."""

    def edit(module: GraphModule) -> None:
        [mask] = [
            node
            for node in gathers(module, 0)
            if value_at_full_length(node).dtype == torch.bool
            and value_at_full_length(node).dim() == 4
        ][:1]
        whole = mask.args[0]
        assert isinstance(whole, Node)
        mask.replace_all_uses_with(whole)
        module.graph.erase_node(mask)

    assert_caught(edit)


def test_gather_by_the_keep_set_of_another_cut() -> None:
    def edit(module: GraphModule) -> Node:
        node = residual(module, 1)
        earlier = cut_nodes(module.graph)[0].keep
        node.replace_input_with(cut_nodes(module.graph)[1].keep, earlier)
        return node

    assert "its recorded value" in str(assert_caught(edit))


def test_gather_by_an_earlier_keep_set_of_the_same_number_of_tokens() -> None:
    def edit(module: GraphModule) -> Node:
        node = residual(module, 1)
        earlier = cut_nodes(module.graph)[0].keep
        node.replace_input_with(cut_nodes(module.graph)[1].keep, earlier)
        return node

    assert_caught(edit, drops={0: 4, 1: 4})


def _live_values() -> list[tuple[int, str]]:
    _, plan = planned({0: 3, 1: 5})
    named = [(cut.attention.layer, live.node) for cut in plan.cuts for live in cut.live]
    return [*named, (0, "vtprune_roles")]


def test_every_forgotten_live_value_is_caught() -> None:
    """What reads the gathered version goes back to the version ahead of the cut."""
    for layer, value in _live_values():
        assert_caught(functools.partial(_forget, layer, value))


def _forget(layer: int, value: str, module: GraphModule) -> None:
    """Let the model read ``value`` as it was ahead of the cut of ``layer``."""
    whole = named(module, value)
    last = _last_version(whole, layer)
    earlier = _last_version(whole, layer - 1) if layer else whole
    assert last is not earlier
    last.replace_all_uses_with(
        earlier, delete_user_cb=lambda user: not _is_gather(user)
    )


def _last_version(whole: Node, layer: int) -> Node:
    """What ``whole`` is behind the cut of ``layer``: the end of a chain of gathers."""
    node = whole
    while following := [
        user
        for user in node.users
        if _is_gather(user) and user.meta[STAMP].layer <= layer and user.args[0] is node
    ]:
        [node] = following
    return node


def _is_gather(node: Node) -> bool:
    return STAMP in node.meta and node.meta[STAMP].kind is StampKind.GATHER


def test_forgotten_length_is_caught() -> None:
    def edit(module: GraphModule) -> None:
        keep = cut_nodes(module.graph)[0].keep
        [short] = [n for n in keep.users if n.target == aten.sym_size.int][:1]
        [whole] = [
            n
            for n in calls(module, aten.sym_size.int)
            if n.args[1] == 1 and getattr(n.args[0], "name", "") == "attention_mask"
        ]
        assert short.args[1] == 1
        short.replace_all_uses_with(whole)

    assert_caught(edit)


# ------------------------------------------------------------------------ interfaces


def test_added_output() -> None:
    def edit(module: GraphModule) -> None:
        [output] = module.graph.find_nodes(op="output")
        keep = cut_nodes(module.graph)[0].keep
        output.args = ((*output.args[0], keep),)

    assert "inputs and outputs kept" in str(assert_caught(edit))


def test_removed_output() -> None:
    def edit(module: GraphModule) -> None:
        [output] = module.graph.find_nodes(op="output")
        output.args = (tuple(output.args[0][:-1]),)

    assert "inputs and outputs kept" in str(assert_caught(edit))


def test_outputs_in_another_order() -> None:
    """Keys and values of a layer have the same shape: only their place tells them."""

    def edit(module: GraphModule) -> None:
        [output] = module.graph.find_nodes(op="output")
        logits, keys, values, *others = output.args[0]
        output.args = ((logits, values, keys, *others),)

    assert "inputs and outputs kept" in str(assert_caught(edit))


def test_removed_placeholder() -> None:
    def edit(module: GraphModule) -> None:
        mask = named(module, "attention_mask")
        mask.replace_all_uses_with(named(module, "input_ids"))
        module.graph.erase_node(mask)

    assert "inputs and outputs kept" in str(assert_caught(edit))


# --------------------------------------------------------------- operators and values


def insert(module: GraphModule, anchor: Node, op: Any, *args: Any) -> Node:
    """A node whose metadata is as a pass would write it."""
    with module.graph.inserting_after(anchor):
        node = module.graph.call_function(op, args)
    node.meta = {"nn_module_stack": anchor.meta["nn_module_stack"], "val": None}
    return node


def visual_mask(module: GraphModule) -> Node:
    _, plan = planned({0: 3})
    return named(module, plan.visual[0])


@pytest.mark.parametrize("stamped", [True, False])
@pytest.mark.parametrize("op", ["nonzero", "index", "index by itself", "item"])
def test_inserted_operator_whose_shape_depends_on_data(op: str, stamped: bool) -> None:
    """A pass that forgets the stamp, too."""

    def edit(module: GraphModule) -> Node:
        mask = visual_mask(module)
        made = {
            "nonzero": (aten.nonzero.default, mask),
            "index": (aten.index.Tensor, named(module, "input_ids"), [mask]),
            "index by itself": (aten.index.Tensor, mask, [mask]),
            "item": (aten.item.default, mask),
        }
        node = insert(module, mask, *made[op])
        if stamped:
            node.meta[STAMP] = Stamp(StampKind.GATHER, 0)
        return node

    assert "does not depend on data" in str(assert_caught(edit))


def test_wrong_recorded_shape() -> None:
    def edit(module: GraphModule) -> Node:
        node = residual(module, 0)
        set_value(node, value_at_full_length(node).transpose(0, 1), 3)
        return node

    assert "its recorded value" in str(assert_caught(edit))


@pytest.mark.parametrize("dropped", [0, 2, 4])
def test_wrong_recorded_number_of_tokens(dropped: int) -> None:
    def edit(module: GraphModule) -> Node:
        node = residual(module, 0)
        set_value(node, value_at_full_length(node), dropped)
        return node

    assert "its recorded value" in str(assert_caught(edit))


def test_wrong_recorded_type() -> None:
    def edit(module: GraphModule) -> Node:
        node = cut_nodes(module.graph)[0].roles
        set_value(node, value_at_full_length(node).float(), 0)
        return node

    assert "its recorded value" in str(assert_caught(edit))


def test_missing_recorded_value() -> None:
    def edit(module: GraphModule) -> Node:
        node = cut_nodes(module.graph)[0].roles
        del node.meta["val"]
        return node

    assert "its recorded value" in str(assert_caught(edit))


def test_error_is_found_in_the_pass_that_made_it() -> None:
    """A wrong pass in front: the error does not wait for the end."""
    module, plan = planned({0: 3, 1: 5})

    def edit(module: GraphModule) -> Node:
        node = visual_mask(module)
        set_value(node, value_at_full_length(node).long(), 0)
        return node

    with pytest.raises(VerifyError, match="pass WrongEdit"):
        Pipeline(plan, WrongEdit(edit), *default_pipeline(plan).passes).run(module)


def test_pass_that_says_it_changed_nothing_is_not_checked() -> None:
    """The contract of ``modified``: False means the same graph, to the last node."""
    module, plan = _pruned()

    class Untouched(Pass):
        def edit(self, module: GraphModule) -> bool:
            return False

    [record] = Pipeline(plan, Untouched()).run(module)
    assert not record.modified


def _pruned() -> tuple[GraphModule, PrunePlan]:
    module, plan = planned({0: 3})
    default_pipeline(plan).run(module)
    return module, plan


# --------------------------------------------------------------- what passes end with


ENDS = [("aten", "export"), ("cut_op", "compile")]


@pytest.mark.parametrize(("form", "target"), ENDS)
def test_a_wrong_value_after_the_end_is_caught(form: Form, target: Target) -> None:
    """Plain fakes, and lengths that are symbols, are compared as values before."""
    module, plan = planned({0: 3, 1: 5})

    def edit(module: GraphModule) -> Node:
        node: Node = next(
            n
            for n in reversed(module.graph.nodes)
            if isinstance(value_at_full_length(n), Tensor)
        )
        wrong = value_at_full_length(node).transpose(0, 1)
        set_value(node, wrong, dropped_tokens(node))
        return node

    passes = default_pipeline(plan, form, target).passes
    with pytest.raises(VerifyError, match=r"pass WrongEdit.* its recorded value"):
        Pipeline(plan, *passes, WrongEdit(edit)).run(module)


def test_a_wrong_length_of_a_new_symbol_is_caught() -> None:
    module, plan = planned({0: 3, 1: 5})

    def edit(module: GraphModule) -> Node:
        [first, _] = calls(module, own_length)
        set_value(first, value_at_full_length(first), 4)
        return first

    passes = default_pipeline(plan, "cut_op", "compile").passes
    with pytest.raises(VerifyError, match=r"pass WrongEdit.* its recorded value"):
        Pipeline(plan, *passes, WrongEdit(edit)).run(module)


@pytest.mark.parametrize("name", ["OwnLengths", "RefreshValues"])
def test_what_a_finishing_pass_writes_wrongly_is_caught(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the pass's name: the verifier runs after it."""
    pass_: Any = {"OwnLengths": OwnLengths, "RefreshValues": RefreshValues}[name]
    edit: Callable[..., bool] = pass_.edit

    def wrong(self: Any, module: GraphModule) -> bool:
        modified = edit(self, module)
        node = cut_nodes(module.graph)[0].roles
        set_value(node, value_at_full_length(node).float(), 0)
        return modified

    monkeypatch.setattr(pass_, "edit", wrong)
    module, plan = planned({0: 3, 1: 5})
    target: Target = "compile" if name == "OwnLengths" else "export"
    with pytest.raises(VerifyError, match=f"pass {name}"):
        default_pipeline(plan, target=target).run(module)
