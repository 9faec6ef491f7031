"""What the analysis reads of hand-built graphs, and what it refuses in which words."""

from __future__ import annotations

import dataclasses
import math
import sys
from typing import TYPE_CHECKING, Any

import pytest
import sympy
import torch
from torch._dispatch.python import enable_python_dispatcher

from tests.graphs import HEAD, HEADS, IMAGE, TOKENS, WIDTH, Builder, Spec, decoder
from tests.hand_passes import Case, anatomy_of, calls, node_named
from vtprune_fx.analysis.anatomy import read
from vtprune_fx.analysis.attention import attentions
from vtprune_fx.analysis.no_match import NoMatch
from vtprune_fx.analysis.residual import layer_path, module_path, rotary
from vtprune_fx.analysis.vision_tower import Tower, read_tower
from vtprune_fx.errors import AnatomyError, PlanError
from vtprune_fx.graph.sizes import size_expr
from vtprune_fx.planning.live import Uses
from vtprune_fx.planning.place import place
from vtprune_fx.planning.plan import LiveValue
from vtprune_fx.recipes.schema import Cut

if TYPE_CHECKING:
    from torch.fx import GraphModule, Node

    from vtprune_fx.recipes.schema import Site

aten = torch.ops.aten


# ------------------------------------------------------------------------ what is found


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_layers_are_attentions_in_order(layers: int) -> None:
    anatomy = anatomy_of(decoder(Spec(layers=layers)))
    found = [(each.layer, each.path, each.node) for each in anatomy.layers]
    assert found == [
        (i, f"model.layers.{i}.self_attn", f"attended{i}") for i in range(layers)
    ]


@pytest.mark.parametrize(
    ("spec", "query", "key", "mask"),
    [
        (Spec(), "q0", "k0", "mask"),
        (Spec(mask=None), "q0", "k0", None),
        (Spec(mask="float"), "q0", "k0", "mask"),
        (Spec(kv_heads=1), "q0", "k0", "mask"),
        (Spec(rotary=True), "q0_rotated", "k0_rotated", "mask"),
        (Spec(attention="eager", mask="float"), "q0", "k0", "mask"),
        (Spec(attention="eager", mask=None), "q0", "k0", None),
        # Grouped keys are what each query head attends to: repeated.
        (Spec(attention="eager", kv_heads=1, mask="float"), "q0", "expand", "mask"),
        (Spec(attention="eager", rotary=True, mask=None), "q0_rotated", "k0_", None),
    ],
    ids=str,
)
def test_attention_is_found_fused_and_written_out(
    spec: Spec, query: str, key: str, mask: str | None
) -> None:
    [layer] = anatomy_of(decoder(spec)).layers
    assert layer.query == query
    assert layer.key.startswith(key)
    assert layer.mask == mask
    assert layer.scale == 1 / math.sqrt(HEAD)


def test_the_token_axis_is_the_second_of_the_visual_mask() -> None:
    module = decoder()
    anatomy = anatomy_of(module)
    embeds = node_named(module, "embeds").meta["val"]
    assert anatomy.tokens == size_expr(embeds.shape[1])
    assert anatomy.batch == size_expr(embeds.shape[0])
    assert anatomy.tokens != anatomy.batch


def test_the_visual_mask_is_the_one_that_features_are_placed_by() -> None:
    module = decoder()
    [placed] = calls(module, aten.masked_scatter.default)
    mask = placed.args[1]
    assert anatomy_of(module).visual == (str(mask),)


def test_images_and_videos_each_have_a_mask() -> None:
    module = decoder(Spec(video=True))
    masks = [str(n.args[1]) for n in calls(module, aten.masked_scatter.default)]
    anatomy = anatomy_of(module)
    assert anatomy.visual == tuple(masks)
    assert len(masks) == 2
    # 6 of an image and 6 of a video for each of two samples.
    assert anatomy.visual_tokens == 2 * IMAGE


