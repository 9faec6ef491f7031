"""The oracle against recordings of the published code and against Hugging Face."""

from __future__ import annotations

import functools
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from tests.golden_cases import (
    CASES,
    IMAGE_TOKEN_ID,
    GoldenCase,
    encoded,
    load_case,
    shared_llava,
)
from vtprune_fx import oracle
from vtprune_fx.errors import InputError, PlanError
from vtprune_fx.oracle import pruner
from vtprune_fx.oracle import scores as oracle_scores
from vtprune_fx.recipes.schema import Cut, Provenance, Recipe

LOGITS = 5e-4
"""Absolute tolerance against recordings, which ran on another transformers."""
EAGER = 1e-5
"""Absolute tolerance against Hugging Face's eager forward in float32."""
SCORES = 2e-4
"""Relative tolerance of scores against recordings."""

WITH_DECODE = [name for name in CASES if load_case(name).has_decode]
IMAGE, PAD = 99, 0
"""Image and padding token of the tiny models."""


# ------------------------------------------------------------ published recordings


@functools.cache
def golden_run(name: str) -> tuple[GoldenCase, oracle.Prefill]:
    """A run to look at: copy what you decode from."""
    case = load_case(name)
    model = shared_llava(case.model_name)
    return case, oracle.prefill(model, case.recipe(), golden_sample(case))


def golden_sample(case: GoldenCase) -> oracle.Sample:
    return oracle.Sample(case.input_ids[0], case.features)


def lengths(caches: list[Tensor]) -> list[int]:
    return [cache.shape[1] for cache in caches]


def difference(ours: Tensor, theirs: Tensor) -> float:
    assert ours.shape == theirs.shape
    return (ours - theirs).abs().max().item()


def test_image_token_is_in_no_recording() -> None:
    for name in CASES:
        case = load_case(name)
        assert IMAGE_TOKEN_ID not in case.tensor("input_ids")
        assert not case.has_decode or IMAGE_TOKEN_ID not in case.tensor(
            "generate_tokens"
        )


@pytest.mark.parametrize("name", CASES)
def test_same_tokens_are_kept_in_every_layer(name: str) -> None:
    case, run = golden_run(name)
    assert [kept.tolist() for kept in run.kept] == [
        case.kept(layer) for layer in range(len(run.kept))
    ]
    assert run.kept[-1].tolist() == case.tensor("kept_positions_final").tolist()


@pytest.mark.parametrize("name", CASES)
def test_same_cache_lengths(name: str) -> None:
    case, run = golden_run(name)
    assert lengths(run.keys) == lengths(run.values) == case.tensor("kv_len").tolist()


@pytest.mark.parametrize("name", CASES)
def test_same_scores(name: str) -> None:
    case, run = golden_run(name)
    recorded = case.tensor("score_prod")
    for layer, scores in run.scores.items():
        theirs = recorded[layer][~recorded[layer].isnan()]
        torch.testing.assert_close(scores, theirs, rtol=SCORES, atol=0)
    assert sorted(run.scores) == [cut.layer for cut in case.recipe().cuts]


@pytest.mark.parametrize("name", CASES)
def test_same_hidden_states_and_logits(name: str) -> None:
    case, run = golden_run(name)
    assert difference(run.hidden, case.tensor("last_hidden")) < LOGITS
    assert difference(run.logits[-8:], case.tensor("logits_last8")) < LOGITS


@pytest.mark.parametrize("name", WITH_DECODE)
def test_same_decode_steps(name: str) -> None:
    case, run = golden_run(name)
    state = replace(run, keys=list(run.keys), values=list(run.values))
    model = shared_llava(case.model_name)
    positions = case.tensor("dec_positions")
    for index, token in enumerate(case.tensor("dec_tokens").tolist()):
        assert positions[index].tolist() == state.next_positions
        logits = oracle.step(model, state, token)
        assert difference(logits, case.tensor("dec_logits")[index]) < LOGITS
        assert lengths(state.keys) == case.tensor("dec_kv_len")[index].tolist()


