"""Recipes, schedules, costs, the search: arithmetic by hand or by brute force."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor

from vtprune_fx.errors import InputError, PlanError, RecipeError
from vtprune_fx.fitting.attention_statistics import Statistics
from vtprune_fx.fitting.coalesce import attention_kept, coalesced, mean_kept
from vtprune_fx.fitting.search import Account, Prompts, search
from vtprune_fx.recipes.counting import Geometry, cost
from vtprune_fx.recipes.rank_rule import DropByRank, KeepByRank
from vtprune_fx.recipes.schedule import (
    aligned_to_tiles,
    common_count,
    dropped_before,
)
from vtprune_fx.recipes.schema import Cut, Provenance, Recipe, Recycle, Site
from vtprune_fx.selection.attention_rank import counts

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence


def recipe(
    drops: Mapping[int, int],
    site: Site = "after_attention",
    of: int | None = None,
    recycle: Recycle | None = None,
    layers: int = 4,
) -> Recipe:
    """A recipe for 100 visual tokens."""
    return Recipe(
        schema_version=1,
        name="by-hand",
        method="custom",
        score="fitprune",
        positions="kept",
        layers=layers,
        visual_tokens=100,
        of=of,
        recycle=recycle,
        cuts=tuple(Cut(layer=n, drop=d, site=site) for n, d in drops.items()),
        provenance=Provenance(source="this test"),
    )


HALF = Recycle(tau=0.5, theta=0.5)


# ----------------------------------------------------------------------------- recipes


@pytest.mark.parametrize(
    ("drops", "of", "visual", "found"),
    [
        ({0: 10, 2: 5}, None, 100, {0: 10, 2: 5}),
        ({0: 10, 2: 5}, None, 3, {0: 10, 2: 5}),
        ({0: 10, 2: 5}, 100, 50, {0: 5, 2: 2}),
        ({0: 10, 2: 5}, 100, 19, {0: 1}),
        ({0: 10, 2: 5}, 20, 100, {0: 50, 2: 25}),
        ({0: 0}, None, 100, {}),
    ],
)
def test_shares_are_rounded_down_and_none_is_left_out(
    drops: dict[int, int], of: int | None, visual: int, found: dict[int, int]
) -> None:
    assert recipe(drops, of=of).drops(visual) == found


@pytest.mark.parametrize(
    ("form", "tau", "theta", "dropped", "found"),
    [
        # int(tau n) + 1 into int(theta m) + 1.
        ("code", 0.3, 0.5, 10, (4, 3)),
        ("code", 0.0, 0.0, 10, (1, 1)),
        ("code", 1.0, 1.0, 10, (10, 10)),
        ("code", 0.5, 0.5, 1, (1, 1)),
        # At least one of each.
        ("paper", 0.3, 0.5, 10, (3, 1)),
        ("paper", 0.0, 0.0, 10, (1, 1)),
        ("contextual", 1.0, 0.1, 40, (40, 4)),
    ],
)
def test_numbers_of_clustered_and_new_tokens(
    form: Any, tau: float, theta: float, dropped: int, found: tuple[int, int]
) -> None:
    assert Recycle(tau=tau, theta=theta, form=form).counts(dropped) == found


@pytest.mark.parametrize(
    ("drops", "recycle", "needed", "left"),
    [
        ({0: 10, 2: 5}, None, 15, [90, 90, 85, 85]),
        # 10 leave and 6 / 4 come; 20 leave, of 11 come 6.
        ({0: 10, 2: 20}, HALF, 26, [94, 94, 80, 80]),
        ({1: 100}, None, 100, [100, 0, 0, 0]),
        ({}, None, 0, [100, 100, 100, 100]),
    ],
)
def test_tokens_left_after_each_layer(
    drops: dict[int, int], recycle: Recycle | None, needed: int, left: list[int]
) -> None:
    """With halves: 10 gives int(5) + 1 = 6 and int(3) + 1 = 4; 20 gives 11 and 6."""
    found = recipe(drops, "after_layer", recycle=recycle)
    assert found.needed(100) == needed
    assert found.tokens_per_layer(100, 4) == left


@pytest.mark.parametrize(
    ("site", "gone"),
    [
        ("after_attention", [0, 0, 7, 7]),
        ("after_layer", [0, 0, 7, 7]),
        ("before_layer", [0, 7, 7, 7]),
    ],
)
def test_what_has_left_before_each_attention(site: Site, gone: list[int]) -> None:
    assert dropped_before(recipe({1: 7}, site), 100, 4) == gone


def test_a_cut_in_the_last_layer_is_seen_by_no_attention() -> None:
    assert dropped_before(recipe({0: 2, 3: 7}), 100, 4) == [0, 2, 2, 2]


def largest_count(made: Recipe, visual: Sequence[int], padding: Sequence[int]) -> int:
    """The largest count that every row affords: all are tried, the largest first."""
    least = min(count for count in visual if count)
    for count in range(max(visual), least, -1):
        if all(
            affords(made, count, v, p) for v, p in zip(visual, padding, strict=True)
        ):
            return count
    return least


def affords(made: Recipe, count: int, visual: int, padding: int) -> bool:
    """Whether padding makes up, cut by cut, for what a sample drops less."""
    for cut in made.cuts:
        wanted, own = made.drops(count), made.drops(visual)
        padding -= wanted.get(cut.layer, 0) - own.get(cut.layer, 0)
        if padding < 0:
            return False
    return True


@pytest.mark.parametrize("visual", [(10, 10), (10, 4), (10, 7, 3), (10, 0), (9, 1, 0)])
@pytest.mark.parametrize("room", [0, 1, 2, 5, 20])
def test_a_batch_drops_what_every_row_affords(
    visual: tuple[int, ...], room: int
) -> None:
    made = recipe({0: 4, 2: 3}, of=10)
    padding = [0 if count == max(visual) else room for count in visual]
    found = common_count(made, visual, padding)
    assert made.drops(found) == made.drops(largest_count(made, visual, padding))


@pytest.mark.parametrize(
    ("drops", "tile", "text", "found"),
    [
        # 100 + 28 = 128; 118 fills 4 of 32, so nothing leaves; 95 fills 3.
        ({0: 10, 2: 23}, 32, 28, {2: 32}),
        ({0: 32, 2: 32}, 32, 28, {0: 32, 2: 32}),
        ({0: 33, 2: 31}, 32, 28, {0: 32, 2: 32}),
        ({0: 10}, 64, 28, {}),
        # 110 is no multiple: 110 - 14 = 96 is the first full tile.
        ({0: 20}, 32, 10, {0: 14}),
    ],
)
def test_cuts_fill_whole_tiles(
    drops: dict[int, int], tile: int, text: int, found: dict[int, int]
) -> None:
    aligned = aligned_to_tiles(recipe(drops), tile, text)
    assert aligned.drops(100) == found


def test_new_tokens_and_tiles_are_refused_together() -> None:
    made = recipe({0: 4}, "after_layer", recycle=HALF)
    with pytest.raises(RecipeError, match="cuts that make new tokens"):
        aligned_to_tiles(made, 32, 0)


def dropping(factor: float) -> DropByRank:
    return DropByRank.model_validate({"lambda": factor})


@pytest.mark.parametrize(
    ("rule", "rank", "visual", "drop"),
    [
        (KeepByRank(scale=1.5, bias=2.0), 4, 20, 12),
        (KeepByRank(scale=1.0), 30, 20, 1),
        (KeepByRank(scale=0.0, bias=-3.0), 4, 20, 20),
        (KeepByRank(scale=0.9), 5, 20, 16),
        (dropping(0.5), 5, 20, 7),
        (dropping(1.0), 20, 20, 0),
        (dropping(1.0), 0, 20, 20),
    ],
    ids=str,
)
def test_rules_by_rank_in_numbers_and_in_graphs(
    rule: KeepByRank | DropByRank, rank: int, visual: int, drop: int
) -> None:
    assert rule.drop(rank, visual) == drop
    roles = torch.tensor([[1] * visual + [2] * 5])
    found = counts(torch.tensor(rank), roles, rule, None)
    assert found.tolist() == [visual + 5 - drop, 1, 1, 0]
    recycled = counts(torch.tensor(rank), roles, rule, HALF)
    chosen = min(drop // 2 + 1, drop)
    new = min(chosen // 2 + 1, chosen)
    assert recycled.tolist() == [visual + 5 - drop, max(chosen, 1), max(new, 1), new]


# ------------------------------------------------------------------------------- costs


GEOMETRY = Geometry(
    layers=4, hidden=8, intermediate=16, heads=4, kv_heads=2, head_dim=2, kv_bytes=2
)


def layer_macs(attending: int, finishing: int) -> int:
    """One layer: q 8x8, k and v 8x4 each, attention, o 8x8, three of 8x16."""
    before = attending * (8 * 8 + 2 * 8 * 4) + 2 * attending * attending * 8
    return before + finishing * (8 * 8 + 3 * 8 * 16)


@pytest.mark.parametrize(
    ("site", "layers"),
    [
        ("after_attention", [(110, 110), (110, 80), (80, 80), (80, 80)]),
        ("after_layer", [(110, 110), (110, 110), (80, 80), (80, 80)]),
        ("before_layer", [(110, 110), (80, 80), (80, 80), (80, 80)]),
    ],
)
def test_macs_of_each_layer_add_up(site: Site, layers: list[tuple[int, int]]) -> None:
    found = cost(recipe({1: 30}, site), GEOMETRY, 100, 10).total
    assert found.pruned_macs == sum(layer_macs(*tokens) for tokens in layers)
    assert found.dense_macs == 4 * layer_macs(110, 110)
    # Keys and values: two of two heads of two numbers of two bytes.
    assert found.pruned_cache_bytes == sum(16 * attending for attending, _ in layers)
    assert found.dense_cache_bytes == 4 * 16 * 110
    assert found.ratio == found.pruned_macs / found.dense_macs
    assert found.pruned_flops == 2 * found.pruned_macs


def test_a_scores_products_are_counted_beside() -> None:
    """All rows of all heads: 110 x 110 x 4 x 2, and queries and keys before a layer."""
    after = cost(recipe({1: 30}), GEOMETRY, 100, 10).total
    before = cost(recipe({1: 30}, "before_layer"), GEOMETRY, 100, 10).total
    assert after.scorer_macs == 110 * 110 * 8
    assert before.scorer_macs == 110 * 110 * 8 + 110 * 8 * (4 + 2) * 2


@pytest.mark.parametrize(
    ("visual", "text", "error", "message"),
    [
        (-1, 5, InputError, "number of visual tokens"),
        (5, -1, InputError, "number of text tokens"),
    ],
)
def test_negative_numbers_are_refused(
    visual: int, text: int, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        cost(recipe({}), GEOMETRY, visual, text)


def test_a_cut_after_the_last_layer_is_refused() -> None:
    with pytest.raises(PlanError, match="a cut in layer 5"):
        cost(recipe({5: 1}, layers=6), GEOMETRY, 100, 0)


# ------------------------------------------------------------------------------ search


PROMPTS = Prompts(torch.tensor([20, 20, 10]), torch.tensor([5, 7, 6]))


@pytest.mark.parametrize(
    ("dropped", "number"),
    [
        ([4, 4, 2], 4),
        # 4, 5 and 3 of 10, which is 6 of 20: their mean is 5.
        ([4, 5, 3], 5),
        ([0, 0, 1], 0),
        ([20, 20, 10], 20),
    ],
)
def test_a_recipes_number_is_a_mean_of_shares(dropped: list[int], number: int) -> None:
    assert PROMPTS.usual == 20
    assert PROMPTS.drop(torch.tensor(dropped)) == number


def saved_by(drops: Sequence[int]) -> float:
    """Share of the MACs saved, each sample's layers by hand."""
    dense = spent = 0
    for visual, text in zip(
        PROMPTS.visual.tolist(), PROMPTS.text.tolist(), strict=True
    ):
        left = visual
        for layer in range(GEOMETRY.layers):
            drop = drops[layer] if layer < len(drops) else 0
            after = left - drop * visual // 20
            dense += layer_macs(visual + text, visual + text)
            spent += layer_macs(left + text, after + text)
            left = after
    return 1 - spent / dense