def test_visual_tokens_are_rows_of_features_a_sample() -> None:
    assert anatomy_of(decoder()).visual_tokens == IMAGE


def test_residual_streams_enter_and_leave_layers() -> None:
    spec = Spec(layers=3, last_row=True)
    streams = [layer.stream for layer in anatomy_of(decoder(spec)).layers]
    assert [each.entry for each in streams] == ["image_placed", "out0", "out1"]
    assert [each.output for each in streams] == ["out0", "out1", "out2"]
    # The last node before a layer: a cut before it goes after that node.
    assert [each.start for each in streams] == ["length", "out0", "out1"]


def test_what_only_the_output_reads_leaves_no_layer() -> None:
    [layer] = anatomy_of(decoder(Spec())).layers
    assert layer.stream.output is None


@pytest.mark.parametrize("cached", [True, False])
def test_keys_that_come_out_are_seen(*, cached: bool) -> None:
    spec = Spec(layers=2, rotary=True, cached=cached)
    found = [layer.stream.cached for layer in anatomy_of(decoder(spec)).layers]
    assert found == (["k0_rotated", "k1_rotated"] if cached else [None, None])


def test_repeated_keys_come_out_as_they_were_made() -> None:
    spec = Spec(attention="eager", mask="float", kv_heads=1)
    [layer] = anatomy_of(decoder(spec)).layers
    assert layer.stream.cached == "k0"


def test_rotary_tables_are_what_queries_are_turned_by() -> None:
    layers = anatomy_of(decoder(Spec(2, rotary=True))).layers
    streams = [layer.stream for layer in layers]
    assert [(each.cos, each.sin) for each in streams] == [("cos", "sin")] * 2
    [layer] = anatomy_of(decoder(Spec())).layers
    assert (layer.stream.cos, layer.stream.sin) == (None, None)


def test_no_vision_tower_is_in_these_graphs() -> None:
    assert anatomy_of(decoder()).tower is None


def query_of(change: str) -> Node:
    """A rotated query in which one thing is not as it should be."""
    module = decoder(Spec(rotary=True))
    query = node_named(module, "q0_rotated")
    straight, crossed = query.all_input_nodes
    with module.graph.inserting_before(query):
        if change == "subtracted":
            query.target = aten.sub.Tensor
        elif change == "one product":
            query.args = (straight, 1.0)
        elif change == "no product":
            query.args = (node_named(module, "q0"), crossed)
        elif change == "not turned":
            crossed.args = (node_named(module, "q0"), crossed.args[1])
    return query


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("subtracted", "a query that is no sum"),
        ("one product", "a sum of other terms than two products"),
        ("no product", "a sum of other terms than two products"),
        ("not turned", "no rotate_half in the second term"),
    ],
)
def test_another_form_of_rotation_is_named(change: str, reason: str) -> None:
    found = rotary(query_of(change))
    assert isinstance(found, NoMatch)
    assert found.reason == reason


def test_the_form_of_rotation_that_is_known() -> None:
    found = rotary(query_of("nothing"))
    assert not isinstance(found, NoMatch)
    cos, sin = found
    assert (str(cos), str(sin)) == ("cos", "sin")


@pytest.mark.parametrize(
    ("path", "layer"),
    [
        ("model.layers.7.self_attn", "model.layers.7"),
        ("model.layers.7", "model.layers.7"),
        ("model.layers.7.blocks.2.attn", "model.layers.7.blocks.2"),
        ("model.norm", ""),
        ("", ""),
    ],
)
def test_a_layers_path_ends_at_its_number(path: str, layer: str) -> None:
    assert layer_path(path) == layer


def test_a_nodes_module_is_the_innermost() -> None:
    module = decoder()
    assert module_path(node_named(module, "attended0")) == "model.layers.0.self_attn"
    assert module_path(node_named(module, "added0")) == "model.layers.0"
    assert module_path(node_named(module, "image_placed")) == ""


