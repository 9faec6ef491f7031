"""VisionZip: its arithmetic by hand, the tower it looks at, and what is refused."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, tensor
from transformers import (
    AutoConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    SiglipVisionConfig,
)

import vtprune_fx
from tests.tiny import (
    IMAGE,
    PATCH,
    VOCABULARY,
    Compiled,
    assert_matches_oracle,
    batch,
    exported_program,
    recipe_for,
    tiny_llava,
)
from vtprune_fx import oracle
from vtprune_fx.analysis.anatomy import read
from vtprune_fx.errors import InputError, PlanError
from vtprune_fx.generation.arguments import refuse_mixed_up
from vtprune_fx.oracle import tower
from vtprune_fx.planning.place import place
from vtprune_fx.selection import contextual

if TYPE_CHECKING:
    from torch.fx import GraphModule

    from vtprune_fx.recipes.schema import Recipe

aten = torch.ops.aten


def visionzip(layers: int) -> Recipe:
    return recipe_for(
        *(layers, {0: 11}),
        site="before_layer",
        score="visionzip",
        positions="compacted",
        recycle={"tau": 1.0, "theta": 0.3, "form": "contextual"},
    )


# ------------------------------------------------------------------ by hand

# Token 0 is text. 1, 2, 3, 5 and 6 leave: every 5 // 2-th is a target, 1 and 3.
HIDDEN = tensor([[9, 9], [1, 0], [10, 20], [0, 1], [7, 7], [4, 6], [8, 2]]).float()
CLUSTERED = tensor([[3, 1, 5, 2, 6]])
LEAVING = [1, 2, 3, 5, 6]


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        pytest.param(
            # 2 is like 1 (cosines .95 and .32), 5 and 6 are like 3 (.89 and .98).
            # (1, 0) + (10, 20), and (0, 1) + ((4, 6) + (8, 2)) / 2.
            [[9, 9], [1, 0], [3, 1], [0, 1], [9, 9], [1, 2], [-1, 5]],
            [[11, 20], [6, 5]],
            id="each has some",
        ),
        pytest.param(
            # (1, 0) + ((10, 20) + (4, 6) + (8, 2)) / 3, and (0, 1) as it is.
            [[9, 9], [1, 0], [3, 1], [0, 1], [9, 9], [2, 1], [5, -1]],
            [[1 + 22 / 3, 28 / 3], [0, 1]],
            id="nobody joins the second",
        ),
    ],
)
def test_others_join_the_target_with_the_key_most_like_theirs(
    keys: list[list[int]], expected: list[list[float]]
) -> None:
    of_keys = tensor(keys).float()
    found = contextual.merge(HIDDEN[None], of_keys[None], CLUSTERED, 2)
    torch.testing.assert_close(found, tensor([expected]).float())
    plain = tower.merge(HIDDEN[LEAVING], of_keys[LEAVING], 2)
    torch.testing.assert_close(plain, tensor(expected).float())


def looked_at(leading: int) -> tuple[Tensor, Tensor]:
    """An image of 3 tokens, two heads of width 1; the first of them rates by 1 and 0.

    Its softmax of (0, ln 2, ln 3) is 1/6, 2/6, 3/6, and 1/3 each with a query of 0.
    """
    key = tensor([[0.0, 2.0, 3.0]]).log().clamp(min=0).expand(2, 3)[None, :, :, None]
    query = tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 0.0]])[None, :, :, None]
    visual = tensor([[False, True, True]] if leading else [[True, True, True]])
    attended = contextual.class_attention(query, key, visual, 1.0, leading)
    keys = key * tensor([1, 3])[:, None, None]
    return attended, contextual.mean_keys(keys, visual, leading)


def test_the_class_tokens_attention_is_summed_over_heads() -> None:
    attended, keys = looked_at(leading=1)
    torch.testing.assert_close(attended[0, 1:], tensor([2 / 6 + 1 / 3, 3 / 6 + 1 / 3]))
    # ln 2 and ln 3, once and three times.
    torch.testing.assert_close(keys[0, 1:, 0], 2 * tensor([2.0, 3.0]).log())


def test_without_a_class_token_all_rate() -> None:
    """The first row as above, five others of 1/3 each; over the three tokens."""
    attended, _ = looked_at(leading=0)
    sums = [first / 6 + 5 / 3 for first in (1, 2, 3)]
    torch.testing.assert_close(attended[0], tensor(sums) / 3)


# ---------------------------------------------------------------- the tower


def graph_with(operator: Any = None, *args: Any) -> GraphModule:
    """A graph in which an operator stands between tower and projector."""
    module: GraphModule = copy.deepcopy(exported_program().graph_module)
    if operator is not None:
        [first] = [
            node
            for node in module.graph.nodes
            if node.target == aten.linear.default
            and "multi_modal_projector_linear_1" in str(node.args[1])
        ]
        came = first.args[0]
        with module.graph.inserting_before(first):
            added = module.graph.call_function(operator, (came, *args))
        added.meta = came.meta | {"val": operator(came.meta["val"], *args)}
        first.replace_input_with(came, added)
    return module


def test_the_layer_is_found_whose_output_is_selected() -> None:
    """Of two layers the last but one; a class token stands ahead of the patches."""
    anatomy = read(graph_with().graph)
    assert anatomy is not None
    assert anatomy.tower is not None
    assert anatomy.tower.path.endswith("vision_tower.encoder.layers.0.self_attn")
    assert anatomy.tower.leading == 1
    inside = read(graph_with(aten.gelu.default).graph)
    assert inside is not None
    assert inside.tower == anatomy.tower


@pytest.mark.parametrize(
    "added",
    [
        (aten.flip.default, [1]),
        (aten.slice.Tensor, 1, 0, 8),
        (aten.view.default, [-1, 8, 32]),
    ],
    ids=["another order", "fewer patches", "two patches a row"],
)
def test_features_that_are_not_the_patches_in_their_order(added: Any) -> None:
    module = graph_with(*added)
    anatomy = read(module.graph)
    assert anatomy is not None
    assert anatomy.tower is None
    with pytest.raises(PlanError, match="a layer of the vision tower makes all image"):
        place(visionzip(2), anatomy, module.graph)
    assert place(recipe_for(2, {0: 5}), anatomy, module.graph).cuts


def test_a_tower_without_a_class_token_is_the_oracle() -> None:
    torch.manual_seed(0)
    sizes: Any = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    text = AutoConfig.for_model(
        "llama", vocab_size=VOCABULARY, num_hidden_layers=1, **sizes
    )
    vision = SiglipVisionConfig(
        **sizes, num_hidden_layers=2, image_size=56, patch_size=PATCH
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=IMAGE,
        vision_feature_select_strategy="full",
    )
    model = LlavaForConditionalGeneration(config).eval()
    shape: Any = tiny_llava(layers=1)  # whose images are as large
    inputs = batch(shape, (5, 9), (2, 4, 1))
    compiled = Compiled(model, visionzip(1))
    outputs = compiled(**inputs)
    kept = compiled.recorded.keep_sets
    assert_matches_oracle(outputs, kept, model, visionzip(1), inputs)


# --------------------------------------------------------------- what is refused


def test_the_oracle_asks_for_images() -> None:
    sample = oracle.Sample(tensor([5, *[IMAGE] * 16, 7]), torch.zeros(16, 32))
    with pytest.raises(InputError, match=r"made of images.*found features alone"):
        oracle.prefill(tiny_llava(layers=1), visionzip(1), sample)


def test_several_images_are_not_repeated_for_beams() -> None:
    model: Any = tiny_llava.__wrapped__(layers=1)
    inputs = batch(model, (5, 1, 9), (2, 4, 3))
    vtprune_fx.compile(model, visionzip(1), inner="eager")
    with pytest.raises(InputError, match="one image in each"):
        model.generate(**inputs, num_beams=2, max_new_tokens=2, do_sample=False)


def test_the_same_text_about_other_images_is_no_repetition() -> None:
    ids, pixels = torch.ones(2, 8), torch.arange(4.0)[:, None]
    refuse_mixed_up(ids, pixels)
    refuse_mixed_up(ids, pixels[:2].repeat_interleave(1, dim=0))
    with pytest.raises(InputError, match="found 4 images in 2 prompts"):
        refuse_mixed_up(ids, pixels[:2].repeat_interleave(2, dim=0))


def test_encoded_images_do_not_show_the_tower() -> None:
    model: Any = tiny_llava.__wrapped__(layers=1)
    inputs = batch(model, (5, 9), (2, 4))
    images = model.get_image_features(inputs.pop("pixel_values"), return_dict=True)
    vtprune_fx.compile(model, visionzip(1), inner="eager")
    with pytest.raises(PlanError, match="Give the model pixel_values"), torch.no_grad():
        model(**inputs, mm_encoder_outputs={"image": images})