@pytest.mark.parametrize("name", WITH_DECODE)
def test_same_generated_tokens(name: str) -> None:
    case = load_case(name)
    model, tokens = shared_llava(case.model_name), case.tensor("generate_tokens")
    made = oracle.generate(model, case.recipe(), golden_sample(case), len(tokens))
    assert made == tokens.tolist()


@pytest.mark.parametrize("name", [name for name in CASES if name.endswith("_r0")])
def test_unpruned_hugging_face_gives_the_recorded_logits(name: str) -> None:
    case = load_case(name)
    with torch.no_grad():
        logits = shared_llava(case.model_name)(
            input_ids=case.input_ids, mm_encoder_outputs=encoded(case.features)
        ).logits
    assert difference(logits[0, -8:], case.tensor("logits_last8")) < LOGITS


# --------------------------------------------------------------------- tiny models


@functools.cache
def tiny_llava(kv_heads: int = 4, layers: int = 3) -> LlavaForConditionalGeneration:
    """Four visual tokens an image, four heads, a head size apart from hidden/heads."""
    torch.manual_seed(0)
    text = LlamaConfig(
        vocab_size=100,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=kv_heads,
        head_dim=16,
        initializer_range=0.3,
    )
    vision = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
    )
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=IMAGE
    )
    model = LlavaForConditionalGeneration(config)
    model.train(mode=False)
    model.set_attn_implementation("eager")
    return model


def make_recipe(**drops: int) -> Recipe:
    """A recipe for the tiny model: ``make_recipe(l0=2)`` drops 2 in layer 0."""
    cuts = [Cut(layer=int(name[1:]), drop=drop) for name, drop in drops.items()]
    return Recipe(
        schema_version=1,
        name="test",
        method="fitprune",
        score="fitprune",
        positions="kept",
        layers=99,
        visual_tokens=99,
        cuts=tuple(cuts),
        provenance=Provenance(source="this test"),
    )


KEEP_ALL = make_recipe()
PROMPTS = (
    [1, 2, *[IMAGE] * 4, 3, 4, 5],
    [6, *[IMAGE] * 4, 7, 8, *[IMAGE] * 4, 9],
    [10, 11, 12],
)
"""One image, two images, none."""


def padded(side: str) -> tuple[Tensor, Tensor]:
    """The prompts in one batch: ids and attention mask, [3, 12] each."""
    width = max(map(len, PROMPTS))
    ids = torch.full((len(PROMPTS), width), PAD)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(PROMPTS):
        start = width - len(prompt) if side == "left" else 0
        ids[row, start : start + len(prompt)] = torch.tensor(prompt)
        mask[row, start : start + len(prompt)] = 1
    return ids, mask


def images(count: int) -> Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def tiny_sample(prompt: list[int]) -> oracle.Sample:
    ids = torch.tensor(prompt)
    generator = torch.Generator().manual_seed(2)
    return oracle.Sample(ids, torch.randn(prompt.count(IMAGE), 32, generator=generator))


def hugging_face(model: LlavaForConditionalGeneration, sample: oracle.Sample) -> Tensor:
    """Logits of the model's own forward. [n, vocab]."""
    with torch.no_grad():
        logits: Tensor = model(
            input_ids=sample.input_ids[None],
            position_ids=sample.positions[None],
            mm_encoder_outputs=encoded(sample.features),
        ).logits
    return logits[0]


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_keep_all_is_the_models_own_forward(kv_heads: int) -> None:
    model, sample = tiny_llava(kv_heads), tiny_sample(PROMPTS[1])
    run = oracle.prefill(model, KEEP_ALL, sample)
    assert difference(run.logits, hugging_face(model, sample)) < EAGER
    assert [cache.shape for cache in run.keys] == [(kv_heads, 12, 16)] * 3
    assert run.scores == {}


