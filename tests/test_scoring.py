"""FitPrune's score, against the formula written out sample by sample."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor

from vtprune_fx.scorers import fitprune, inverted, random, uniform
from vtprune_fx.scorers.evidence import Evidence
from vtprune_fx.scorers.registry import Rate
from vtprune_fx.scorers.roles import (
    CONTEXT,
    INSTRUCTION,
    PADDING,
    VISUAL,
    padding_counts,
    token_roles,
)
from vtprune_fx.selection.order import enough_to_drop, lowest_first
from vtprune_fx.selection.per_sample import per_sample_places

HEADS, TOKENS, WIDTH = 4, 12, 8
SCALE = WIDTH**-0.5


def written_out(query: Tensor, key: Tensor, roles: Tensor) -> Tensor:
    """One sample without padding, [H, S, D]: softmax, head-maximum, two sums."""
    causal = torch.ones(query.shape[1], query.shape[1], dtype=torch.bool).tril()
    logits = (query @ key.transpose(1, 2) * SCALE).masked_fill(~causal, -torch.inf)
    strongest = logits.softmax(-1).amax(0)
    visual = roles == VISUAL
    cross: Tensor = strongest[roles == INSTRUCTION].sum(0)
    own = strongest[visual].sum(0) / visual.sum()
    score: Tensor = cross * own
    return score[visual]


def drawn(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    query, key = torch.randn(2, HEADS, TOKENS, WIDTH, generator=generator) * 2
    roles = torch.tensor([CONTEXT] * 2 + [VISUAL] * 6 + [INSTRUCTION] * 4)
    return query, key, roles


@pytest.mark.parametrize("left", [0, 3])
@pytest.mark.parametrize("right", [0, 3])
@pytest.mark.parametrize("boolean", [True, False])
def test_padding_changes_nothing(left: int, right: int, boolean: bool) -> None:
    query, key, roles = drawn()
    whole = left + TOKENS + right
    queries, keys = torch.randn(2, 1, HEADS, whole, WIDTH)
    queries[0, :, left : left + TOKENS] = query
    keys[0, :, left : left + TOKENS] = key
    padded_roles = torch.full((1, whole), PADDING)
    padded_roles[:, left : left + TOKENS] = roles
    real = torch.zeros(whole, dtype=torch.bool)
    real[left : left + TOKENS] = True
    mask = torch.ones(whole, whole, dtype=torch.bool).tril() & real
    added = mask.float().log() if not boolean else mask
    seen = Evidence(queries, keys, added[None, None], padded_roles, SCALE)
    expected = written_out(query, key, roles)
    torch.testing.assert_close(fitprune.rate(seen)[padded_roles == VISUAL], expected)


def test_without_a_mask_attention_is_causal() -> None:
    query, key, roles = drawn(1)
    seen = Evidence(query[None], key[None], None, roles[None], SCALE)
    found = fitprune.rate(seen)
    torch.testing.assert_close(found[0, 2:8], written_out(query, key, roles))


def test_grouped_keys_serve_several_heads() -> None:
    query, key, roles = drawn(2)
    groups = key[:2]
    seen = Evidence(query[None], groups[None], None, roles[None], SCALE)
    found = fitprune.rate(seen)
    repeated = groups.repeat_interleave(2, dim=0)
    torch.testing.assert_close(found[0, 2:8], written_out(query, repeated, roles))


def test_instruction_is_the_text_behind_the_last_image() -> None:
    visual = torch.tensor([[0, 1, 0, 1, 0, 0], [1, 1, 0, 0, 0, 0]]).bool()
    c, v, i = CONTEXT, VISUAL, INSTRUCTION
    expected = [[c, v, c, v, i, i], [v, v, i, i, i, i]]
    assert token_roles(visual, None).tolist() == expected
    assert token_roles(visual[..., None], None).tolist() == expected


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.float16])
@pytest.mark.parametrize("never", ["lowest", "infinite"])
def test_padding_is_what_nobody_attends_to(dtype: torch.dtype, never: str) -> None:
    real = torch.tensor([[False, False, True, True, True], [True] * 5])
    mask = torch.ones(5, 5, dtype=torch.bool).tril() & real[:, None, None]
    if dtype != torch.bool:
        least = torch.finfo(dtype).min if never == "lowest" else -torch.inf
        mask = torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, least)
    visual = torch.tensor([[0, 0, 0, 0, 0], [0, 0, 1, 1, 0]]).bool()
    p, c, v, i = PADDING, CONTEXT, VISUAL, INSTRUCTION
    expected = [[p, p, i, i, i], [c, c, v, v, i]]
    assert token_roles(visual, mask).tolist() == expected


def test_of_equal_scores_the_earlier_token_leaves_first() -> None:
    scores = torch.tensor([[2.0, 1.0, 1.0, torch.inf, 1.0]])
    roles = torch.tensor([[VISUAL] * 3 + [CONTEXT, VISUAL]])
    assert lowest_first(scores, roles).tolist() == [[1, 2, 4, 0, 3]]


def test_what_a_score_says_of_text_and_of_nothing_does_not_matter() -> None:
    """Text is never among the first, whatever it scores; NaN leaves ahead of all."""
    inf, nan = torch.inf, torch.nan
    scores = torch.tensor([[-9.0, inf, nan, 1.0, -inf, nan]])
    c, v, p, i = CONTEXT, VISUAL, PADDING, INSTRUCTION
    roles = torch.tensor([[c, v, v, v, p, i]])
    assert lowest_first(scores, roles).tolist() == [[2, 3, 1, 4, 0, 5]]


def test_padding_leaves_behind_visual_tokens_and_ahead_of_text() -> None:
    inf = torch.inf
    scores = torch.tensor([[inf, inf, 5.0, 1.0, inf], [inf, inf, inf, inf, inf]])
    p, v, i = PADDING, VISUAL, INSTRUCTION
    roles = torch.tensor([[p, p, v, v, i], [p, p, p, i, i]])
    order = lowest_first(scores, roles)
    assert order.tolist() == [[3, 2, 0, 1, 4], [0, 1, 2, 3, 4]]


def test_a_sample_holds_enough_visual_tokens_or_none_and_enough_padding() -> None:
    p, v, i = PADDING, VISUAL, INSTRUCTION
    image, text, small = [v, v, v, i], [p, p, i, i], [p, v, i, i]

    def enough(*rows: list[int], exactly: int | None = None) -> bool:
        return bool(enough_to_drop(torch.tensor(rows), 2, exactly))

    assert enough(image, text)
    assert enough(image, text, exactly=3)
    assert not enough(image, exactly=2)
    assert not enough(image, small)
    assert not enough(image, [p, i, i, i])


def by_rank(rate: Rate, count: int) -> Tensor:
    """A baseline's scores of ``count`` visual tokens, with text around them."""
    roles = torch.tensor([[CONTEXT] * 3 + [VISUAL] * count + [INSTRUCTION] * 5])
    unused = torch.empty(0)
    scores: Tensor = rate(Evidence(unused, unused, None, roles, 1.0))
    return scores[roles == VISUAL]