@pytest.mark.parametrize("drops", [(), (4,), (0, 0, 10), (1, 2, 3, 4), (20,)])
def test_an_account_is_the_sum_over_samples(drops: tuple[int, ...]) -> None:
    account = Account(GEOMETRY, PROMPTS)
    for drop in drops:
        account.cut(drop)
    assert account.saved() == pytest.approx(saved_by(drops), abs=1e-12)


def table_of(tolerance: float) -> list[int]:
    """What four layers drop at a tolerance: each at most what is left of 20."""
    left, drops = 20, []
    for weight in (0.2, 0.5, 0.9, 1.0):
        drops.append(min(int(weight * tolerance * 20), left))
        left -= drops[-1]
    return drops


def trial(tolerance: float) -> Iterator[Tensor]:
    for drop in table_of(tolerance):
        yield torch.tensor([drop, drop, drop // 2])


def drops_until(tolerance: float, budget: float) -> tuple[int, ...] | None:
    """What layers drop up to the one at which a budget is met."""
    drops: list[int] = []
    for dropped in trial(tolerance):
        drops.append(PROMPTS.drop(dropped))
        if saved_by(drops) >= budget:
            return tuple(drops)
    return None


@pytest.mark.parametrize("budgets", [(0.1,), (0.3, 0.1), (0.2, 0.45, 0.05)])
@pytest.mark.parametrize("steps", [3, 5])
def test_the_search_finds_what_trying_all_tolerances_finds(
    budgets: tuple[float, ...], steps: int
) -> None:
    found = search(trial, GEOMETRY, PROMPTS, budgets, steps)
    for budget in budgets:
        all_tried = (n / 2**steps for n in range(1, 2**steps))
        met = [t for t in all_tried if drops_until(t, budget) is not None]
        # At a tolerance of 1 all may leave in the first layer.
        best, drops = (met[0], drops_until(met[0], budget)) if met else (1.0, (20,))
        assert found[budget].tolerance == best, budget
        assert found[budget].drops == drops


def test_a_recipe_holds_the_layers_that_drop() -> None:
    [found] = search(trial, GEOMETRY, PROMPTS, (0.3,), 4).values()
    made = found.recipe("found", 4, 20, Provenance(source="this test"))
    drops = {layer: drop for layer, drop in enumerate(found.drops) if drop}
    assert {cut.layer: cut.drop for cut in made.cuts} == drops
    assert (made.of, made.visual_tokens, made.layers) == (20, 20, 4)


# ---------------------------------------------------------------------- merging of cuts


KEPT = torch.stack(
    [
        torch.linspace(0, 1, 21, dtype=torch.float64) ** power
        for power in (0.9, 0.5, 0.3, 0.1)
    ]
)
"""[4, 21]: what share of a layer's attention so many tokens hold."""


@pytest.mark.parametrize(
    ("drops", "left"),
    [
        ((), [20, 20, 20, 20]),
        ((5,), [15, 15, 15, 15]),
        ((0, 5, 0, 5), [20, 15, 15, 10]),
        ((20,), [0, 0, 0, 0]),
    ],
)
def test_attention_kept_is_a_mean_over_layers(
    drops: tuple[int, ...], left: list[int]
) -> None:
    wanted = sum((n / 20) ** p for n, p in zip(left, (0.9, 0.5, 0.3, 0.1), strict=True))
    assert mean_kept(KEPT, drops) == pytest.approx(wanted / 4, abs=1e-12)


def all_merges(drops: Sequence[int], cuts: int) -> Iterator[tuple[int, ...]]:
    """Every way to merge neighbours into at most so many cuts in layers between."""
    at = [layer for layer, drop in enumerate(drops) if drop]
    for count in range(1, cuts + 1):
        for ends in itertools.combinations(range(1, len(at)), count - 1):
            bounds = [0, *ends, len(at)]
            groups = [at[a:b] for a, b in itertools.pairwise(bounds)]
            ranges = [range(group[0], group[-1] + 1) for group in groups]
            for layers in itertools.product(*ranges):
                merged = [0] * len(drops)
                for layer, group in zip(layers, groups, strict=True):
                    merged[layer] = sum(drops[n] for n in group)
                yield tuple(merged)


@pytest.mark.parametrize("cuts", [1, 2, 3])
@pytest.mark.parametrize("drops", [(4, 4, 4, 4), (1, 6, 0, 7), (8, 1, 1, 6)])
def test_merged_cuts_keep_what_the_best_priced_merge_keeps(
    drops: tuple[int, ...], cuts: int
) -> None:
    """All merges are tried at many prices of a MAC; moving cuts later may keep more."""
    budget = saved_by(drops) * 0.9
    found = coalesced(drops, cuts, KEPT, GEOMETRY, PROMPTS, budget)
    assert saved_by(found) >= budget
    assert sum(found) == sum(drops)
    if sum(map(bool, drops)) > cuts:
        assert sum(map(bool, found)) <= cuts
        known = [
            (1 - mean_kept(KEPT, m), 1 - saved_by(m)) for m in all_merges(drops, cuts)
        ]
        cheapest = {
            min((lost + 0.01 * 1.05**n * spent, lost, spent) for lost, spent in known)
            for n in range(300)
        }
        lost = min(lost for _, lost, spent in cheapest if 1 - spent >= budget)
        assert mean_kept(KEPT, found) >= 1 - lost - 1e-9
    else:
        assert found == drops


def test_few_cuts_are_left_as_they_are() -> None:
    assert coalesced((0, 3, 0, 2), 2, KEPT, GEOMETRY, PROMPTS, 0.01) == (0, 3, 0, 2)


def test_attention_kept_by_loops() -> None:
    """The best by the product of both sums are left; what they hold of each."""
    generator = torch.Generator().manual_seed(3)
    visual = torch.tensor([5, 3])
    cross, own = torch.rand(2, 2, 2, 5, generator=generator)
    cross[1, :, 3:] = own[1, :, 3:] = 0
    text = torch.ones_like(visual)
    kept = attention_kept(Statistics(cross, own, cross, own, visual, text), 5)
    for layer, left in itertools.product(range(2), range(6)):
        wanted = 0.0
        for sample, count in enumerate(visual.tolist()):
            c, e = cross[sample, layer].tolist(), own[sample, layer].tolist()
            pairs = zip(c, e, strict=True)
            products = [(-one * other, n) for n, (one, other) in enumerate(pairs)]
            best = [n for _, n in sorted(products)]
            stay = best[: count - (5 - left) * count // 5]
            wanted += sum(c[n] / sum(c) + e[n] / sum(e) for n in stay) / 4
        assert float(kept[layer, left]) == pytest.approx(wanted, abs=1e-6)