@pytest.mark.parametrize("kv_heads", [2, 4])
def test_low_precision_follows_the_models_casts(kv_heads: int) -> None:
    model = deepcopy(tiny_llava(kv_heads)).bfloat16()
    sample = tiny_sample(PROMPTS[1])
    run = oracle.prefill(model, KEEP_ALL, sample)
    assert run.logits.dtype == torch.bfloat16
    torch.testing.assert_close(run.logits, hugging_face(model, sample))
    pruned = oracle.prefill(model, make_recipe(l0=1), sample)
    assert pruned.scores[0].dtype == torch.float32


@pytest.mark.parametrize("side", ["left", "right"])
def test_split_batch_is_the_models_own_batched_forward(side: str) -> None:
    model, (ids, mask), pixels = tiny_llava(), padded(side), images(3)
    with torch.no_grad():
        batch = model(input_ids=ids, attention_mask=mask, pixel_values=pixels).logits
    samples = oracle.split_batch(model, ids, mask, pixel_values=pixels)
    for row, sample in enumerate(samples):
        assert sample.input_ids.tolist() == PROMPTS[row]
        assert len(sample.features) == PROMPTS[row].count(IMAGE)
        run = oracle.prefill(model, KEEP_ALL, sample)
        assert difference(run.logits, batch[row][mask[row].bool()]) < EAGER


def test_split_batch_positions() -> None:
    model, (ids, mask) = tiny_llava(), padded("left")
    features = torch.zeros(12, 32)
    plain = oracle.split_batch(model, ids, mask, features=features)
    assert plain[0].positions.tolist() == list(range(3, 12))
    counted = (mask.cumsum(1) - 1).clamp(min=0)
    given = oracle.split_batch(
        model, ids, mask, features=features, position_ids=counted
    )
    assert given[0].positions.tolist() == list(range(9))
    assert oracle.prefill(model, KEEP_ALL, given[0]).next_positions == [9] * 3


def test_split_batch_gives_features_in_order() -> None:
    model, (ids, mask) = tiny_llava(), padded("left")
    features = torch.arange(12.0)[:, None].expand(12, 32)
    samples = oracle.split_batch(model, ids, mask, features=features)
    split = [sample.features[:, 0].tolist() for sample in samples]
    assert split == [[0, 1, 2, 3], [4, 5, 6, 7, 8, 9, 10, 11], []]


def test_split_batch_of_text_alone() -> None:
    ids = torch.tensor([[1, 2, 3]])
    (sample,) = oracle.split_batch(tiny_llava(), ids, torch.ones_like(ids))
    assert sample.features.shape == (0, 32)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_a_cut_is_recomputed_from_the_models_own_attentions(kv_heads: int) -> None:
    """Scores from ``output_attentions``: grouped heads must be told apart there too."""
    model, sample = tiny_llava(kv_heads), tiny_sample(PROMPTS[1])
    run = oracle.prefill(model, make_recipe(l0=3), sample)
    with torch.no_grad():
        attentions = model(
            input_ids=sample.input_ids[None],
            mm_encoder_outputs=encoded(sample.features),
            output_attentions=True,
        ).attentions
    largest = attentions[0][0].amax(dim=0)
    visual = [i for i, token in enumerate(PROMPTS[1]) if token == IMAGE]
    scores = {i: (largest[11, i] * largest[visual, i].sum() / 8).item() for i in visual}
    gone = sorted(visual, key=scores.__getitem__)[:3]
    torch.testing.assert_close(run.scores[0], torch.tensor(list(scores.values())))
    assert run.kept[0].tolist() == [i for i in range(12) if i not in gone]
    assert lengths(run.keys) == [12, 9, 9]
    assert run.logits.shape == (9, 100)
    assert run.next_positions == [12] * 3


def test_of_equal_scores_the_earlier_token_leaves() -> None:
    """Nothing follows the image: every score is zero."""
    sample = tiny_sample([1, *[IMAGE] * 4])
    run = oracle.prefill(tiny_llava(), make_recipe(l0=2), sample)
    assert run.kept[0].tolist() == [0, 3, 4]


