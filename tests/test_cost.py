"""The cost model against FitPrune's published numbers and hand-made arithmetic."""

from __future__ import annotations

import pytest
from transformers import (
    GPT2Config,
    LlamaConfig,
    LlavaConfig,
    MixtralConfig,
    PreTrainedConfig,
)

from vtprune_fx.errors import InputError, PlanError
from vtprune_fx.recipes.counting import LLAVA_1_5_7B, Geometry, cost
from vtprune_fx.recipes.loading import load_recipe

# Pruned MACs over dense MACs, visual tokens alone, to three digits.
RATIOS = {
    "fitprune-llava-1.5-7b-10": 0.936,
    "fitprune-llava-1.5-7b-20": 0.847,
    "fitprune-llava-1.5-7b-30": 0.721,
    "fitprune-llava-1.5-7b-40": 0.612,
    "fitprune-llava-1.5-7b-50": 0.503,
    "fitprune-llava-1.5-7b-55": 0.455,
    "fitprune-llava-1.5-7b-60": 0.403,
    "fitprune-llava-1.5-7b-70": 0.303,
    "fitprune-llava-1.5-7b-80": 0.203,
    "fitprune-llava-1.5-7b-90": 0.103,
    "fitprune-llava-hr-7b-40": 0.612,
    "fitprune-llava-hr-7b-60": 0.404,
    "fitprune-llava-next-7b-40": 0.597,
    "fitprune-llava-next-7b-60": 0.397,
}

# Two layers, two query heads on one key/value head: small enough to count by hand.
SMALL = Geometry(
    layers=2, hidden=8, intermediate=10, heads=2, kv_heads=1, head_dim=3, kv_bytes=4
)
ONE_CUT = load_recipe(
    {
        "schema_version": 1,
        "name": "one-cut",
        "method": "fitprune",
        "score": "fitprune",
        "positions": "kept",
        "layers": 2,
        "visual_tokens": 5,
        "cuts": [{"layer": 0, "drop": 3}],
        "provenance": {"source": "a test"},
    }
)


@pytest.mark.parametrize("name", list(RATIOS))
def test_published_ratio(name: str) -> None:
    loaded = load_recipe(name)
    counted = cost(loaded, LLAVA_1_5_7B, loaded.visual_tokens, text_tokens=0)
    assert round(counted.visual.ratio, 3) == RATIOS[name]
    assert counted.visual.saved == pytest.approx(1 - counted.visual.ratio)
    assert counted.total == counted.visual


def test_published_dense_macs() -> None:
    loaded = load_recipe("fitprune-llava-1.5-7b-60")
    work = cost(loaded, LLAVA_1_5_7B, 576, text_tokens=0).visual
    assert round(work.dense_macs / 1e12, 3) == 3.817
    assert work.dense_flops == 2 * work.dense_macs
    assert work.pruned_flops == 2 * work.pruned_macs


def test_geometry_of_llava_is_read_from_its_nested_config() -> None:
    # Constructed without values, LlavaConfig is the 7B model.
    assert Geometry.from_config(LlavaConfig()) == LLAVA_1_5_7B


def test_geometry_reads_grouped_heads_head_width_and_dtype() -> None:
    config = LlamaConfig(
        num_hidden_layers=3,
        hidden_size=16,
        intermediate_size=20,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=6,
        dtype="float32",
    )
    assert Geometry.from_config(config) == Geometry(3, 16, 20, 4, 2, 6, kv_bytes=4)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (GPT2Config(), "config GPT2Config, field intermediate_size: .* found None"),
        (MixtralConfig(), "config MixtralConfig, field num_experts: .* found 8"),
    ],
)
def test_geometry_refuses_other_decoders(
    config: PreTrainedConfig, message: str
) -> None:
    with pytest.raises(InputError, match=f"{message}.*gated MLPs"):
        Geometry.from_config(config)