# ------------------------------------------------------- attention that is not one


def written_out(change: str) -> GraphModule:
    """Attention written out, with one step that is not attention's."""
    module = decoder(Spec(attention="eager", mask="float"))
    [shares] = calls(module, aten.softmax.int)
    [logits] = shares.all_input_nodes
    with module.graph.inserting_before(shares):
        if change == "no softmax":
            shares.target, shares.args = aten.relu.default, (logits,)
        elif change == "no product":
            call = module.graph.call_function
            negated = call(aten.neg.default, (logits,))
            negated.meta["val"] = logits.meta["val"]
            shares.args = (negated, -1)
        elif change == "dropout":
            with module.graph.inserting_after(shares):
                dropped = module.graph.call_function(
                    aten.dropout.default, (shares, 0.1, False)
                )
            shares.replace_all_uses_with(dropped, lambda user: user is not dropped)
            dropped.meta["val"] = shares.meta["val"]
    return module


@pytest.mark.parametrize("change", ["no softmax", "no product"])
def test_other_products_are_no_attention(change: str) -> None:
    assert list(attentions(written_out(change).graph)) == []


def test_dropout_outside_of_training_is_looked_through() -> None:
    [found] = attentions(written_out("dropout").graph)
    assert str(found.query) == "q0"


def test_the_scale_of_fused_attention_may_be_given() -> None:
    module = decoder()
    attended = node_named(module, "attended0")
    attended.kwargs = {"scale": 0.125}
    [found] = attentions(module.graph)
    assert found.scale == 0.125


# --------------------------------------------------------------- nothing, or a refusal


def test_a_graph_that_places_no_image_is_left_alone() -> None:
    b = Builder()
    value = b.input("x", b.size("B", 2), b.size("S", TOKENS), WIDTH)
    module = b.module(b.call(aten.relu.default, value))
    assert read(module.graph) is None


def test_a_prompt_on_a_filled_cache_is_left_alone() -> None:
    """Its keys are longer than the prompt."""
    b = Builder()
    samples, tokens, more = b.size("B", 2), b.size("S", TOKENS), b.size("N", 40)
    embeds = b.input("embeds", samples, tokens, WIDTH)
    mask = b.input("is_image", samples, tokens, 1, dtype=torch.bool)
    features = b.input("features", b.size("V", 12), WIDTH)
    placed = b.call(aten.masked_scatter.default, embeds, mask, features)
    with b.inside("model.layers.0.self_attn"):
        query = b.call(aten.unsqueeze.default, placed, 1)
        keys = b.input("keys", samples, 1, more, WIDTH)
        op = aten.scaled_dot_product_attention.default
        out = b.call(op, query, keys, keys)
    assert read(b.module(out).graph) is None


def placement(mask: str = "per token", *, static: bool = False) -> GraphModule:
    """Features placed by a mask of some kind, and no attention after it."""
    b = Builder()
    samples = b.size("B", 2)
    tokens: Any = TOKENS if static else b.size("S", TOKENS)
    embeds = b.input("embeds", samples, tokens, WIDTH)
    features = b.input("features", b.size("V", 12), WIDTH)
    shape = {"per token": (samples, tokens, 1), "per number": (samples, tokens, WIDTH)}
    where = b.input("is_image", *shape[mask], dtype=torch.bool)
    placed = b.call(aten.masked_scatter.default, embeds, where, features)
    return b.module(placed)


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (placement, "attention over the prompt's tokens, fused or written"),
        (lambda: placement("per number"), r"\[batch, prompt\] or \[batch, prompt, 1\]"),
        (lambda: placement(static=True), f"found the constant {TOKENS}"),
    ],
    ids=["no attention", "no mask of tokens", "a prompt length that is a number"],
)
def test_what_is_missing_is_named(module: Any, message: str) -> None:
    with pytest.raises(AnatomyError, match=message):
        read(module().graph)


