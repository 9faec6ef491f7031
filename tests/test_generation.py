"""``vtprune_fx.compile``: generation on a pruned prompt, token by token."""

from __future__ import annotations

import copy
import dataclasses
import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaForConditionalGeneration,
    StaticCache,
)

import vtprune_fx
from tests.tiny import CACHE, Inputs, batch, cache_lengths, recipe_for, tiny_llava
from vtprune_fx import oracle
from vtprune_fx.errors import InputError, PlanError, RecipeError
from vtprune_fx.models.arguments import cache_of
from vtprune_fx.oracle import pruner
from vtprune_fx.recipes.counting import Geometry, cost
from vtprune_fx.recipes.schema import Recipe

LAYERS = 3
RECIPE = recipe_for(LAYERS, {0: 3, 1: 6})
AHEAD = recipe_for(LAYERS, {0: 4, 1: 6}, site="before_layer")
"""A recipe whose first layer does not see the whole prompt either."""
NEW = 32
PLAIN = tiny_llava(layers=LAYERS)
"""Never compiled: what the oracle runs on where the other model is shared."""
shares_graphs = pytest.mark.shares_graphs

PROMPTS = {
    "one": ((3, 6),),
    "four, padded": ((3, 6), (9, 1), (1, 4), (0, 12)),
    "two images each": ((3, 0, 6), (2, 5, 1)),
    "text beside an image": ((3, 6), (5,), (12,)),
    "text alone": ((5,), (12,)),
}


@pytest.fixture
def model() -> Iterator[LlavaForConditionalGeneration]:
    model = tiny_llava.__wrapped__(layers=LAYERS)
    torch.compiler.reset()
    yield model
    vtprune_fx.undo(model)


@pytest.fixture(scope="module")
def shared() -> Iterator[Any]:
    """A model compiled once, for tests that only run it; ``PLAIN`` has its weights."""
    torch.compiler.reset()
    model = compiled(tiny_llava.__wrapped__(layers=LAYERS))
    # Each way to be called is a graph of its own; one model sees them all here.
    yield model
    vtprune_fx.undo(model)
    torch.compiler.reset()


def compiled(
    model: LlavaForConditionalGeneration, recipe: Recipe = RECIPE, **options: Any
) -> Any:
    return vtprune_fx.compile(model, recipe, **{"inner": "eager"} | options)


def generate(model: Any, inputs: Inputs, new: int = NEW, **options: Any) -> Tensor:
    """The new tokens of each sample, [B, new]."""
    told = {"max_new_tokens": new, "do_sample": False, "eos_token_id": None}
    ids: Tensor = model.generate(**inputs, **told | options)
    return ids[:, inputs["input_ids"].shape[1] :]


def by_oracle(
    model: LlavaForConditionalGeneration, recipe: Recipe, inputs: Inputs, new: int = NEW
) -> list[list[int]]:
    """The same, sample by sample."""
    return [oracle.generate(model, recipe, s, new) for s in split(model, inputs)]


def split(model: LlavaForConditionalGeneration, inputs: Inputs) -> list[oracle.Sample]:
    positions = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    return oracle.split_batch(model, **inputs, position_ids=positions)


# ------------------------------------------------------------------------- greedy


@pytest.mark.compat
@shares_graphs
@pytest.mark.parametrize("case", list(PROMPTS))
def test_generate_is_the_oracle(shared: Any, case: str) -> None:
    inputs = batch(PLAIN, *PROMPTS[case])
    expected = by_oracle(PLAIN, RECIPE, inputs)
    assert generate(shared, inputs).tolist() == expected


@pytest.mark.slow
@pytest.mark.parametrize("case", list(PROMPTS))
def test_generate_with_eager_steps_is_the_oracle(
    model: LlavaForConditionalGeneration, case: str
) -> None:
    inputs = batch(model, *PROMPTS[case])
    expected = by_oracle(model, RECIPE, inputs)
    compiled(model, decode=False)
    assert generate(model, inputs).tolist() == expected


