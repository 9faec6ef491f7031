"""Failed matches: each reason, in a graph that has it, up to the error's text."""

from __future__ import annotations

import copy
import re
from typing import TYPE_CHECKING

import pytest
import torch
from transformers.models.llama import modeling_llama

from tests.tiny import batch, calls, exported_program, recipe_for, tiny_llava
from vtprune_fx import explain
from vtprune_fx.analysis.anatomy import Anatomy, read
from vtprune_fx.errors import AnatomyError, PlanError
from vtprune_fx.planning.place import place

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor
    from torch.fx import GraphModule, Node

    from vtprune_fx.recipes.schema import Recipe, Site

aten = torch.ops.aten


# ------------------------------------------------------------------- rotary tables


def half(query: Tensor) -> Tensor:
    turned: Tensor = modeling_llama.rotate_half(query)
    return turned


ROTATIONS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "a query that is no sum": lambda q, cos, sin: q,
    "a sum of other terms than two products": lambda q, cos, sin: q * cos + half(q),
    "no rotate_half in the second term": lambda q, cos, sin: q * cos + q.roll(1) * sin,
    "a factor that is no table": lambda q, cos, sin: q * cos + half(q) * (2 * sin),
}


@pytest.mark.parametrize("reason", ROTATIONS)
def test_rotary_tables(reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def rotated(
        query: Tensor, key: Tensor, cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, Tensor]:
        tables = cos[:, None], sin[:, None]
        return ROTATIONS[reason](query, *tables), ROTATIONS[reason](key, *tables)

    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", rotated)
    model = tiny_llava.__wrapped__(layers=1)
    recipe = recipe_for(1, {0: 3}, positions="compacted")
    found = explain(model, batch(model, (3, 6)), recipe)
    assert isinstance(found.refused, PlanError)
    assert f"found in layer 0: {reason} (node " in str(found.refused)
    assert f"\nnot found  rotary tables of layer 0: {reason} (node " in str(found)


# ----------------------------------------------------------------------- attention


def of_sigmoid(query: Tensor, key: Tensor) -> Tensor:
    return (query @ key.transpose(2, 3)).sigmoid()


def of_capped(query: Tensor, key: Tensor) -> Tensor:
    return (query @ key.transpose(2, 3)).tanh().softmax(dim=-1)


def of_permuted(query: Tensor, key: Tensor) -> Tensor:
    return (query @ key.permute(0, 1, 3, 2)).softmax(dim=-1)


@pytest.mark.parametrize(
    ("probabilities", "reason"),
    [
        (of_sigmoid, "a product of other values"),
        (of_capped, "a softmax of other values"),
        (of_permuted, "a query times other values"),
    ],
)
def test_attention(
    probabilities: Callable[[Tensor, Tensor], Tensor],
    reason: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def attend(
        _: object, query: Tensor, key: Tensor, value: Tensor, *__: object, **___: object
    ) -> tuple[Tensor, None]:
        return (probabilities(query, key) @ value).transpose(1, 2), None

    monkeypatch.setattr(modeling_llama, "eager_attention_forward", attend)
    model = tiny_llava.__wrapped__(layers=1, attention="eager")
    found = explain(model, batch(model, (3, 6)), recipe_for(1, {0: 3}))
    assert isinstance(found.refused, AnatomyError)
    assert re.search(rf"found .*{reason} \(node \w+\) instead", str(found))


# ------------------------------------------------------------- the residual stream


def changed() -> tuple[GraphModule, dict[str, Node], Anatomy]:
    """A graph of two layers to write to, its nodes, and what was found in it."""
    module = copy.deepcopy(exported_program().graph_module)
    anatomy = read(module.graph)
    assert anatomy is not None
    return module, {node.name: node for node in module.graph.nodes}, anatomy


def refused(module: GraphModule, recipe: Recipe) -> str:
    anatomy = read(module.graph)
    assert anatomy is not None
    with pytest.raises(PlanError) as caught:
        place(recipe, anatomy, module.graph)
    return str(caught.value)


@pytest.mark.parametrize("site", ["after_layer", "before_layer"])
def test_two_values_leave_a_layer(site: Site) -> None:
    """Its last sum is traced outside, so both of its terms are read there."""
    module, nodes, anatomy = changed()
    output = nodes[str(anatomy.layers[0].stream.output)]
    terms = [node.name for node in output.all_input_nodes]
    output.meta["nn_module_stack"] = {}
    cut = {0: 3} if site == "after_layer" else {1: 3}
    message = refused(module, recipe_for(2, cut, site=site))
    assert f"found 2 ({', '.join(terms)})" in message
    assert "instead of one value that the layer returns" in message


def test_nothing_leaves_a_layer() -> None:
    """The second layer reads what the first one read."""
    module, nodes, anatomy = changed()
    stream = anatomy.layers[0].stream
    nodes[str(stream.output)].replace_all_uses_with(nodes[str(stream.entry)])
    message = refused(module, recipe_for(2, {0: 3}, site="after_layer"))
    assert "found none instead of one value that the layer returns" in message


def test_two_values_enter_the_first_layer() -> None:
    module, nodes, anatomy = changed()
    entry = nodes[str(anatomy.layers[0].stream.entry)]
    reader = next(
        user for user in entry.users if user.meta["nn_module_stack"] and user != entry
    )
    with module.graph.inserting_after(entry):
        second = module.graph.call_function(aten.clone.default, (entry,))
    second.meta = entry.meta
    reader.replace_input_with(entry, second)
    message = refused(module, VISIONZIP)
    assert f"found 2 ({entry.name}, {second.name})" in message
    assert "instead of one value before the first layer" in message


# ----------------------------------------------------------------- the vision tower

VISIONZIP = recipe_for(
    *(2, {0: 11}),
    site="before_layer",
    score="visionzip",
    recycle={"tau": 1.0, "theta": 0.3, "form": "contextual"},
)


def in_tower(module: GraphModule) -> Node:
    """The attention of the tower's first layer, whose output is selected."""
    return calls(module, aten.scaled_dot_product_attention.default)[0]


def test_features_of_another_form() -> None:
    module, _, _ = changed()
    [projected] = [
        node
        for node in calls(module, aten.linear.default)
        if "multi_modal_projector_linear_1" in str(node.args[1])
    ]
    source = projected.all_input_nodes[0]
    with module.graph.inserting_before(projected):
        turned = module.graph.call_function(aten.flip.default, (source, [1]))
    turned.meta = {"val": source.meta["val"]}
    projected.replace_input_with(source, turned)
    message = refused(module, VISIONZIP)
    assert f"image features made by aten.flip.default (node {turned.name})" in message


def test_features_that_come_with_the_prompt() -> None:
    module, _, _ = changed()
    [placed] = calls(module, aten.masked_scatter.default)
    mask, features = placed.all_input_nodes[1:]
    with module.graph.inserting_before(mask):
        given = module.graph.placeholder("features")
    given.meta = {"val": features.meta["val"]}
    placed.replace_input_with(features, given)
    assert "found image features that are an input (node features)" in refused(
        module, VISIONZIP
    )


def test_two_attentions_in_the_layer() -> None:
    module, _, _ = changed()
    attention = in_tower(module)
    with module.graph.inserting_after(attention):
        module.graph.node_copy(attention)
    message = refused(module, VISIONZIP)
    assert "found 2 (node " in message
    assert "instead of one attention in " in message


def test_a_masked_tower() -> None:
    module, _, _ = changed()
    attention = in_tower(module)
    attention.args = (*attention.args[:3], attention.args[0])
    assert f"masked, windowed or grouped attention (node {attention.name})" in refused(
        module, VISIONZIP
    )


def test_images_and_videos() -> None:
    module, _, _ = changed()
    [placed] = calls(module, aten.masked_scatter.default)
    with module.graph.inserting_after(placed):
        module.graph.node_copy(placed)
    assert "found images and videos (node " in refused(module, VISIONZIP)
