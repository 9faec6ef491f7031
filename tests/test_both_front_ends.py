"""Pruned graphs from ``torch.export`` and from Dynamo, against the oracle."""

from __future__ import annotations

import copy
import dataclasses
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any, Literal

import pytest
import torch

from tests.tiny import (
    CACHE,
    IMAGE,
    Compiled,
    Inner,
    Inputs,
    assert_matches_oracle,
    assert_static,
    batch,
    cache_lengths,
    calls,
    counted_positions,
    exported_program,
    is_dynamic,
    placeholder,
    recipe_for,
    tiny_llava,
)
from vtprune_fx import backend, oracle, pruning
from vtprune_fx.analysis.anatomy import read
from vtprune_fx.api import PrunedProgram, prune
from vtprune_fx.capture.aten import lower
from vtprune_fx.graph.stamps import STAMP, StampKind
from vtprune_fx.graph.values import value_at_full_length
from vtprune_fx.models.arguments import cache_of
from vtprune_fx.models.ragged_attention import mark_dynamic
from vtprune_fx.passes import default_pipeline
from vtprune_fx.planning.place import place
from vtprune_fx.planning.plan import PrunePlan
from vtprune_fx.planning.report import PruneReport
from vtprune_fx.recipes.default import default_recipe
from vtprune_fx.recipes.schema import Recipe

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch.export import ExportedProgram
    from torch.fx import GraphModule, Node

RECIPE = recipe_for(4, {0: 3, 2: 5, 3: 1})
SHORT = recipe_for(2, {0: 3, 1: 5})
"""For models of two layers."""
KEEP_ALL = recipe_for(2, {})

Prompts = tuple[tuple[int, ...], ...]
PROMPTS: dict[str, Prompts] = {
    "one sample": ((3, 6),),
    "long text": ((21, 40),),
    "image first": ((0, 5),),
    "nothing behind the image": ((7, 0),),
    "two images apart": ((3, 2, 6),),
    "two images side by side": ((1, 0, 4),),
    "prompt as long as the model is wide": ((6, 10),),
    "three samples, padded, images elsewhere": ((5, 9), (2, 4), (8, 3)),
    "as many samples as heads": ((5, 11), (2, 4), (3, 9), (0, 1)),
    "three samples, one with two images more": ((5, 9), (2, 4, 0, 1), (8, 3)),
}


# --------------------------------------------------------------------- torch.export


@pytest.fixture(scope="module")
def exported() -> PrunedProgram:
    model = tiny_llava()
    return prune(model, batch(model, (3, 6)), RECIPE)


@pytest.mark.compat
@pytest.mark.parametrize("case", list(PROMPTS))
def test_exported_program_is_the_oracle(exported: PrunedProgram, case: str) -> None:
    model = tiny_llava()
    inputs = batch(model, *PROMPTS[case], seed=1)
    outputs, kept = exported(**inputs), exported.keep_sets(**inputs)
    assert_matches_oracle(outputs, kept, model, RECIPE, inputs)


def test_samples_keep_other_tokens(exported: PrunedProgram) -> None:
    """Else a gather by the first sample's keep set would go unnoticed."""
    prompts = (3, 6), (3, 6), (3, 6)
    kept = exported.keep_sets(**batch(tiny_llava(), *prompts, seed=1))
    for positions in kept.values():
        assert len({tuple(row) for row in positions.tolist()}) > 1


def test_exported_from_equal_numbers_is_the_oracle() -> None:
    """Traced with prompt = width = 32, samples = heads = 4, and run with others."""
    model = tiny_llava(layers=2)
    example = _with_positions(batch(model, (5, 11), (2, 4), (3, 9), (0, 1)))
    assert example["input_ids"].shape == (4, 32)
    pruned = prune(model, example, SHORT)
    for inputs in (example, _with_positions(batch(model, (3, 6), (9, 1), seed=2))):
        outputs, kept = pruned(**inputs), pruned.keep_sets(**inputs)
        assert_matches_oracle(outputs, kept, model, SHORT, inputs)


@pytest.mark.parametrize(
    "score",
    [
        "inverted",
        "random",
        pytest.param("uniform", marks=pytest.mark.slow),
    ],
)
def test_exported_baselines_are_the_oracle(
    score: Literal["inverted", "random", "uniform"],
) -> None:
    model, recipe = tiny_llava(layers=2), SHORT.baseline(score)
    inputs = batch(model, (3, 6), (2, 0, 9))
    pruned = prune(model, inputs, recipe)
    outputs, kept = pruned(**inputs), pruned.keep_sets(**inputs)
    assert_matches_oracle(outputs, kept, model, recipe, inputs)


