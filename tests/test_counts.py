"""What a batch of prompts drops, worked out and checked before it runs."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from tests.tiny import recipe_for
from vtprune_fx.errors import InputError
from vtprune_fx.generation.counts import PromptCounts, places_of
from vtprune_fx.models.ragged_cache import ImageSpan, Prompt
from vtprune_fx.recipes.schema import Recipe

LAYERS = 4
COUNTS = recipe_for(LAYERS, {0: 3, 2: 4})
SHARES = recipe_for(LAYERS, {0: 30, 2: 45}, of=90)
"""A third and a half of a sample's visual tokens."""


def prompt(visual: list[int], padding: list[int] | None = None, came: int = 40) -> Any:
    """A batch of so many visual tokens and so much padding."""
    images = ImageSpan(0, came - 2) if any(visual) else None
    padded = torch.tensor(padding or [0] * len(visual))
    return Prompt(came, padded, torch.tensor(visual), images)


def counts(recipe: Recipe, batch: Prompt, *, per_sample: bool = False) -> PromptCounts:
    return PromptCounts.of(recipe, batch, per_sample=per_sample)


# ------------------------------------------------------------------- where cuts are


def test_places_are_the_cuts_that_drop_something() -> None:
    places = places_of(recipe_for(LAYERS, {0: 3, 1: 0, 2: 4}))
    assert places is not None
    assert [cut.layer for cut in places.cuts] == [0, 2]


NO_PLACES: dict[str, Recipe] = {
    "no cuts": recipe_for(LAYERS, {}),
    "cuts of nothing": recipe_for(LAYERS, {0: 0, 3: 0}),
    "new tokens": recipe_for(
        LAYERS, {0: 3}, site="after_layer", recycle={"tau": 0.5, "theta": 0.5}
    ),
    "by rank": Recipe.model_validate(
        {
            **COUNTS.model_dump(),
            "cuts": [{"layer": 0, "by_rank": {"rule": "keep", "scale": 1.0}}],
        }
    ),
}


@pytest.mark.parametrize("kind", NO_PLACES)
def test_numbers_that_cannot_come_with_a_run_have_no_places(kind: str) -> None:
    assert places_of(NO_PLACES[kind]) is None


# ------------------------------------------------------------------------- numbers


def test_counts_are_the_same_for_any_number_of_visual_tokens() -> None:
    found = counts(COUNTS, prompt([9, 30]))
    assert not found.per_sample
    assert found.schedule([0, 2]).tolist() == [[3, 3, 1], [4, 4, 1]]


