"""Each pass by itself: what it writes, what it leaves alone, what all of them keep."""

from __future__ import annotations

import copy
import operator
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch.fx import Graph, GraphModule, Node

from tests.tiny import (
    Compiled,
    assert_static,
    batch,
    calls,
    exported_program,
    planned,
    recipe_for,
    tiny_llava,
)
from vtprune_fx import backend, oracle
from vtprune_fx.api import prune
from vtprune_fx.errors import InputError
from vtprune_fx.graph.nodes import readable
from vtprune_fx.graph.stamps import STAMP, StampKind, stamped
from vtprune_fx.graph.values import (
    SHORTER,
    dropped_tokens,
    set_value,
    value_at_full_length,
)
from vtprune_fx.models.arguments import cache_of
from vtprune_fx.passes import (
    AsyncChecks,
    CheckTokens,
    Form,
    GatherTokens,
    InsertScores,
    OwnLengths,
    Pass,
    Pipeline,
    RefreshValues,
    ShareAttention,
    Target,
    cut_nodes,
    default_pipeline,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from vtprune_fx.planning.plan import PrunePlan
    from vtprune_fx.recipes.schema import Recipe

aten = torch.ops.aten

DROPS = {0: 3, 1: 5}
PASSES: dict[str, Callable[[PrunePlan], Pass]] = {
    "AsyncChecks": lambda plan: AsyncChecks(),
    "InsertScores": InsertScores,
    "CheckTokens": CheckTokens,
    "GatherTokens": GatherTokens,
    "OwnLengths": OwnLengths,
    "RefreshValues": lambda plan: RefreshValues(),
}
"""In the order in which they run."""


def ready_for(name: str) -> tuple[GraphModule, Pass, PrunePlan]:
    """A graph that all passes ahead of ``name`` have written to."""
    module, plan = planned(DROPS)
    for earlier, make in PASSES.items():
        if earlier == name:
            return module, make(plan), plan
        # A graph that is exported keeps the lengths that it has.
        if earlier != "OwnLengths":
            make(plan)(module)
    raise AssertionError(name)


def outputs(module: GraphModule) -> Any:
    [output] = module.graph.find_nodes(op="output")
    # What a model does not return in this case has no node.
    return [node for node in output.args[0] if node is not None]


def names(nodes: Any) -> list[str]:
    return [node.name for node in nodes]


# --------------------------------------------------------------- what all passes keep


@pytest.mark.parametrize("name", list(PASSES))
def test_pass_keeps_the_module_its_inputs_and_its_outputs(name: str) -> None:
    module, pass_, _ = ready_for(name)
    inputs, results = module.graph.find_nodes(op="placeholder"), outputs(module)
    before = names(inputs), names(results)
    result = pass_(module)
    assert result.module is module
    assert result.modified
    assert pass_.name == name
    after = module.graph.find_nodes(op="placeholder"), outputs(module)
    assert (names(after[0]), names(after[1])) == before


@pytest.mark.parametrize("name", list(PASSES))
def test_pass_recompiles_what_it_wrote(name: str) -> None:
    module, pass_, _ = ready_for(name)
    pass_(module)
    code = module.code
    module.recompile()
    assert module.code == code


@pytest.mark.parametrize("name", [name for name in PASSES if name != "RefreshValues"])
def test_pass_stamps_and_values_what_it_inserts(name: str) -> None:
    module, pass_, _ = ready_for(name)
    before = set(module.graph.nodes)
    pass_(module)
    inserted = [node for node in module.graph.nodes if node not in before]
    assert inserted
    for node in inserted:
        assert node.meta[STAMP].kind in StampKind
        assert "val" in node.meta or SHORTER in node.meta, node.format_node()
        assert node.meta["nn_module_stack"], node.format_node()


@pytest.mark.parametrize("name", list(PASSES))
def test_pass_keeps_what_other_nodes_know_of_their_origin(name: str) -> None:
    module, pass_, _ = ready_for(name)
    kept = ("nn_module_stack", "stack_trace", STAMP)
    before = {n: {k: n.meta.get(k) for k in kept} for n in module.graph.nodes}
    pass_(module)
    for node in module.graph.nodes:
        if node in before:
            assert {k: node.meta.get(k) for k in kept} == before[node]


@pytest.mark.parametrize("name", list(PASSES))
def test_pass_without_cuts_or_run_again_changes_nothing(name: str) -> None:
    """Nothing is cut, so nothing is scored, gathered, asserted or refreshed."""
    module, plan = planned({})
    AsyncChecks()(module)
    text, nodes = readable(module), list(module.graph.nodes)
    result = PASSES[name](plan)(module)
    assert result.module is module
    assert not result.modified
    assert readable(module) == text
    assert list(module.graph.nodes) == nodes


@pytest.mark.parametrize("name", ["OwnLengths", "RefreshValues"])
def test_a_pass_that_finishes_a_graph_changes_nothing_the_second_time(
    name: str,
) -> None:
    module, pass_, _ = ready_for(name)
    assert pass_(module).modified
    text = readable(module)
    assert not pass_(module).modified
    assert readable(module) == text


# -------------------------------------------------------------------------- the order


class First(Pass):
    """A pass that changes nothing."""

    def edit(self, module: GraphModule) -> bool:
        return False


class Second(First):
    requires = frozenset({"First"})


class Later(First):
    runs_after = frozenset({"First"})


@pytest.mark.parametrize(
    ("passes", "message"),
    [
        ([Second()], "pass Second: expected First before it, found no First"),
        (
            [Second(), First()],
            "pass Second: expected First before it, found First after it",
        ),
        ([Later(), First()], "pass Later: expected First before it, found First after"),
    ],
)
def test_a_pipeline_in_the_wrong_order_is_refused(
    passes: list[Pass], message: str
) -> None:
    _, plan = planned({})
    with pytest.raises(InputError, match=message):
        Pipeline(plan, *passes)


@pytest.mark.parametrize(
    "passes", [[First(), Second()], [Later()], [First(), Later()], [First(), First()]]
)
def test_a_pipeline_in_order_is_made(passes: list[Pass]) -> None:
    _, plan = planned({})
    assert Pipeline(plan, *passes).passes == tuple(passes)


@pytest.mark.parametrize(
    ("form", "target", "last"),
    [
        ("aten", "export", "RefreshValues"),
        ("cut_op", "compile", "OwnLengths"),
        ("cut_op", "trace", "ShareAttention"),
    ],
)
def test_every_pass_of_a_target_is_verified_and_in_the_report(
    form: Form, target: Target, last: str
) -> None:
    module, plan = planned(DROPS)
    records = default_pipeline(plan, form, target).run(module)
    assert records[-1].name == last
    assert records[-1].modified
    assert records[-1].verify_seconds > 0


def test_assertions_change_no_recorded_length() -> None:
    for name in ("AsyncChecks", "CheckTokens"):
        module, pass_, _ = ready_for(name)
        before = {n for n in module.graph.nodes if SHORTER in n.meta}
        pass_(module)
        assert {n for n in module.graph.nodes if SHORTER in n.meta} == before


# ------------------------------------------------------------------------ AsyncChecks


def test_scalar_check_becomes_an_assertion_that_quotes_the_model() -> None:
    module, pass_, _ = ready_for("AsyncChecks")
    [item] = calls(module, aten.item.default)
    checked = item.args[0]
    pass_(module)
    [assertion] = calls(module, aten._assert_async.msg)
    assert assertion.args[0] is checked
    message = str(assertion.args[1])
    assert message.startswith("runtime check failed: ")
    assert "special_image_mask" in message
    assert not calls(module, aten.item.default, aten._assert_scalar.default)
    assert not calls(module, torch.sym_ite)


def test_scalar_that_something_else_reads_is_left_alone() -> None:
    module, pass_, _ = ready_for("AsyncChecks")
    [item] = calls(module, aten.item.default)
    with module.graph.inserting_after(item):
        module.graph.call_function(operator.add, (item, 1))
    text = readable(module)
    assert not pass_(module).modified
    assert readable(module) == text


def checked_scalar(dtype: torch.dtype, test: Any, *args: int) -> GraphModule:
    """``assert test(x.item(), *args)`` as a graph."""
    graph = Graph()
    x = graph.placeholder("x")
    x.meta["val"] = torch.ones((), dtype=dtype)
    item = graph.call_function(aten.item.default, (x,))
    item.meta["val"] = x.meta["val"].item()
    tested = graph.call_function(test, (item, *args)) if test else item
    graph.call_function(aten._assert_scalar.default, (tested, "message"))
    graph.output((x,))
    return GraphModule(torch.nn.Module(), graph)


def test_check_of_a_truth_value_is_rewritten() -> None:
    module = checked_scalar(torch.bool, None)
    assert AsyncChecks()(module).modified
    module(torch.tensor(True))
    with pytest.raises(RuntimeError, match="runtime check failed"):
        module(torch.tensor(False))


def test_check_of_a_number_keeps_its_meaning() -> None:
    """7 <= 5 is false, 7 is true: to assert on the tensor would be another check."""
    module = checked_scalar(torch.int64, operator.le, 5)
    AsyncChecks()(module)
    module(torch.tensor(0))
    with pytest.raises(RuntimeError):
        module(torch.tensor(7))


def test_check_that_a_truth_value_is_false_keeps_its_meaning() -> None:
    module = checked_scalar(torch.bool, torch.sym_not)
    AsyncChecks()(module)
    module(torch.tensor(False))
    with pytest.raises(RuntimeError):
        module(torch.tensor(True))


# ------------------------------------------------------------------------ CheckTokens


@pytest.mark.parametrize(
    ("of", "held", "comparison"),
    [
        (None, "at least 8", (aten.ge.Scalar, 8)),
        (16, "exactly 16", (aten.eq.Scalar, 16)),
    ],
)
def test_check_asserts_what_the_recipe_counts_on(
    of: int | None, held: str, comparison: tuple[object, int]
) -> None:
    module, plan = planned(DROPS, of=of)
    InsertScores(plan)(module)
    assert CheckTokens(plan)(module).modified
    [assertion] = calls(module, aten._assert_async.msg)
    message = str(assertion.args[1])
    assert f"hold {held} visual tokens, or none and 8 tokens of padding" in message
    checks = _of_kind(module, StampKind.CHECK)
    compared = [(n.target, n.args[1]) for n in checks if len(n.args) == 2]
    assert comparison in compared
    assert (aten.ge.Scalar, 8) in compared  # padding
    read = {i for n in checks for i in n.all_input_nodes} - set(checks)
    assert names(read) == ["vtprune_roles"]


# ----------------------------------------------------------------------- InsertScores


def test_scores_stand_behind_the_edge_and_nothing_reads_a_keep_set_yet() -> None:
    module, pass_, plan = ready_for("InsertScores")
    pass_(module)
    order = {node.name: place for place, node in enumerate(module.graph.nodes)}
    inserted = cut_nodes(module.graph)
    assert list(inserted) == [0, 1]
    for cut in plan.cuts:
        keep = inserted[cut.attention.layer].keep
        assert order[keep.name] > order[cut.edge]
        assert all(
            STAMP in node.meta or order[node.name] > order[keep.name]
            for node in module.graph.nodes
            if order[node.name] > order[cut.edge]
        )
        assert not keep.users
        assert dropped_tokens(keep) == cut.drop
        path = list(keep.meta["nn_module_stack"].values())[-1][0]
        assert path == cut.attention.path
    roles = inserted[0].roles
    assert roles is inserted[1].roles
    readers = {user.meta[STAMP].layer for user in roles.users}
    assert readers == {0, 1}


def test_the_number_that_leaves_is_a_constant() -> None:
    module, pass_, _ = ready_for("InsertScores")
    pass_(module)
    slices = [
        n for n in _of_kind(module, StampKind.CHOICE) if n.target == aten.slice.Tensor
    ]
    assert [node.args[2] for node in slices] == [3, 5]


def test_whole_cuts_are_one_operator_that_is_given_what_the_scorer_reads() -> None:
    module, _, plan = ready_for("InsertScores")
    InsertScores(plan, "cut_op")(module)
    chosen = calls(module, torch.ops.vtprune.choose.default)
    assert [node.name for node in chosen] == ["vtprune_keep_0", "vtprune_keep_1"]
    for node, cut in zip(chosen, plan.cuts, strict=True):
        roles, drop, score, options, query, key, mask, _, *unread = node.args
        assert (str(roles), drop, score, options) == (
            "vtprune_roles",
            cut.drop,
            "fitprune",
            "{}",
        )
        read = names((query, key, mask))
        assert read == [cut.attention.query, cut.attention.key, cut.attention.mask]
        assert unread == [None] * 4


def test_exported_graphs_hold_none_of_our_operators() -> None:
    pruned = prune(exported_program(), recipe=recipe_for(2, DROPS))
    found = {str(node.target) for node in calls(pruned.program.graph_module)}
    assert not {name for name in found if name.startswith("vtprune")}


def test_scores_alone_change_no_result() -> None:
    module, pass_, _ = ready_for("InsertScores")
    pass_(module)
    program = copy.deepcopy(exported_program())
    program._graph_module = module
    inputs = batch(tiny_llava(layers=2), (3, 6), (9, 1))
    with torch.no_grad():
        ours = program.module()(**inputs).logits
        plain = exported_program().module()(**inputs).logits
    assert torch.equal(ours, plain)


def _of_kind(module: GraphModule, kind: StampKind) -> list[Node]:
    return [n for n in calls(module) if STAMP in n.meta and n.meta[STAMP].kind is kind]


# ----------------------------------------------------------------------- GatherTokens


def test_every_live_value_is_gathered_by_the_keep_set_of_its_cut() -> None:
    module, pass_, plan = ready_for("GatherTokens")
    pass_(module)
    gathers = [
        n for n in _of_kind(module, StampKind.GATHER) if n.target == aten.index.Tensor
    ]
    first, second = ([n for n in gathers if n.meta[STAMP].layer == i] for i in (0, 1))
    # Beside what is live, the tokens' roles: one gather an axis.
    axes = [sum(len(live.axes) for live in cut.live) + 1 for cut in plan.cuts]
    assert [_index(node) for node in first] == ["vtprune_keep_0"] * axes[0]
    came = {live.node for live in plan.cuts[0].live}
    made = [live for live in plan.cuts[1].live if live.node not in came]
    by_keep = [n for n in second if _index(n) == "vtprune_keep_1"]
    assert len(by_keep) == len(made), "what layers made"
    others = {_index(n) for n in second if n not in by_keep}
    assert others == {"vtprune_in_prompt_1"}
    assert len(second) == axes[1]


def _index(gather: Node) -> str:
    indices = gather.args[1]
    assert isinstance(indices, (list, tuple))
    return str(indices[-1])


def test_what_came_with_the_prompt_is_gathered_from_it_at_every_cut() -> None:
    module, pass_, plan = ready_for("GatherTokens")
    pass_(module)
    in_prompt = stamped(module.graph, StampKind.IN_PROMPT)[1]
    assert names(in_prompt.all_input_nodes)[::2] == [
        f"vtprune_keep_{i}" for i in (0, 1)
    ]
    for reader in in_prompt.users:
        node = reader
        while STAMP in node.meta and node.meta[STAMP].kind is not StampKind.ROLES:
            node = node.all_input_nodes[0]
        assert node.name in {live.node for live in plan.cuts[0].live} | {
            "vtprune_roles"
        }


def test_nothing_behind_a_cut_reads_what_is_as_long_as_before() -> None:
    """But for the gathers themselves."""
    module, pass_, plan = ready_for("GatherTokens")
    pass_(module)
    named = {node.name: node for node in module.graph.nodes}
    for cut in plan.cuts:
        node = named[cut.attention.node].next
        whole = {live.node for live in cut.live} | plan.lengths
        while node.op != "output":
            if STAMP not in node.meta:
                assert not whole & set(names(node.all_input_nodes)), node.format_node()
            node = node.next
    last = named[outputs(module)[0].name]
    assert dropped_tokens(last) == plan.dropped


def test_keys_and_values_go_into_the_cache_ahead_of_their_own_cut() -> None:
    module, pass_, _ = ready_for("GatherTokens")
    pass_(module)
    # logits, keys and values of layers 0 and 1, then what the encoder gave
    gone = [dropped_tokens(node) for node in outputs(module)]
    assert gone[:5] == [8, 0, 0, 3, 3]
    assert set(gone[5:]) == {0}


# ---------------------------------------------------------------------- RefreshValues


def test_refreshed_values_are_what_was_recorded_less_the_tokens() -> None:
    module, pass_, plan = ready_for("RefreshValues")
    logits = outputs(module)[0]
    full = value_at_full_length(logits).shape
    assert pass_(module).modified
    assert not any(SHORTER in node.meta for node in module.graph.nodes)
    shape = logits.meta["val"].shape
    assert shape[1].node.expr == full[1].node.expr - plan.dropped
    assert (shape[0], shape[2]) == (full[0], full[2])


# --------------------------------------------------------------------- ShareAttention


def whole_graph(**told: Any) -> tuple[GraphModule, PrunePlan]:
    module, plan = planned(DROPS, **told)
    InsertScores(plan, "cut_op")(module)
    GatherTokens(plan, "cut_op")(module)
    return module, plan


def test_attention_and_the_choice_by_it_become_one_operator() -> None:
    module, plan = whole_graph()
    named = {node.name: node for node in module.graph.nodes}
    before = [
        (named[cut.attention.node].args, named[f"vtprune_keep_{i}"].args)
        for i, cut in enumerate(plan.cuts)
    ]
    assert ShareAttention(plan)(module).modified
    assert not calls(module, torch.ops.vtprune.choose.default)
    both = calls(module, torch.ops.vtprune.attend_and_choose.default)
    for i, cut in enumerate(plan.cuts):
        attention, chosen = before[i]
        assert both[i].args == (attention[2], *chosen)
        for place, name in enumerate((cut.attention.node, f"vtprune_keep_{i}")):
            part = named[name]
            assert (part.target, part.args) == (operator.getitem, (both[i], place))
        # Layer 1 attends to what layer 0 left; what leaves it there is 5 tokens less.
        gone = [dropped_tokens(node) for node in both[i].users]
        assert gone == [[0, 3], [3, 8]][i]
    assert not ShareAttention(plan)(module).modified


@pytest.mark.parametrize("site", ["before_layer", "after_layer"])
def test_a_cut_that_is_not_behind_the_attention_is_left_alone(site: str) -> None:
    module, plan = whole_graph(site=site)
    text = readable(module)
    assert not ShareAttention(plan)(module).modified
    assert readable(module) == text


@pytest.mark.parametrize(
    ("of", "kind"), [("mask", torch.float32), ("query", torch.bfloat16)]
)
def test_a_mask_that_is_added_and_half_precision_are_left_alone(
    of: str, kind: torch.dtype
) -> None:
    module, plan = whole_graph()
    for chosen in calls(module, torch.ops.vtprune.choose.default):
        query, _, mask = chosen.args[4:7]
        read = {"query": query, "mask": mask}[of]
        assert isinstance(read, Node)
        set_value(read, value_at_full_length(read).to(kind), dropped_tokens(read))
    assert not ShareAttention(plan)(module).modified


@pytest.mark.parametrize(
    ("told", "shared"),
    [
        ({"dropout_p": 0.1}, False),
        ({"attn_mask": None}, False),
        ({"attn_mask": None, "is_causal": True}, True),
        ({"attn_mask": None, "is_causal": True, "dropout_p": 0.1}, False),
    ],
)
@pytest.mark.parametrize("in_place", [False, True])
def test_what_an_attention_is_told_decides(
    told: dict[str, Any], *, shared: bool, in_place: bool
) -> None:
    """Dropout is left alone, and so is attention without a mask that is not causal."""
    module, plan = whole_graph()
    named = {node.name: node for node in module.graph.nodes}
    for cut in plan.cuts:
        attention = named[cut.attention.node]
        chosen = cut_nodes(module.graph)[cut.attention.layer].keep
        given = {"attn_mask": chosen.args[6], "dropout_p": 0.0, "is_causal": False}
        given |= told
        attention.args = (*attention.args[:3], *(given.values() if in_place else ()))
        attention.kwargs = {} if in_place else given
        chosen.args = (*chosen.args[:6], given["attn_mask"], *chosen.args[7:])
    assert ShareAttention(plan)(module).modified == shared


# ------------------------------------------------------------------------ whole graphs


def test_exported_graph_is_static() -> None:
    pruned = prune(exported_program(), recipe=recipe_for(2, DROPS))
    assert_static(pruned.program.graph_module)


@pytest.mark.parametrize("form", ["score_op", "cut_op"])
def test_every_form_of_a_cut_gives_the_same(form: Form) -> None:
    plain = prune(exported_program(), recipe=recipe_for(2, DROPS)).program
    program = copy.deepcopy(exported_program())
    module, plan = planned(DROPS)
    default_pipeline(plan, form).run(module)
    program._graph_module = module
    own = {"score_op": "received", "cut_op": "attend_and_choose"}[form]
    assert any(own in str(node.target) for node in module.graph.nodes)
    inputs = batch(tiny_llava(layers=2), (3, 6), (9, 1))
    with torch.no_grad():
        ours, expected = (each.module()(**inputs) for each in (program, plain))
    torch.testing.assert_close(ours.logits, expected.logits, atol=1e-5, rtol=0)
    for layer, other in zip(
        cache_of(ours).layers, cache_of(expected).layers, strict=True
    ):
        torch.testing.assert_close(layer.keys, other.keys, atol=1e-5, rtol=0)


def test_inductor_compiles_the_form_for_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU, where its operator has an implementation too."""
    monkeypatch.setattr(backend, "_form_for", lambda module: "score_op")
    model, recipe = tiny_llava(layers=2), recipe_for(2, DROPS)
    inputs = batch(model, (3, 6))
    spent = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])
    compiled = Compiled(model, recipe, "inductor")
    compiled(**inputs)
    with spent:
        outputs = compiled(**inputs)
    called = [event.key for event in spent.key_averages()]
    assert "vtprune::received" in called
    assert not {"vtprune::choose", "vtprune::attend_and_choose"} & set(called)
    assert_logits_are_the_oracles(outputs, model, recipe, inputs)


def test_inductor_compiles_few_cuts_among_many_layers() -> None:
    """Then layers are traced with what fakes of others remember."""
    model, recipe = tiny_llava(layers=3), recipe_for(3, {1: 5})
    inputs, compiled = batch(model, (3, 6)), Compiled(model, recipe, "inductor")
    assert_logits_are_the_oracles(compiled(**inputs), model, recipe, inputs)


def assert_logits_are_the_oracles(
    outputs: Any, model: Any, recipe: Recipe, inputs: dict[str, torch.Tensor]
) -> None:
    """Of one sample."""
    [sample] = oracle.split_batch(model, **inputs)
    expected = oracle.prefill(model, recipe, sample).logits
    torch.testing.assert_close(outputs.logits[0], expected, atol=1e-4, rtol=0)


def test_compiled_graph_is_static() -> None:
    model = tiny_llava(layers=2)
    compiled = Compiled(model, recipe_for(2, DROPS))
    compiled(**batch(model, (3, 6)))
    assert_static(compiled.recorded.graphs[0])


def test_the_check_for_static_graphs_finds_what_is_not() -> None:
    """The graph as it came reads a scalar back; a mask as index is data too."""
    with pytest.raises(AssertionError, match="item"):
        assert_static(exported_program().graph_module)
    module, plan = planned({})
    AsyncChecks()(module)
    assert_static(module)
    visual = next(n for n in module.graph.nodes if n.name in plan.visual)
    with module.graph.inserting_after(visual):
        module.graph.call_function(aten.index.Tensor, (visual, [visual]))
    with pytest.raises(AssertionError, match=r"aten\.index"):
        assert_static(module)


def test_pruning_copies_the_graph_and_shares_the_weights() -> None:
    program = exported_program()
    text = readable(program.graph_module)
    pruned = prune(program, recipe=recipe_for(2, DROPS)).program
    assert readable(program.graph_module) == text
    for name, weight in program.state_dict.items():
        assert pruned.state_dict[name] is weight