def test_the_text_after_the_last_image_rates_even_when_that_image_is_gone() -> None:
    """Tokens 0-1 are the first image, 2-3 text, 4 the second image, 5 text."""
    visual = torch.tensor([True, True, False, False, True, False])
    instruction = pruner._after_last(visual)
    assert instruction.tolist() == [False] * 5 + [True]
    left = torch.tensor([0, 1, 2, 3, 5])
    probabilities = torch.eye(5)[None].repeat(2, 1, 1)
    probabilities[0, 4, 1] = 0.5
    scores = oracle_scores.fitprune_scores(
        probabilities, visual[left], instruction[left]
    )
    assert scores.tolist() == [0, 0.25]


def test_all_visual_tokens_may_leave() -> None:
    model, sample = tiny_llava(), tiny_sample(PROMPTS[0])
    run = oracle.prefill(model, make_recipe(l0=1, l1=3), sample)
    assert run.kept[2].tolist() == [0, 1, 6, 7, 8]
    assert lengths(run.values) == [9, 8, 5]


def test_shares_are_of_the_samples_own_visual_tokens() -> None:
    """5 of 10 and 3 of 10, for a sample of 4: floor(2) and floor(1.2)."""
    recipe = make_recipe(l0=5, l1=3).model_copy(update={"of": 10})
    run = oracle.prefill(tiny_llava(), recipe, tiny_sample(PROMPTS[0]))
    assert lengths(run.keys) == [9, 7, 6]


def test_decoding_unpruned_is_the_models_own_forward_over_the_longer_prompt() -> None:
    model, sample = tiny_llava(2), tiny_sample(PROMPTS[0])
    state = oracle.prefill(model, KEEP_ALL, sample)
    stepped = [oracle.step(model, state, token) for token in (7, 8)]
    longer = tiny_sample([*PROMPTS[0], 7, 8])
    logits = torch.stack(stepped)
    assert difference(logits, hugging_face(model, longer)[-2:]) < EAGER
    assert state.next_positions == [11] * 3


def test_generate_ends_with_an_end_token() -> None:
    model, sample = tiny_llava(), tiny_sample(PROMPTS[0])
    recipe = make_recipe(l1=2)
    tokens = oracle.generate(model, recipe, sample, 4)
    assert len(tokens) == 4
    end = tokens.index(tokens[2])
    assert (
        oracle.generate(model, recipe, sample, 4, eos=tokens[2:3]) == tokens[: end + 1]
    )
    assert oracle.generate(model, recipe, sample, 0) == []


def test_text_alone_is_not_pruned() -> None:
    model, sample = tiny_llava(), tiny_sample(PROMPTS[2])
    run = oracle.prefill(model, make_recipe(l0=50), sample)
    assert difference(run.logits, hugging_face(model, sample)) < EAGER


@pytest.mark.parametrize(
    ("drops", "where", "expected"),
    [
        ({"l0": 5}, "layer 0", "at most 4 visual tokens"),
        ({"l0": 2, "l2": 3}, "layer 2", "at most 2 visual tokens"),
        ({"l3": 1}, "layer 3", "a layer below 3"),
    ],
)
def test_recipe_that_does_not_fit(
    drops: dict[str, int], where: str, expected: str
) -> None:
    with pytest.raises(PlanError, match=expected) as caught:
        oracle.prefill(tiny_llava(), make_recipe(**drops), tiny_sample(PROMPTS[0]))
    assert where in caught.value.where
    assert caught.value.fix


def test_features_that_do_not_match_the_image_tokens() -> None:
    sample = oracle.Sample(torch.tensor([1, IMAGE, 2]), torch.zeros(2, 32))
    with pytest.raises(InputError, match="each of the 1 image tokens, found 2"):
        oracle.prefill(tiny_llava(), KEEP_ALL, sample)
    ids, mask = padded("left")
    with pytest.raises(InputError, match="each of the 12 image tokens, found 0"):
        oracle.split_batch(tiny_llava(), ids, mask)
