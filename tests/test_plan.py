"""What is refused before anything is written, and how recipes are placed."""

from __future__ import annotations

import copy
import dataclasses
from typing import TYPE_CHECKING, Any

import pytest
import torch

from tests.tiny import (
    Inputs,
    batch,
    calls,
    exported_program,
    planned,
    recipe_for,
    tiny_llava,
)
from vtprune_fx.analysis.anatomy import Anatomy, read
from vtprune_fx.api import prune
from vtprune_fx.backend import vtprune_backend
from vtprune_fx.capture.aten import export
from vtprune_fx.errors import AnatomyError, CaptureError, InputError, PlanError
from vtprune_fx.graph.nodes import readable
from vtprune_fx.planning.place import place
from vtprune_fx.pruning import prune_graph
from vtprune_fx.recipes.default import DEFAULT, default_recipe
from vtprune_fx.recipes.loading import load_recipe

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch.fx import GraphModule, Node

    from vtprune_fx.recipes.schema import Recipe, Site

aten = torch.ops.aten


def graph_and_anatomy() -> tuple[GraphModule, Anatomy]:
    module = copy.deepcopy(exported_program().graph_module)
    anatomy = read(module.graph)
    assert anatomy is not None
    return module, anatomy


# -------------------------------------------------------------------------- recipes


@pytest.mark.parametrize(
    ("recipe", "where", "expected", "found"),
    [
        (
            recipe_for(8, {1: 2, 5: 1}),
            "recipe test, cut at layer 5",
            "a layer below 2",
            "a recipe made for 8 layers",
        ),
        (
            recipe_for(8, {5: 0}),
            "recipe test, cut at layer 5",
            "a layer below 2",
            "a recipe made for 8 layers",
        ),
        (
            recipe_for(2, {0: 10, 1: 7}, visual_tokens=576),
            "recipe test",
            "at most 16 dropped",
            "17 visual tokens dropped",
        ),
    ],
)
def test_recipe_that_does_not_fit_is_refused_and_nothing_is_written(
    recipe: Recipe, where: str, expected: str, found: str
) -> None:
    program = exported_program()
    text = readable(program.graph_module)
    with pytest.raises(PlanError) as caught:
        prune(program, recipe=recipe)
    assert caught.value.where == where
    assert expected in caught.value.expected
    assert caught.value.found == found
    assert caught.value.fix
    assert readable(program.graph_module) == text


def test_all_visual_tokens_may_leave() -> None:
    """16 of 16: the edge of what is refused."""
    _, plan = planned({0: 10, 1: 6})
    assert plan.dropped == plan.visual_tokens == 16


def test_cuts_are_placed_at_their_layers_and_add_up() -> None:
    module, plan = planned({0: 3, 1: 5})
    assert [(c.attention.layer, c.drop, c.dropped) for c in plan.cuts] == [
        (0, 3, 3),
        (1, 5, 8),
    ]
    for cut in plan.cuts:
        node = next(n for n in module.graph.nodes if n.name == cut.attention.node)
        assert node.target == aten.scaled_dot_product_attention.default
        assert f"language_model.layers.{cut.attention.layer}.self_attn" in (
            cut.attention.path
        )
    assert plan.layers == 2


def test_live_values_are_found_by_their_axes_and_not_by_their_numbers() -> None:
    """Ahead of the last layer's cut the mask and the rotary tables are of no use."""
    module, plan = planned({0: 3, 1: 5})
    named = {node.name: node for node in module.graph.nodes}
    first, last = plan.cuts

    def axes(cut: Any) -> list[tuple[int, tuple[int, ...]]]:
        return sorted((named[v.node].meta["val"].dim(), v.axes) for v in cut.live)

    attention, residual, rotary, mask = (4, (2,)), (3, (1,)), (3, (1,)), (4, (2, 3))
    assert axes(last) == [residual, attention]
    assert axes(first) == [residual, rotary, rotary, attention, mask]


@pytest.mark.parametrize(("visual", "drop"), [(16, 4), (32, 8), (31, 7)])
def test_shares_scale_with_what_a_sample_has(visual: int, drop: int) -> None:
    """40 of 160 is a quarter, rounded down."""
    assert recipe_for(2, {0: 40}, of=160).drops(visual) == {0: drop}