@shares_graphs
@pytest.mark.parametrize("case", ["one", "two images each", "text beside an image"])
def test_cache_is_as_large_as_predicted(shared: Any, case: str) -> None:
    inputs = batch(PLAIN, *PROMPTS[case])
    with torch.no_grad():
        outputs = shared(**inputs)
    layers = cache_of(outputs).layers
    spent = sum(layer.keys.nbytes + layer.values.nbytes for layer in layers)
    samples, length = inputs["input_ids"].shape
    visual = max((inputs["input_ids"] == 99).sum(1).tolist())
    geometry = dataclasses.replace(Geometry.from_config(PLAIN.config), kv_bytes=4)
    one = cost(RECIPE, geometry, visual, length - visual).total
    assert spent == samples * one.pruned_cache_bytes


# ------------------------------------------------------------- other ways to generate


@pytest.mark.compat
@shares_graphs
def test_a_static_cache_has_room_for_what_is_left_and_the_new_tokens(
    shared: Any,
) -> None:
    inputs = batch(PLAIN, *PROMPTS["text beside an image"])
    expected = by_oracle(PLAIN, RECIPE, inputs)
    outputs = shared.generate(
        **inputs,
        max_new_tokens=NEW,
        do_sample=False,
        eos_token_id=None,
        cache_implementation="static",
        return_dict_in_generate=True,
    )
    length = inputs["input_ids"].shape[1]
    assert outputs.sequences[:, length:].tolist() == expected
    assert isinstance(cache_of(outputs), StaticCache)
    [whole, *_] = cache_lengths(outputs)
    assert length + NEW - 1 <= whole <= length + NEW
    assert cache_lengths(outputs) == [whole, whole - 3, whole - 9]


@shares_graphs
def test_beams_are_the_oracles(shared: Any) -> None:
    inputs = batch(PLAIN, (3, 6), (9, 1))
    expected = [
        beams_by_oracle(PLAIN, sample, width=3, new=6)
        for sample in split(PLAIN, inputs)
    ]
    found = generate(shared, inputs, 6, num_beams=3, num_return_sequences=2).tolist()
    assert [found[:2], found[2:]] == expected


def beams_by_oracle(
    model: LlavaForConditionalGeneration, sample: oracle.Sample, width: int, new: int
) -> list[list[int]]:
    """The two likeliest continuations that a beam search of some width finds."""
    state = oracle.prefill(model, RECIPE, sample)
    first = state.logits[-1].log_softmax(-1)
    alive = [(0.0, list[int](), state, first)]
    for _ in range(new):
        grown = [
            (total + float(score), [*tokens, token], state)
            for total, tokens, state, scores in alive
            for token, score in enumerate(scores)
        ]
        best = sorted(grown, key=lambda beam: -beam[0])[:width]
        alive = []
        for total, tokens, state in best:
            own = copy.deepcopy(state)
            scores = oracle.step(model, own, tokens[-1]).log_softmax(-1)
            alive.append((total, tokens, own, scores))
    return [tokens for _, tokens, _, _ in alive[:2]]


@shares_graphs
def test_sampling_follows_the_oracles_probabilities(shared: Any) -> None:
    """Of one prompt many first tokens: chi-square far below what chance allows."""
    inputs = batch(PLAIN, (3, 6))
    logits = oracle.prefill(PLAIN, RECIPE, split(PLAIN, inputs)[0]).logits[-1]
    torch.manual_seed(0)
    count = 4000
    drawn = generate(
        shared, inputs, 1, do_sample=True, num_return_sequences=count, top_k=0
    )
    found = torch.bincount(drawn[:, 0], minlength=len(logits)).double()
    expected = logits.double().softmax(-1) * count
    often = expected > 5
    chi = ((found - expected) ** 2 / expected)[often].sum()
    degrees = int(often.sum())
    assert chi < degrees + 5 * (2 * degrees) ** 0.5