def test_one_symbol_for_batch_and_prompt_is_refused() -> None:
    b = Builder()
    both = b.size("S", TOKENS)
    embeds = b.input("embeds", both, both, WIDTH)
    where = b.input("is_image", both, both, 1, dtype=torch.bool)
    features = b.input("features", b.size("V", 12), WIDTH)
    placed = b.call(aten.masked_scatter.default, embeds, where, features)
    with pytest.raises(AnatomyError, match="one symbol for the batch, another"):
        read(b.module(placed).graph)


@pytest.mark.parametrize(
    ("path", "found"),
    [
        ("model.layers.5.self_attn", "found layer 5"),
        ("model.attention", "no layer number in the path"),
    ],
)
def test_layers_out_of_order_are_refused(path: str, found: str) -> None:
    module = decoder(Spec(layers=2))
    attended = node_named(module, "attended1")
    attended.meta["nn_module_stack"] = {"x": (path, "Module")}
    with pytest.raises(AnatomyError, match=found):
        read(module.graph)


def test_two_attentions_in_one_layer_are_refused() -> None:
    """The second would be layer 1, and says that it is layer 0."""
    module = decoder()
    first = node_named(module, "attended0")
    with module.graph.inserting_after(first):
        second = module.graph.node_copy(first)
    second.meta = dict(first.meta)
    with pytest.raises(AnatomyError, match="The decoder's layers must run in order"):
        read(module.graph)


def test_a_sliding_window_is_refused() -> None:
    module = decoder()
    key = node_named(module, "k0")
    with module.graph.inserting_after(key):
        last = module.graph.call_function(aten.slice.Tensor, (key, 2, -8, sys.maxsize))
    last.meta["val"] = key.meta["val"]
    with pytest.raises(AnatomyError, match="a sliding window: only the last keys"):
        read(module.graph)


def test_two_values_that_enter_the_decoder_are_no_stream() -> None:
    """The second layer's input is plain; of the first, two are candidates."""
    module = decoder(Spec(layers=2))
    placed, length = node_named(module, "image_placed"), node_named(module, "length")
    with module.graph.inserting_after(length):
        other = module.graph.call_function(aten.neg.default, (placed,))
    other.meta["val"] = placed.meta["val"]
    node_named(module, "added0").replace_input_with(placed, other)
    first, second = (layer.stream for layer in anatomy_of(module).layers)
    assert first.entry is None
    assert second.entry == "out0"


# ------------------------------------------------------------- recipes placed on them


@pytest.mark.parametrize(
    ("site", "edge", "hidden"),
    [
        ("after_attention", "attended1", "out0"),
        ("after_layer", "out1", "out1"),
        ("before_layer", "out0", "out0"),
    ],
)
def test_a_cut_is_placed_at_its_site(site: Site, edge: str, hidden: str) -> None:
    _, plan = Case(Spec(layers=2, last_row=True), {1: 3}, site=site).planned()
    [cut] = plan.cuts
    assert (cut.edge, cut.hidden, cut.site) == (edge, hidden, site)
    assert (cut.drop, cut.new, cut.gone, cut.dropped) == (3, 0, 3, 3)


@pytest.mark.parametrize(
    ("spec", "live"),
    [
        # After the last attention nothing reads the mask.
        (Spec(), {"attended0": (2,), "image_placed": (1,)}),
        (
            Spec(layers=2),
            {"attended0": (2,), "image_placed": (1,), "mask": (2, 3)},
        ),
        (
            Spec(layers=2, rotary=True, mask=None),
            {"attended0": (2,), "image_placed": (1,), "cos": (1,), "sin": (1,)},
        ),
    ],
    ids=str,
)
def test_live_values_are_those_read_on_both_sides(
    spec: Spec, live: dict[str, tuple[int, ...]]
) -> None:
    _, plan = Case(spec, {0: 1}).planned()
    assert set(plan.cuts[0].live) == {LiveValue(n, axes) for n, axes in live.items()}
    assert plan.lengths == {"length"}