def test_grouped_query_attention_counted_by_hand() -> None:
    # 5 visual and 1 text token enter layer 0; 2 and 1 are left.
    #   q 6*8*6, k and v 6*8*3 each, attention 2*6*6*6       = 288 + 288 + 432 = 1008
    #   o 3*6*8, MLP 3*3*8*10                                = 144 + 720       =  864
    # Layer 1 keeps its 3: 144 + 144 + 108 before, 864 after                   = 1260
    # Dense: 1008 before, 288 + 1440 after, twice                              = 5472
    counted = cost(ONE_CUT, SMALL, visual_tokens=5, text_tokens=1)
    assert (counted.entering, counted.after) == ((5, 2), (2, 2))
    assert counted.total.pruned_macs == 1008 + 864 + 1260
    assert counted.total.dense_macs == 5472
    # One more product of Q and K at the cut: 6 * 6 tokens, 2 heads of width 3.
    assert counted.total.scorer_macs == 216


@pytest.mark.parametrize(
    ("site", "entering", "macs", "cached"),
    [
        # 6 tokens reach layer 0 and 3 are left, as above: 1008 + 1728 and 396 + 864.
        ("after_layer", (5, 2), 1008 + 1728 + 396 + 864, 6 + 3),
        ("before_layer", (2, 2), 2 * (396 + 864), 3 + 3),
    ],
)
def test_cuts_at_other_sites_counted_by_hand(
    site: str, entering: tuple[int, int], macs: int, cached: int
) -> None:
    cut = ONE_CUT.cuts[0].model_copy(update={"site": site})
    moved = ONE_CUT.model_copy(update={"cuts": (cut,), "score": "last-token"})
    counted = cost(moved, SMALL, visual_tokens=5, text_tokens=1)
    assert counted.entering == entering
    assert counted.total.pruned_macs == macs
    assert counted.total.pruned_cache_bytes == cached * 24
    # One row over 6 tokens; ahead of the layer its queries and keys too, 6 * 8 * 9.
    ahead = 6 * 8 * 9 if site == "before_layer" else 0
    assert counted.total.scorer_macs == 6 * 6 + ahead


def test_cache_holds_the_tokens_that_enter_a_layer() -> None:
    # A token of a layer: keys and values, one head of width 3, 4 bytes = 24 bytes.
    work = cost(ONE_CUT, SMALL, visual_tokens=5, text_tokens=1).total
    assert work.dense_cache_bytes == 2 * 6 * 24
    assert work.pruned_cache_bytes == (6 + 3) * 24
    assert work.cache_ratio == 9 / 12


def test_text_tokens_dilute_the_saving() -> None:
    loaded = load_recipe("fitprune-llava-1.5-7b-60")
    counted = cost(loaded, LLAVA_1_5_7B, 576, text_tokens=75)
    assert counted.visual.ratio < counted.total.ratio < 1
    assert counted.visual.dense_macs < counted.total.dense_macs


def test_prompt_without_image_saves_nothing() -> None:
    counted = cost(ONE_CUT, SMALL, visual_tokens=0, text_tokens=4)
    assert counted.total.ratio == 1
    assert counted.total.scorer_macs == 0
    assert (counted.visual.ratio, counted.visual.cache_ratio) == (1, 1)


def test_no_cut_costs_what_dense_costs() -> None:
    nothing = ONE_CUT.model_copy(update={"cuts": ()})
    work = cost(nothing, SMALL, visual_tokens=5, text_tokens=1).total
    assert work.pruned_macs == work.dense_macs
    assert work.pruned_cache_bytes == work.dense_cache_bytes


def test_recipe_for_a_deeper_model_is_refused() -> None:
    loaded = load_recipe("fitprune-llava-1.5-7b-60")
    with pytest.raises(PlanError, match=r"the 2 layers .* found a cut in layer 28"):
        cost(loaded, SMALL, visual_tokens=576, text_tokens=0)


@pytest.mark.parametrize(("visual", "text"), [(-1, 0), (0, -1)])
def test_negative_tokens_are_refused(visual: int, text: int) -> None:
    with pytest.raises(InputError, match="expected 0 or more, found -1"):
        cost(ONE_CUT, SMALL, visual_tokens=visual, text_tokens=text)