def test_exported_sizes_stay_dynamic_and_the_prompt_is_longer_than_the_cuts(
    exported: PrunedProgram,
) -> None:
    program = exported.program
    pixels = placeholder(program.graph_module, "pixel_values").meta["val"]
    ids = placeholder(program.graph_module, "input_ids").meta["val"]
    sizes = pixels.shape[0], ids.shape[0], ids.shape[1]
    assert all(map(is_dynamic, sizes))
    images, samples, prompt = (program.range_constraints[s.node.expr] for s in sizes)
    assert max(images.lower, samples.lower) <= 2
    assert prompt.lower == 3 + 5 + 1 + 2
    assert min(images.upper, samples.upper, prompt.upper) > 10**6


def _with_positions(inputs: Inputs) -> Inputs:
    return inputs | {"position_ids": counted_positions(inputs)}


# --------------------------------------------------------------------------- Dynamo


def _check(compiled: Compiled, recipe: Recipe, model: Any, inputs: Inputs) -> None:
    outputs = compiled(**inputs)
    kept = compiled.recorded.keep_sets
    assert_matches_oracle(outputs, kept, model, recipe, inputs)


def test_one_compiled_graph_serves_every_prompt_of_one_sample() -> None:
    model = tiny_llava()
    compiled = Compiled(model, RECIPE)
    for prompt in ((3, 6), (21, 40), (0, 5), (7, 0), (6, 10)):
        _check(compiled, RECIPE, model, batch(model, prompt, seed=1))
    assert len(compiled.recorded.graphs) == 1
    assert_static(compiled.recorded.graphs[0])


@pytest.mark.compat
@pytest.mark.parametrize("positions", [False, True])
def test_compiled_batch_is_the_oracle(positions: bool) -> None:
    """Rotary tables are shared by all samples, or one per sample with positions."""
    model = tiny_llava(layers=2)
    compiled = Compiled(model, SHORT)
    for prompts in (((5, 9), (2, 4), (8, 3)), ((3, 6), (20, 1), (0, 14))):
        inputs = batch(model, *prompts, seed=1)
        _check(compiled, SHORT, model, _with_positions(inputs) if positions else inputs)
    assert len(compiled.recorded.graphs) == 1


def test_compiled_for_two_images_in_a_prompt_is_the_oracle() -> None:
    model = tiny_llava(layers=2)
    compiled = Compiled(model, SHORT)
    for prompt in ((3, 2, 6), (1, 0, 4), (0, 20, 1)):
        _check(compiled, SHORT, model, batch(model, prompt, seed=1))
    assert len(compiled.recorded.graphs) == 1


def test_compiled_from_equal_numbers_is_the_oracle() -> None:
    """Compiled with prompt = width = 32, samples = heads = 4."""
    model = tiny_llava(layers=2)
    compiled = Compiled(model, SHORT)
    first = batch(model, (5, 11), (2, 4), (3, 9), (0, 1))
    assert first["input_ids"].shape == (4, 32)
    longer = batch(model, (5, 31), (2, 4), (3, 9), (0, 1), seed=2)
    for inputs in (first, longer):
        _check(compiled, SHORT, model, inputs)
    assert len(compiled.recorded.graphs) == 1


@pytest.mark.parametrize("masked", [True, False])
def test_compiled_with_grouped_heads_is_the_oracle(masked: bool) -> None:
    """transformers repeats the heads where there is a mask, else SDPA groups them."""
    model = tiny_llava(layers=2, kv_heads=2)
    compiled = Compiled(model, SHORT)
    inputs = batch(model, (3, 6))
    given = inputs if masked else _without(inputs, "attention_mask")
    outputs = compiled(**given)
    [graph] = compiled.recorded.graphs
    kept = compiled.recorded.keep_sets
    assert_matches_oracle(outputs, kept, model, SHORT, inputs)
    assert _decoder_groups_heads(graph) is not masked


def _without(inputs: Inputs, name: str) -> Inputs:
    return {key: value for key, value in inputs.items() if key != name}


def _decoder_groups_heads(graph: GraphModule) -> bool:
    attentions = calls(graph, torch.ops.vtprune.attend_and_choose.default)
    assert attentions
    inputs = [node.all_input_nodes for node in attentions]
    return all(_heads(value) < _heads(query) for value, _, query, *_ in inputs)


def _heads(node: Node) -> int:
    heads: int = value_at_full_length(node).shape[1]
    return heads