def test_positions_are_values_of_place_where_they_are_compacted() -> None:
    spec, fields = Spec(layers=2, rotary=True), {"positions": "compacted"}
    _, kept = Case(spec, {0: 1}).planned()
    _, compacted = Case(spec, {0: 1}, fields=fields).planned()
    assert kept.cuts[0].places == frozenset()
    assert compacted.cuts[0].places == {"cos", "sin"}


def test_cuts_add_up_and_recycled_tokens_count() -> None:
    """4 leave and 2 come (int(2) + 1 = 3 into int(1.5) + 1), then 2 and 1 more."""
    case = Case(
        Spec(layers=2, last_row=True),
        {0: 4, 1: 2},
        site="after_layer",
        fields={"recycle": {"tau": 0.5, "theta": 0.5}},
    )
    _, plan = case.planned()
    counts = [(c.drop, c.clustered, c.new, c.gone, c.dropped) for c in plan.cuts]
    assert counts == [(4, 3, 2, 2, 2), (2, 2, 2, 0, 2)]
    assert plan.dropped == 2
    assert plan.needed == 4


def test_counts_by_rank_are_symbols() -> None:
    case = Case(Spec(layers=2), rules={0: {"rule": "drop", "lambda": 0.5}})
    _, plan = case.planned()
    [cut] = plan.cuts
    assert isinstance(cut.drop, sympy.Symbol)
    assert str(cut.drop) == "drop_0"
    assert (cut.clustered, cut.new) == (0, 0)
    assert cut.gone == cut.drop
    assert plan.needed == 0


def test_without_cuts_there_is_nothing_to_place() -> None:
    _, plan = Case().planned()
    assert plan.cuts == ()
    assert (plan.dropped, plan.needed, plan.layers) == (0, 0, 1)


def per_sample(**changes: Any) -> Case:
    made = Case(Spec(layers=2), {0: 3}, per_sample=True, fields={"of": 6})
    return dataclasses.replace(made, **changes)


@pytest.mark.parametrize(
    ("case", "message"),
    [
        (Case(drops={0: 3}, per_sample=True), "found plain counts"),
        (per_sample(spec=Spec(layers=2, mask=None)), "found no attention_mask"),
        (
            per_sample(
                site="after_layer",
                fields={"of": 6, "recycle": {"tau": 0.5, "theta": 0.5}},
            ),
            "found recycling",
        ),
        (
            Case(drops={0: 1}, fields={"positions": "compacted"}),
            "found in layer 0: a query that is no sum",
        ),
        (Case(drops={0: 1}, site="after_layer"), "one value that is the residual"),
        (Case(drops={0: 1}, score="visionzip"), "a graph from pixels on"),
    ],
    ids=[
        "counts",
        "no mask",
        "recycled",
        "no rotary tables",
        "no stream",
        "no vision tower",
    ],
)
def test_a_recipe_that_the_graph_cannot_take_is_refused(
    case: Case, message: str
) -> None:
    with pytest.raises(PlanError, match=message):
        case.planned()


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (Case(Spec(layers=3), {2: 1}), "expected a layer below 2"),
        (Case(Spec(layers=2), {0: 4, 1: 2}), "expected at most 5 dropped"),
    ],
)
def test_a_recipe_for_another_model_is_refused(recipe: Case, message: str) -> None:
    module = decoder(Spec(layers=2))
    anatomy = dataclasses.replace(anatomy_of(module), visual_tokens=5)
    with pytest.raises(PlanError, match=message):
        place(recipe.recipe, anatomy, module.graph)