@pytest.mark.slow
def test_prompt_lookup_is_greedy(model: LlavaForConditionalGeneration) -> None:
    """Candidates are checked several at once, and the cache is cropped."""
    inputs = batch(model, (3, 20))
    expected = by_oracle(model, RECIPE, inputs)
    found = generate(compiled(model), inputs, prompt_lookup_num_tokens=3)
    assert found.tolist() == expected


@pytest.mark.compat
@shares_graphs
def test_a_draft_model_changes_nothing(shared: Any) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=100, hidden_size=32, intermediate_size=48, num_hidden_layers=1
    )
    draft = LlamaForCausalLM(config).eval()
    inputs = batch(PLAIN, (3, 6))
    expected = by_oracle(PLAIN, RECIPE, inputs)
    found = generate(shared, inputs, assistant_model=draft)
    assert found.tolist() == expected


@shares_graphs
def test_streaming_tells_the_same_tokens(shared: Any) -> None:
    class Streamer:
        def __init__(self) -> None:
            self.told: list[int] = []

        def put(self, value: Tensor) -> None:
            self.told += value.flatten().tolist()

        def end(self) -> None:
            self.told.append(-1)

    inputs, streamer = batch(PLAIN, (3, 6)), Streamer()
    found = generate(shared, inputs, streamer=streamer)
    prompt = inputs["input_ids"][0].tolist()
    assert streamer.told == [*prompt, *found[0].tolist(), -1]


# -------------------------------------------------------------------------- turns


@pytest.mark.compat
@shares_graphs
@pytest.mark.parametrize("own", [True, False], ids=["own cache", "returned cache"])
def test_a_second_turn_goes_on_from_the_first(shared: Any, own: bool) -> None:
    assert_goes_on(shared, RECIPE, own=own)


def assert_goes_on(model: Any, recipe: Recipe, *, own: bool) -> None:
    inputs = batch(PLAIN, (3, 6))
    more = torch.randint(1, 99, (1, 7), generator=torch.Generator().manual_seed(5))
    [sample] = split(PLAIN, inputs)
    state = oracle.prefill(PLAIN, recipe, sample)
    first = follow(PLAIN, state, state.logits[-1], 8)
    expected = follow(PLAIN, state, fed(PLAIN, state, more[0].tolist()), 8)

    given: dict[str, Any] = {CACHE: DynamicCache()} if own else {}
    turn = model.generate(
        **inputs,
        **given,
        max_new_tokens=8,
        do_sample=False,
        eos_token_id=None,
        return_dict_in_generate=True,
    )
    assert turn.sequences[0, -8:].tolist() == first
    cache = given.get(CACHE, cache_of(turn))
    whole = torch.cat([turn.sequences, more], dim=1)
    again = {"input_ids": whole, "attention_mask": torch.ones_like(whole)}
    found = generate(model, again, 8, **{CACHE: cache})
    assert found[0].tolist() == expected


def fed(model: Any, state: oracle.Prefill, tokens: list[int]) -> Tensor:
    """The logits behind some more tokens."""
    for token in tokens:
        logits = oracle.step(model, state, token)
    return logits


def follow(model: Any, state: oracle.Prefill, logits: Tensor, new: int) -> list[int]:
    """Greedy tokens; the last one is part of the cache too, as in a longer turn."""
    tokens = []
    for _ in range(new):
        tokens.append(int(logits.argmax()))
        logits = oracle.step(model, state, tokens[-1])
    return tokens


@shares_graphs
def test_an_image_on_a_filled_cache_is_not_pruned(shared: Any) -> None:
    inputs, second = batch(PLAIN, (3, 6)), batch(PLAIN, (2, 5), seed=3)
    with torch.no_grad():
        first = shared(**inputs)
        lengths = cache_lengths(first)
        both = torch.cat([inputs["attention_mask"], second["attention_mask"]], dim=1)
        then = shared(**second | {"attention_mask": both}, **{CACHE: cache_of(first)})
    new = second["input_ids"].shape[1]
    assert cache_lengths(then) == [length + new for length in lengths]
    assert then.logits.shape[1] == new
    [sample], [other] = split(PLAIN, inputs), split(PLAIN, second)
    state = oracle.prefill(PLAIN, RECIPE, sample)
    assert set(state.next_positions) == {inputs["input_ids"].shape[1]}
    expected = _after(PLAIN, state, other)
    torch.testing.assert_close(then.logits[0, -1], expected, atol=1e-4, rtol=0)