@pytest.mark.compat
def test_text_alone_and_decode_steps_go_to_the_inner_backend_as_they_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given: list[GraphModule] = []
    whole = backend._prune

    def spy(
        module: GraphModule, *how: Any, **named: Any
    ) -> tuple[GraphModule, PruneReport] | None:
        given.append(module)
        return whole(module, *how, **named)

    monkeypatch.setattr(backend, "_prune", spy)
    model = tiny_llava(layers=2)
    compiled = Compiled(model, SHORT)
    text = batch(model, (12,))
    outputs = compiled(**text)
    assert compiled.recorded.graphs == given
    assert compiled.recorded.keep_sets == {}
    with torch.no_grad():
        torch.testing.assert_close(outputs.logits, model(**text).logits)
    step = {"input_ids": torch.tensor([[5]])}
    stepped = compiled(**step, **{CACHE: cache_of(outputs)})
    assert compiled.recorded.graphs == given
    assert len(given) == 2
    longer = torch.cat([text["input_ids"], step["input_ids"]], dim=1)
    with torch.no_grad():
        expected = model(input_ids=longer).logits[:, -1:]
    torch.testing.assert_close(stepped.logits, expected)


@pytest.mark.slow
def test_compiled_by_the_name_of_an_inner_backend_is_the_oracle() -> None:
    model = tiny_llava(layers=2)
    inputs = batch(model, (3, 6))
    outputs = Compiled(model, SHORT, inner="eager")(**inputs)
    _assert_last_logits(outputs, model, SHORT, inputs)


@pytest.mark.slow
def test_compiled_with_inductor_is_the_oracle() -> None:
    model = tiny_llava(layers=2)
    compiled = Compiled(model, SHORT, inner="inductor")
    for prompts in (((3, 6), (9, 1)), ((20, 3), (0, 5))):
        inputs = batch(model, *prompts)
        _assert_last_logits(compiled(**inputs), model, SHORT, inputs)


def _assert_last_logits(
    outputs: Any, model: Any, recipe: Recipe, inputs: Inputs
) -> None:
    """For inner backends that do not tell keep sets."""
    for row, sample in enumerate(oracle.split_batch(model, **inputs)):
        expected = oracle.prefill(model, recipe, sample).logits
        ours = outputs.logits[row, -len(expected) :]
        torch.testing.assert_close(ours, expected, atol=1e-4, rtol=0)


def test_backend_by_its_own_name() -> None:
    if "vtprune" not in entry_points(group="torch_dynamo_backends").names:
        pytest.skip("vtprune-fx is not installed: its entry point is missing")
    model, inner = tiny_llava(layers=2), Inner()
    inputs = batch(model, (3, 6))
    mark_dynamic(1, inputs["input_ids"], inputs["attention_mask"])
    options: dict[str, Any] = {"recipe": SHORT, "inner": inner}
    compiled: Callable[..., Any] = torch.compile(
        model.forward, backend="vtprune", options=options, fullgraph=True
    )
    with torch.no_grad():
        outputs = compiled(**inputs)
    assert_matches_oracle(outputs, inner.keep_sets, model, SHORT, inputs)


def test_without_a_recipe_the_default_is_used_and_said_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    pruning.say_default.cache_clear()
    model = tiny_llava(layers=2)
    recipe = default_recipe(2, 16)
    assert sum(recipe.drops(16).values()) > 0
    inputs = batch(model, (3, 6))
    _check(Compiled(model, None), recipe, model, inputs)
    pruned = prune(exported_program())
    kept = pruned.keep_sets(**inputs)
    assert_matches_oracle(pruned(**inputs), kept, model, recipe, inputs)
    said = [r for r in caplog.messages if r.startswith("No recipe given")]
    assert len(said) == 1
    assert f"{recipe.name} drops {sum(recipe.drops(16).values())} of 16" in said[0]


# ------------------------------------------------------------------------- keep all


def _run(program: ExportedProgram, inputs: Inputs) -> Any:
    with torch.no_grad():
        return program.module()(**inputs)


@pytest.mark.compat
def test_exported_keep_all_is_bit_equal() -> None:
    inputs = batch(tiny_llava(layers=2), (5, 9), (2, 4), seed=1)
    kept_all = prune(exported_program(), recipe=KEEP_ALL)
    assert kept_all.report.visual_tokens == [16, 16]
    plain, ours = _run(exported_program(), inputs), kept_all(**inputs)
    assert torch.equal(ours.logits, plain.logits)
    assert cache_lengths(ours) == cache_lengths(plain)


@pytest.mark.compat
def test_compiled_keep_all_is_bit_equal() -> None:
    model = tiny_llava(layers=2)
    inputs = batch(model, (5, 9), (2, 4), seed=1)
    ours = Compiled(model, KEEP_ALL)(**inputs)
    with torch.no_grad():
        plain = model(**inputs)
    assert torch.equal(ours.logits, plain.logits)
    assert cache_lengths(ours) == cache_lengths(plain)


def _prune_nothing(module: GraphModule) -> PrunePlan:
    """Cut in every layer, and drop no token at any of the cuts."""
    anatomy = read(module.graph)
    assert anatomy is not None
    plan = place(SHORT, anatomy, module.graph)
    cuts = tuple(dataclasses.replace(cut, drop=0, dropped=0) for cut in plan.cuts)
    plan = dataclasses.replace(plan, cuts=cuts)
    default_pipeline(plan).run(module)
    assert _reads_of_gathers(module) > 2 * len(cuts)
    return plan