def test_features_placed_after_a_cut_are_refused() -> None:
    """As models do that add features of several depths to the stream."""
    module = decoder(Spec(layers=2))
    late = node_named(module, "out0")
    [placed] = calls(module, aten.masked_scatter.default)
    with module.graph.inserting_after(late):
        more = module.graph.call_function(
            aten.masked_scatter.default, (late, *placed.args[1:])
        )
    more.meta["val"] = late.meta["val"]
    recipe = Case(Spec(layers=2), {0: 1}).recipe
    anatomy = anatomy_of(module)
    with pytest.raises(PlanError, match="a cut after all layers that visual features"):
        place(recipe, anatomy, module.graph)


def test_two_prompts_in_a_row_cannot_be_gathered() -> None:
    """A value of 2 S numbers crosses the cut: which of them are the tokens'?"""
    module = decoder(Spec(layers=2))
    mask, added = node_named(module, "mask"), node_named(module, "added0")
    with module.graph.inserting_before(node_named(module, "length")):
        call = module.graph.call_function
        longer = call(aten.cat.default, ([mask, mask], 3))
    value = mask.meta["val"]
    with value.fake_mode, enable_python_dispatcher():
        longer.meta["val"] = aten.cat.default([value, value], 3)
    with module.graph.inserting_after(added):
        module.graph.call_function(aten.any.default, (longer,))
    anatomy = anatomy_of(module)
    recipe = Case(Spec(layers=2), {0: 1}).recipe
    with pytest.raises(PlanError, match=r"expected a tensor \[batch or 1, ..., prompt"):
        place(recipe, anatomy, module.graph)


@pytest.mark.parametrize("read", [True, False])
def test_numbers_made_of_the_length_after_a_cut_are_refused(*, read: bool) -> None:
    """They would number kept tokens anew; a value that nothing reads harms nobody."""
    module = decoder(Spec(layers=2))
    added, length = node_named(module, "added1"), node_named(module, "length")
    with module.graph.inserting_after(added):
        numbers = module.graph.call_function(aten.arange.default, (length,))
    with added.meta["val"].fake_mode, enable_python_dispatcher():
        numbers.meta["val"] = aten.arange.default(length.meta["val"])
    numbers.meta["nn_module_stack"] = added.meta["nn_module_stack"]
    if read:
        with module.graph.inserting_after(numbers):
            module.graph.call_function(aten.floor.default, (numbers,))
    recipe = Case(Spec(layers=2), {0: 1}).recipe
    if not read:
        assert len(place(recipe, anatomy_of(module), module.graph).cuts) == 1
        return
    with pytest.raises(PlanError, match=r"layers\.1.* numbers the tokens"):
        place(recipe, anatomy_of(module), module.graph)


def sorted_and_back(b: Builder, numbers: Node, order: Node) -> Node:
    """As layers of experts do: which place each token had before they were sorted."""
    places = b.call(aten.empty_like.default, order)
    written = b.call(aten.index_put_.default, places, [order], numbers)
    return b.call(aten.view.default, written, [-1])


@pytest.mark.parametrize("use", ["as indices", "sorted and back", "added"])
def test_numbers_that_only_put_tokens_in_order_are_no_positions(use: str) -> None:
    """They index tokens; a sum with them would be another value after a cut."""
    b = Builder()
    tokens = b.size("S", 12)
    stream = b.input("stream", tokens, 4)
    order = b.input("order", tokens, dtype=torch.int64)
    length = b.call(aten.sym_size.int, stream, 0)
    numbers = b.call(aten.arange.default, length, name="numbers")
    if use == "sorted and back":
        numbers = sorted_and_back(b, numbers, order)
    if use == "added":
        numbers = b.call(aten.add.Tensor, numbers, 1)
    indexed = b.call(aten.index.Tensor, stream, [numbers])
    module = b.module(indexed)
    uses = Uses(module.graph, size_expr(tokens))
    recipe, cut = Case(drops={0: 2}).recipe, Cut(layer=0, drop=2)
    if use != "added":
        uses.check_not_numbered("stream", recipe, cut)
        return
    with pytest.raises(
        PlanError, match="numbers the tokens that it gets, node numbers"
    ):
        uses.check_not_numbered("stream", recipe, cut)