def _after(model: Any, state: oracle.Prefill, sample: oracle.Sample) -> Tensor:
    """Logits behind a second prompt with an image, fed to the oracle one by one."""
    embedded = pruner._embed(model, sample)
    for vector in embedded:
        logits = _step_with(model, state, vector[None])
    return logits


def _step_with(model: Any, state: oracle.Prefill, vector: Tensor) -> Tensor:
    """A decode step on an embedding instead of a token's."""
    handle = model.model.language_model.embed_tokens.register_forward_hook(
        lambda *_: vector
    )
    with handle:
        return oracle.step(model, state, 0)


@shares_graphs
def test_padding_behind_a_prompt_is_refused(shared: Any) -> None:
    inputs = batch(PLAIN, (3, 6), (9, 1))
    inputs["attention_mask"] = inputs["attention_mask"].flip(1)
    with pytest.raises(InputError, match="padding_side"), torch.no_grad():
        shared(**inputs)


# ------------------------------------------------------------------- other graphs


@pytest.mark.parametrize("own", [True, False], ids=["own cache", "returned cache"])
def test_a_second_turn_goes_on_behind_a_cut_ahead_of_all_layers(
    model: LlavaForConditionalGeneration, own: bool
) -> None:
    assert_goes_on(compiled(model, AHEAD), AHEAD, own=own)


def test_oracle_tokens_differ_from_those_without_pruning(
    model: LlavaForConditionalGeneration,
) -> None:
    """Else a graph that prunes nothing would pass."""
    inputs = batch(model, (3, 6), (9, 1))
    dense = generate(model, inputs).tolist()
    assert dense == by_oracle(model, RECIPE.keep_all(), inputs)
    assert dense != by_oracle(model, RECIPE, inputs)


@pytest.mark.slow
def test_generate_with_inductor_is_the_oracle(
    model: LlavaForConditionalGeneration,
) -> None:
    inputs = batch(model, (3, 6), (9, 1), (12,))
    expected = by_oracle(model, RECIPE, inputs)
    assert generate(vtprune_fx.compile(model, RECIPE), inputs).tolist() == expected


def test_twenty_prompts_make_one_graph_and_their_steps_another(
    model: LlavaForConditionalGeneration,
) -> None:
    compiled(model)
    torch._dynamo.utils.counters.clear()
    for text in range(20):
        generate(model, batch(model, (text % 4, 3 + text)), new=64)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2


# ------------------------------------------------------------------------ the report


@pytest.mark.parametrize(
    "inner", ["eager", pytest.param("aot_eager", marks=pytest.mark.slow)]
)
def test_report_tells_the_oracles_keep_sets(
    model: LlavaForConditionalGeneration, inner: str
) -> None:
    compiled(model, inner=inner)
    assert vtprune_fx.report_of(model) is None
    for prompts in (((3, 6), (9, 1)), ((2, 11),)):
        inputs = batch(model, *prompts)
        generate(model, inputs, 2)
        report = vtprune_fx.report_of(model)
        assert report is not None
        assert report.visual_tokens == [13, 7, 7]
        assert [record.name for record in report.passes if record.seconds > 0]
        assert sorted(report.keep_sets) == [0, 1]
        for row, sample in enumerate(split(model, inputs)):
            padding = inputs["input_ids"].shape[1] - len(sample.input_ids)
            expected = oracle.prefill(model, RECIPE, sample).kept
            for layer, kept in report.keep_sets.items():
                own = kept[row][kept[row] >= padding] - padding
                assert own.tolist() == expected[layer].tolist()