@pytest.mark.parametrize("visual", [0, 1, 2, 3, 17, 29, 30])
def test_shares_are_of_what_came(visual: int) -> None:
    found = counts(SHARES, prompt([visual, visual]))
    assert not found.per_sample
    rows = found.schedule([0, 2]).tolist()
    assert rows == [[visual // 3, 30, 90], [visual // 2, 45, 90]]


def test_a_cut_that_the_recipe_lacks_drops_nothing() -> None:
    found = counts(SHARES, prompt([12]))
    assert found.schedule([0, 1, 2, 3]).tolist() == [
        [4, 30, 90],
        [0, 0, 90],
        [6, 45, 90],
        [0, 0, 90],
    ]


def test_the_schedule_is_of_whole_numbers_on_the_cpu() -> None:
    found = counts(SHARES, prompt([12])).schedule([0, 2])
    assert (found.dtype, found.device.type) == (torch.int64, "cpu")


def affordable(count: int, visual: list[int], padding: list[int]) -> bool:
    """Whether every sample has the padding that ``count``'s drops take, by loops."""
    for came, padded in zip(visual, padding, strict=True):
        rest = padded
        for share in (30, 45):
            rest += share * came // 90 - share * count // 90
            if rest < 0:
                return False
    return True


VISUAL = (0, 6, 11, 18, 24)
PADDING = (0, 2, 7, 16)


@pytest.mark.parametrize("visual", list(itertools.permutations(VISUAL, 2)))
def test_unequal_samples_drop_what_padding_allows(visual: tuple[int, int]) -> None:
    """The most that every row can afford; refused where not even the least is."""
    least, most = min(filter(None, visual)), max(visual)
    for padding in itertools.product(PADDING, repeat=2):
        batch = prompt(list(visual), list(padding))
        fits = [
            n
            for n in range(least, most + 1)
            if affordable(n, list(visual), list(padding))
        ]
        if 0 in visual:
            # One kind of image, and text beside it: all rows drop as many.
            drops = most // 3 + most // 2
            enough = padding[visual.index(0)] >= drops
            if enough:
                assert counts(SHARES, batch).visual == most
            else:
                with pytest.raises(InputError, match=f"none and {drops} tokens"):
                    counts(SHARES, batch)
        elif fits:
            found = counts(SHARES, batch)
            assert (found.visual, found.per_sample) == (fits[-1], True)
        else:
            with pytest.raises(InputError, match="in place of visual ones"):
                counts(SHARES, batch)


def test_equal_samples_can_be_asked_to_drop_their_shares() -> None:
    """So that they run in the graph of unequal ones; counts have no shares."""
    assert counts(SHARES, prompt([12, 12]), per_sample=True).per_sample
    assert not counts(COUNTS, prompt([12, 12]), per_sample=True).per_sample
    assert not counts(SHARES, prompt([0, 0]), per_sample=True).per_sample


@pytest.mark.parametrize("site", ["after_attention", "after_layer", "before_layer"])
def test_what_each_sample_dropped_before_each_layer(site: Any) -> None:
    """By loops: a cut after layer n is before all layers from n + 1 on."""
    recipe = recipe_for(LAYERS, {0: 30, 2: 45}, of=90, site=site)
    found = counts(recipe, prompt([12, 7], [0, 9]))
    gone = found.dropped_before(torch.tensor([12, 7]), LAYERS)
    for row, visual in enumerate((12, 7)):
        for layer in range(LAYERS):
            before = [
                share * visual // 90
                for at, share in ((0, 30), (2, 45))
                if at < layer or (at == layer and site == "before_layer")
            ]
            assert int(gone[layer][row]) == sum(before), (row, layer)


# ------------------------------------------------------------------------- refused


@pytest.mark.parametrize("visual", range(10))
@pytest.mark.parametrize("padding", [0, 6, 7, 8])
def test_a_sample_drops_what_it_has_or_is_refused(visual: int, padding: int) -> None:
    """Seven visual tokens, or none and seven of padding."""
    batch = prompt([16, visual], [0, padding])
    if visual >= 7 or (visual == 0 and padding >= 7):
        assert counts(COUNTS, batch).visual == 16
        return
    with pytest.raises(InputError) as caught:
        counts(COUNTS, batch)
    said = str(caught.value)
    assert "sample 1" in said
    assert "at least 7 visual tokens, or none and 7 tokens of padding" in said
    assert f"{visual} visual tokens and {padding} of padding" in said


def test_text_alone_drops_nothing_and_is_never_refused() -> None:
    for recipe in (COUNTS, SHARES, *NO_PLACES.values()):
        found = counts(recipe, prompt([0, 0, 0]))
        assert (found.visual, found.per_sample) == (0, False)


@pytest.mark.parametrize("came", range(7, 12))
def test_two_tokens_at_least_are_kept(came: int) -> None:
    batch = prompt([7], came=came)
    if came >= 9:
        assert counts(COUNTS, batch).visual == 7
        return
    with pytest.raises(InputError, match=f"at least 9 tokens.*found {came} tokens, 7"):
        counts(COUNTS, batch)


def test_recycled_tokens_count_as_kept() -> None:
    """By hand: of 3 dropped tokens 2 form 2 clusters, so one is gone in all."""
    recipe = NO_PLACES["new tokens"]
    assert counts(recipe, prompt([3], came=3)).visual == 3
    with pytest.raises(InputError, match="at least 3 visual tokens"):
        counts(recipe, prompt([2]))


def test_counts_by_rank_are_left_to_the_run() -> None:
    found = counts(NO_PLACES["by rank"], prompt([1, 2]))
    assert (found.visual, found.per_sample) == (2, False)