def test_a_size_of_batch_and_prompt_is_planned_and_another_refused() -> None:
    """By hand: all samples' tokens are counted once before the first layer."""
    spec = Spec(layers=2, flat=True)
    module = decoder(spec)
    plan = place(Case(spec, {0: 2}).recipe, anatomy_of(module), module.graph)
    assert [cut.sizes for cut in plan.cuts] == [("all_tokens",)]
    features = node_named(module, "features").meta["val"].shape[0]
    counted = node_named(module, "all_tokens")
    counted.meta["val"] = counted.meta["val"] + features
    with pytest.raises(PlanError, match=r"all_tokens.* a size of batch and prompt"):
        place(Case(spec, {0: 2}).recipe, anatomy_of(module), module.graph)


def test_what_crosses_an_edge_is_made_before_and_read_after_it() -> None:
    """Weights of the second half cross too; only values with tokens are gathered."""
    module = decoder(Spec())
    uses = Uses(module.graph, anatomy_of(module).tokens)
    across = {str(node) for node in uses.across("attended0")}
    assert across == {"length", "image_placed", "attended0", "w_o0", "w_m0"}


# ------------------------------------------------------------------- a vision tower


def tower(leading: int = 1, *, mask: bool = False, twice: bool = False) -> GraphModule:
    """One layer of a tower: attention over all tokens, a projector, features."""
    b = Builder()
    images = b.size("I", 3)
    pixels = b.input("pixels", images, IMAGE + leading, WIDTH)
    weight = b.input("weight", WIDTH, WIDTH)
    with b.inside("vision.layers.4"):
        with b.inside("vision.layers.4.attn"):
            parts = [
                b.call(
                    aten.transpose.int,
                    b.call(aten.unflatten.int, pixels, -1, [HEADS, HEAD]),
                    1,
                    2,
                    name=name,
                )
                for name in ("tq", "tk", "tv")
            ]
            given: list[Any] = list(parts)
            if mask:
                seen = b.input("seen", images, 1, IMAGE + leading, IMAGE + leading)
                given.append(seen)
            op = aten.scaled_dot_product_attention.default
            attended = b.call(op, *given)
            if twice:
                b.call(op, *given)
            joined = b.call(
                aten.flatten.using_ints, b.call(aten.transpose.int, attended, 1, 2), 2
            )
        out = b.call(aten.add.Tensor, pixels, joined, name="tower_out")
    patches = b.call(aten.slice.Tensor, out, 1, leading, sys.maxsize)
    features = b.call(aten.linear.default, patches, weight, name="projected")
    flat = b.call(aten.flatten.using_ints, features, 0, 1, name="rows")
    return b.module(flat)


@pytest.mark.parametrize("leading", [0, 1, 3])
def test_the_towers_attention_is_found_after_the_projector(leading: int) -> None:
    module = tower(leading)
    found = read_tower(module.graph, node_named(module, "rows"))
    assert isinstance(found, Tower)
    assert (found.path, found.query, found.key) == ("vision.layers.4.attn", "tq", "tk")
    assert (found.scale, found.leading) == (1 / math.sqrt(HEAD), leading)


@pytest.mark.parametrize(
    ("module", "reason"),
    [(tower(mask=True), "masked, windowed or grouped"), (tower(twice=True), "2 ")],
    ids=["attention with a mask", "two candidates"],
)
def test_no_tower_where_it_is_not_plain_which(module: GraphModule, reason: str) -> None:
    found = read_tower(module.graph, node_named(module, "rows"))
    assert isinstance(found, NoMatch)
    assert reason in str(found)


def test_features_of_every_second_patch_are_not_the_towers() -> None:
    module = tower()
    [part] = calls(module, aten.slice.Tensor)
    part.args = (*part.args, 2)
    found = read_tower(module.graph, node_named(module, "rows"))
    assert isinstance(found, NoMatch)
    assert found.node == str(part)