@pytest.mark.parametrize("rate", [uniform.rate, random.rate])
def test_baselines_have_no_ties(rate: Rate) -> None:
    assert len(set(by_rank(rate, 2880).tolist())) == 2880


@pytest.mark.parametrize("count", [144, 576])
@pytest.mark.parametrize("drop", [13, 70, 100])
def test_uniform_is_evenly_spaced(count: int, drop: int) -> None:
    leaving = by_rank(uniform.rate, count).argsort()[:drop].sort().values
    gaps = leaving.diff()
    assert len(set(gaps.tolist())) <= 3
    assert gaps.max() < 2.7 * count / drop  # golden ratio squared, and rounding


def test_random_is_spread_and_depends_on_the_seed_and_the_count() -> None:
    def leaving(seed: int, count: int = 144) -> set[int]:
        scores = by_rank(functools.partial(random.rate, seed=seed), count)
        return set(scores.argsort()[:72].tolist())

    assert leaving(0) == leaving(0)
    thirds = torch.zeros(3)
    for seed in range(200):
        for token in leaving(seed):
            thirds[token // 48] += 1
        # Two draws of half share half: 36, with a standard deviation of 3.
        assert 20 < len(leaving(seed) & leaving(seed + 1)) < 52
    torch.testing.assert_close(
        thirds / thirds.sum(), torch.full((3,), 1 / 3), atol=0.01, rtol=0
    )
    assert leaving(0) != leaving(0, count=145)


def test_inverted_ranks_backwards() -> None:
    query, key, roles = drawn()
    seen = Evidence(query[None], key[None], None, roles[None], SCALE)
    best_last = lowest_first(fitprune.rate(seen), roles[None])[0, :6]
    worst_last = lowest_first(inverted.rate(seen), roles[None])[0, :6]
    assert worst_last.tolist() == best_last.flip(0).tolist()


def test_compacted_positions_begin_with_a_samples_first_token() -> None:
    """A row loses one: one sample padding, the other two tokens, one in place."""
    roles = torch.tensor(
        [
            [PADDING, PADDING, VISUAL, VISUAL, INSTRUCTION],
            [VISUAL, VISUAL, VISUAL, INSTRUCTION, INSTRUCTION],
        ]
    )
    stand_in = torch.tensor([[1, 2, 3, 4], [0, 2, 3, 4]])
    keep = torch.tensor([[1, 2, 3, 4], [-1, 2, 3, 4]])
    places = per_sample_places(roles, stand_in, keep, padding_counts(roles))
    # What the padding of the second sample gets is read by nobody.
    assert places[0].tolist() == [1, 2, 3, 4]
    assert places[1, 1:].tolist() == [0, 1, 2]