def _reads_of_gathers(module: GraphModule) -> int:
    """How many nodes of the model read what a cut gathered."""
    gathered = {
        node
        for node in calls(module)
        if STAMP in node.meta and node.meta[STAMP].kind is StampKind.GATHER
    }
    readers = {user for node in gathered for user in node.users} - gathered
    return sum(STAMP not in reader.meta for reader in readers)


def test_exported_cuts_that_drop_nothing_are_bit_equal() -> None:
    inputs = batch(tiny_llava(layers=2), (5, 9), (2, 4), seed=1)
    cut = copy.deepcopy(exported_program())
    _prune_nothing(cut.graph_module)
    plain = _run(exported_program(), inputs)
    assert torch.equal(_run(cut, inputs).logits, plain.logits)


def test_compiled_cuts_that_drop_nothing_are_bit_equal() -> None:
    def cutting(
        module: GraphModule, example_inputs: Sequence[torch.Tensor]
    ) -> Callable[..., Any]:
        lowered = lower(module)
        _prune_nothing(lowered)
        return inner(lowered, example_inputs)

    inner, model = Inner(), tiny_llava(layers=2)
    inputs = batch(model, (5, 9), (2, 4), seed=1)
    mark_dynamic(1, inputs["input_ids"], inputs["attention_mask"])
    compiled: Callable[..., Any] = torch.compile(
        model.forward, backend=cutting, fullgraph=True
    )
    with torch.no_grad():
        assert torch.equal(compiled(**inputs).logits, model(**inputs).logits)
    assert [k.shape for k in inner.keep_sets.values()] == [(2, 30)] * 2


# ------------------------------------------------------------- what a run refuses

GREEDY = recipe_for(2, {0: 12, 1: 8}, visual_tokens=32)
"""Drops more than one image has."""
TOO_FEW = "every sample of a batch must hold at least 20 visual tokens"


@pytest.fixture(scope="module")
def greedy() -> PrunedProgram:
    model = tiny_llava(layers=2)
    return prune(model, batch(model, (3, 2, 6), (1, 1, 1)), GREEDY)


def test_exported_run_refuses_a_sample_with_too_few_visual_tokens(
    greedy: PrunedProgram,
) -> None:
    model = tiny_llava(layers=2)
    greedy(**batch(model, (3, 2, 6), (1, 1, 1), seed=1))
    with pytest.raises(RuntimeError, match=TOO_FEW):
        greedy(**batch(model, (3, 2, 2, 6), (1, 1), seed=1))


def test_compiled_run_refuses_a_sample_with_too_few_visual_tokens() -> None:
    """Three images and one make as many features as two and two: no new graph."""
    model = tiny_llava(layers=2)
    compiled = Compiled(model, GREEDY)
    _check(compiled, GREEDY, model, batch(model, (3, 2, 6), (1, 1, 1), seed=1))
    with pytest.raises(RuntimeError, match=TOO_FEW):
        compiled(**batch(model, (3, 2, 2, 6), (1, 1), seed=1))
    assert len(compiled.recorded.graphs) == 1


def test_share_recipe_refuses_another_number_of_visual_tokens() -> None:
    model, recipe = tiny_llava(layers=2), recipe_for(2, {0: 40}, of=160)
    pruned = prune(exported_program(), recipe=recipe)
    inputs = batch(model, (3, 6), seed=1)
    kept = pruned.keep_sets(**inputs)
    assert_matches_oracle(pruned(**inputs), kept, model, recipe, inputs)
    with pytest.raises(RuntimeError, match="exactly 16 visual tokens"):
        pruned(**batch(model, (3, 2, 6), seed=1))


def _one_placeholder_less(inputs: Inputs) -> Inputs:
    ids = inputs["input_ids"].clone()
    ids[0, (ids[0] == IMAGE).nonzero()[0]] = 5
    return inputs | {"input_ids": ids}


def test_exported_run_still_refuses_more_features_than_placeholders(
    exported: PrunedProgram,
) -> None:
    inputs = _one_placeholder_less(batch(tiny_llava(), (3, 6)))
    with pytest.raises(RuntimeError, match="runtime check failed"):
        exported(**inputs)


def test_compiled_run_still_refuses_more_features_than_placeholders() -> None:
    model = tiny_llava(layers=2)
    compiled = Compiled(model, SHORT)
    inputs = batch(model, (3, 6))
    _check(compiled, SHORT, model, inputs)
    with pytest.raises(RuntimeError, match="runtime check failed"):
        compiled(**_one_placeholder_less(inputs))
    assert len(compiled.recorded.graphs) == 1