def test_share_recipe_is_placed_by_the_example() -> None:
    _, plan = planned({0: 40, 1: 5}, of=160)
    assert [(cut.attention.layer, cut.drop) for cut in plan.cuts] == [(0, 4)]


# ------------------------------------------------------------------- default recipe


def test_default_for_32_layers_is_the_published_recipe() -> None:
    ours, published = default_recipe(32, 576), load_recipe(DEFAULT)
    assert ours.drops(576) == published.drops(576)
    assert sum(ours.drops(576).values()) == 449


@pytest.mark.parametrize("layers", [1, 2, 4, 16, 24, 40, 80])
def test_default_for_another_depth_drops_as_many_in_all(layers: int) -> None:
    ours = default_recipe(layers, 576)
    assert ours.layers == layers
    assert sum(ours.drops(576).values()) == 449


@pytest.mark.parametrize("layers", [4, 16, 64])
def test_default_for_another_depth_has_as_many_left_at_the_same_depth(
    layers: int,
) -> None:
    """At the layers that fall together with layers of the published recipe."""
    ours = default_recipe(layers, 576).tokens_per_layer(576, layers)
    published = load_recipe(DEFAULT).tokens_per_layer(576, 32)
    quarters = range(1, 5)
    assert [ours[q * layers // 4 - 1] for q in quarters] == [
        published[q * 8 - 1] for q in quarters
    ]


@pytest.mark.parametrize("layers", [4, 32, 40])
@pytest.mark.parametrize("visual", [16, 144, 1000, 2880])
def test_default_for_other_images_drops_the_same_share(
    layers: int, visual: int
) -> None:
    """Every cut rounds down by less than one token."""
    ours = default_recipe(layers, visual)
    dropped = sum(ours.drops(visual).values())
    share = visual * 449 / 576
    assert share - len(ours.cuts) < dropped <= share
    assert ours.tokens_per_layer(visual, layers)[-1] == visual - dropped


# --------------------------------------------------------------- programs and graphs


def test_program_exported_without_an_image() -> None:
    model = tiny_llava(layers=2)
    program = export(model, batch(model, (12,)))
    with pytest.raises(AnatomyError, match="Export with an image among the inputs"):
        prune(program, recipe=recipe_for(2, {0: 3}))


def test_model_without_example_inputs() -> None:
    with pytest.raises(CaptureError, match="example inputs"):
        prune(tiny_llava(layers=2), recipe=recipe_for(2, {0: 3}))


def test_inputs_without_ids() -> None:
    model = tiny_llava(layers=2)
    pixels = batch(model, (3, 6))["pixel_values"]
    with pytest.raises(CaptureError, match="field input_ids"):
        prune(model, {"pixel_values": pixels}, recipe_for(2, {0: 3}))


def test_program_with_a_static_prompt_length() -> None:
    model = tiny_llava(layers=2)
    inputs = batch(model, (3, 6))
    with torch.no_grad():
        program = torch.export.export(model, (), inputs, strict=False)
    with pytest.raises(AnatomyError, match="dynamic dimension") as caught:
        prune(program, recipe=recipe_for(2, {0: 3}))
    assert caught.value.found == "the constant 25"


def compile_and_run(inputs: Inputs, **options: Any) -> None:
    compiled: Callable[..., Any] = torch.compile(
        tiny_llava(layers=2).forward,
        backend=vtprune_backend,
        options={"inner": "eager", **options},
        fullgraph=True,
    )
    with torch.no_grad():
        compiled(**inputs)


def test_compiled_with_an_unknown_option() -> None:
    with pytest.raises(Exception, match=r"expected recipe or inner or.*, found depth"):
        compile_and_run(batch(tiny_llava(layers=2), (12,)), depth=2)


def test_backend_names_all_unknown_options() -> None:
    module = torch.fx.symbolic_trace(torch.nn.ReLU())
    with pytest.raises(InputError, match="found depth, width"):
        vtprune_backend(module, [], options={"width": 1, "depth": 2, "recipe": None})


# ----------------------------------------------- graphs that cannot be read or cut


def test_two_placements_of_features() -> None:
    """Images and videos: the visual tokens are those of both masks."""
    module, anatomy = graph_and_anatomy()
    [placed] = calls(module, aten.masked_scatter.default)
    with module.graph.inserting_after(placed):
        module.graph.node_copy(placed)
    both = read(module.graph)
    assert both is not None
    assert both.visual == anatomy.visual * 2
    assert both.visual_tokens == 2 * anatomy.visual_tokens


def test_layers_that_do_not_run_in_order() -> None:
    module, anatomy = graph_and_anatomy()
    node = named(module, anatomy.layers[1].node)
    stack = dict(node.meta["nn_module_stack"])
    key, (path, kind) = list(stack.items())[-1]
    stack[key] = (path.replace("layers.1", "layers.7"), kind)
    node.meta["nn_module_stack"] = stack
    with pytest.raises(AnatomyError, match="decoder layer 1, found layer 7"):
        read(module.graph)


def test_live_value_whose_tokens_cannot_be_told_apart() -> None:
    """Twice the prompt, in one axis, read on both sides of the cut."""
    module, anatomy = graph_and_anatomy()
    ids = named(module, "input_ids")
    value = ids.meta["val"]
    first, last = (named(module, layer.node) for layer in anatomy.layers)
    with module.graph.inserting_before(first):
        twice = module.graph.call_function(aten.cat.default, ([ids, ids], 1))
    with module.graph.inserting_before(last):
        reader = module.graph.call_function(aten.neg.default, (twice,))
    with value.fake_mode:
        twice.meta["val"] = reader.meta["val"] = torch.cat([value, value], 1)
    with pytest.raises(PlanError, match=f"node {twice.name}, live across the cut"):
        place(recipe_for(2, {0: 3}), anatomy, module.graph)
    place(recipe_for(2, {1: 3}), anatomy, module.graph)


def without(anatomy: Anatomy, **streams: None) -> Anatomy:
    """As if the graph did not show some of what its layers have."""
    layers = (
        dataclasses.replace(layer, stream=dataclasses.replace(layer.stream, **streams))
        for layer in anatomy.layers
    )
    return dataclasses.replace(anatomy, layers=tuple(layers))


def test_positions_are_compacted_only_where_rotary_tables_are_seen() -> None:
    module, anatomy = graph_and_anatomy()
    recipe = recipe_for(2, {0: 3}, positions="compacted")
    with pytest.raises(PlanError, match=r"field positions: expected queries rotated"):
        place(recipe, without(anatomy, cos=None), module.graph)
    [cut] = place(recipe, anatomy, module.graph).cuts
    stream = anatomy.layers[1].stream
    assert cut.places == {stream.cos, stream.sin}


@pytest.mark.parametrize("site", ["after_layer", "before_layer"])
def test_layers_are_cut_only_where_the_residual_stream_is_seen(site: Site) -> None:
    module, anatomy = graph_and_anatomy()
    unseen = without(anatomy, start=None, output=None)
    with pytest.raises(PlanError, match="one value that is the residual stream"):
        place(recipe_for(2, {1: 3}, site=site), unseen, module.graph)


def named(module: GraphModule, name: str) -> Node:
    found: Node = next(n for n in module.graph.nodes if n.name == name)
    return found


# -------------------------------------------------------------------------- reports


def test_the_report_of_a_run_does_not_change_with_the_next_run() -> None:
    module, _ = planned({})
    made = prune_graph(module, recipe_for(2, {0: 2, 1: 1}))
    assert made is not None
    first = made.of_run([torch.tensor([[0, 2, 5]]), torch.tensor([[1, 2]])])
    made.of_run([torch.tensor([[0, 1, 2]]), torch.tensor([[0, 1]])])
    assert made.keep_sets == {}
    kept = {layer: keep.tolist() for layer, keep in first.keep_sets.items()}
    assert kept == {0: [[0, 2, 5]], 1: [[2, 5]]}
    assert first == made


def test_a_graph_without_images_has_no_report_and_is_left_alone() -> None:
    model = tiny_llava(layers=2)
    module = export(model, batch(model, (12,))).graph_module
    text = readable(module)
    assert prune_graph(module, recipe_for(2, {0: 2})) is None
    assert readable(module) == text