def test_no_report_without_compile(model: LlavaForConditionalGeneration) -> None:
    with pytest.raises(InputError, match="compile"):
        vtprune_fx.report_of(model)


# ------------------------------------------------------------------ undo and refusals


def test_undo_gives_the_model_back(model: LlavaForConditionalGeneration) -> None:
    inputs = batch(model, (3, 6))
    dense = generate(model, inputs)
    assert vtprune_fx.undo(compiled(model)) is model
    assert "forward" not in vars(model)
    assert torch.equal(generate(model, inputs), dense)
    assert vtprune_fx.undo(model) is model


def test_twice_is_refused(model: LlavaForConditionalGeneration) -> None:
    compiled(model)
    with pytest.raises(InputError, match="undo"):
        compiled(model)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"recipe": "no-such"}, RecipeError, "no-such"),
        ({"inner": "no-such"}, InputError, "inductor.*found no-such"),
        ({"mode": "fastest"}, InputError, "max-autotune.*found fastest"),
        ({"inner": "eager", "mode": "max-autotune"}, InputError, "inductor's"),
    ],
)
def test_bad_options_are_refused_at_once(
    model: LlavaForConditionalGeneration,
    options: dict[str, Any],
    error: type[Exception],
    message: str,
) -> None:
    with pytest.raises(error, match=message):
        vtprune_fx.compile(model, **{"recipe": RECIPE} | options)
    assert "forward" not in vars(model)


def test_a_recipe_for_more_layers_is_refused_at_once(
    model: LlavaForConditionalGeneration,
) -> None:
    with pytest.raises(PlanError, match="a layer below 3"):
        vtprune_fx.compile(model, recipe_for(9, {8: 3}), inner="eager")
    assert "forward" not in vars(model)


def test_a_model_without_images_is_compiled_and_says_so(
    caplog: pytest.LogCaptureFixture,
) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=100, hidden_size=32, intermediate_size=48, num_hidden_layers=2
    )
    model: Any = LlamaForCausalLM(config).eval()
    ids = torch.randint(1, 99, (2, 7))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    dense = generate(model, inputs)
    compiled(model)
    assert torch.equal(generate(model, inputs), dense)
    assert torch.equal(generate(model, inputs), dense)
    assert caplog.text.count("LlamaForCausalLM has no visual tokens") == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cache_implementation": "offloaded"}, r"offloading.*'static'"),
        ({"use_cache": False}, "use_cache: expected True"),
        ({"output_attentions": True}, "output_attentions: expected False"),
    ],
    ids=str,
)
def test_ways_that_do_not_work_on_a_ragged_cache_are_refused(
    model: LlavaForConditionalGeneration, options: dict[str, Any], message: str
) -> None:
    inputs = batch(model, (3, 6))
    with pytest.raises(InputError, match=message):
        generate(compiled(model), inputs, **options)


def test_a_cache_from_elsewhere_is_refused(
    model: LlavaForConditionalGeneration,
) -> None:
    inputs = batch(model, (3, 6))
    with torch.no_grad():
        filled = cache_of(model(**inputs))
        with pytest.raises(InputError, match="empty cache"):
            compiled(model)(input_ids=torch.tensor([[5]]), **{CACHE: filled})


@pytest.mark.slow
def test_torch_logs_tell_what_the_passes_did() -> None:
    script = textwrap.dedent(
        """
        import vtprune_fx
        from tests.tiny import batch, recipe_for, tiny_llava
        model, recipe = tiny_llava(layers=2), recipe_for(2, {0: 3})
        vtprune_fx.compile(model, recipe, inner="eager")(**batch(model, (3, 6)))
        """
    )
    told = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | {"TORCH_LOGS": "+vtprune_fx", "PYTHONPATH": "."},
        capture_output=True,
        text=True,
        check=True,
    ).stderr
    assert "16 visual tokens, 13 after the last of 2 layers, 1 cuts" in told
    assert "GatherTokens" in told
