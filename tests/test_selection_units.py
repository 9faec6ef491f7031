"""What cuts do on tensors, against plain loops in float64."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from vtprune_fx.scorers.roles import (
    CONTEXT,
    INSTRUCTION,
    PADDING,
    VISUAL,
    padding_counts,
    token_roles,
    visual_counts,
)
from vtprune_fx.selection import attention_rank, contextual, per_sample, recycling
from vtprune_fx.selection.operators import choose, take
from vtprune_fx.selection.order import enough_to_drop, lowest_first

ROLES = {"t": CONTEXT, "v": VISUAL, "i": INSTRUCTION, "p": PADDING}


def roles(*rows: str) -> Tensor:
    """Roles from letters: text, visual, instruction, padding."""
    return torch.tensor([[ROLES[letter] for letter in row] for row in rows])


def drawn(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


# ------------------------------------------------------------------------------- order


NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("row", "scores", "order"),
    [
        # The lowest visual tokens first, then padding, then text in its order.
        ("tvvvi", [0, 3, 1, 2, 0], [2, 3, 1, 0, 4]),
        ("pvvit", [0, 3, 1, 2, 0], [2, 1, 0, 3, 4]),
        ("vvv", [1, 1, 1], [0, 1, 2]),
        # One without a score leaves first; infinite ones leave before padding.
        ("pvvv", [0, 1, NAN, -INF], [2, 3, 1, 0]),
        ("vpv", [INF, 0, 1], [2, 0, 1]),
        ("pppt", [3, 2, 1, 0], [0, 1, 2, 3]),
        ("titi", [4, 3, 2, 1], [0, 1, 2, 3]),
    ],
)
def test_the_order_of_leaving(row: str, scores: list[float], order: list[int]) -> None:
    assert lowest_first(torch.tensor([scores]), roles(row)).tolist() == [order]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_the_order_does_not_depend_on_the_scores_type(dtype: torch.dtype) -> None:
    scores = torch.tensor([[2.0, 0.5, 1.0, 4.0]], dtype=dtype)
    assert lowest_first(scores, roles("vvvv")).tolist() == [[1, 2, 0, 3]]


@pytest.mark.parametrize(
    ("row", "dropped", "exactly", "enough"),
    [
        ("vvvt", 3, None, True),
        ("vvvt", 4, None, False),
        ("pppt", 3, None, True),
        ("pppt", 4, None, False),
        # Padding does not make up for a sample that has some visual tokens.
        ("ppvt", 2, None, False),
        ("vvvt", 1, 3, True),
        ("vvvt", 1, 2, False),
        ("vvvt", 1, 4, False),
        ("pptt", 2, 3, True),
    ],
)
def test_a_sample_has_enough(
    row: str, dropped: int, exactly: int | None, *, enough: bool
) -> None:
    assert bool(enough_to_drop(roles(row), dropped, exactly)) is enough
    # One sample that has too few is too few for the batch.
    both = roles(row, "v" * len(row)) if exactly is None else roles(row, row)
    assert bool(enough_to_drop(both, dropped, exactly)) is enough


def test_choosing_in_one_operator_is_order_slice_and_sort() -> None:
    row = roles("tvvvvi")
    # uniform: the numbers 0 to 3 score 0, 40503, 15470, 55973.
    nothing = (None, None, None, 1.0, None, None, None, None)
    kept = choose(row, 2, "uniform", "{}", *nothing)
    assert kept.tolist() == [[0, 2, 4, 5]]


@pytest.mark.parametrize("axes", [[1], [2], [1, 2]])
@pytest.mark.parametrize("samples", [1, 3])
def test_take_is_indexing_each_sample(samples: int, axes: list[int]) -> None:
    value = drawn(samples, 5, 5, 2)
    keep = torch.tensor([[0, 4], [1, 2], [3, 4]])
    found = take(value, keep, axes)
    for sample, stays in enumerate(keep.tolist()):
        own = value[sample if samples > 1 else 0]
        rows = stays if 1 in axes else range(5)
        columns = stays if 2 in axes else range(5)
        wanted = torch.stack([torch.stack([own[r, c] for c in columns]) for r in rows])
        assert torch.equal(found[sample], wanted)


# ------------------------------------------------------------------------------- roles


@pytest.mark.parametrize(
    ("visual", "row"),
    [
        ([0, 1, 1, 0, 0], "tvvii"),
        ([1, 0, 1, 0], "vtvi"),
        ([0, 0, 0], "iii"),
        ([0, 1, 1], "tvv"),
    ],
)
def test_text_is_instruction_after_the_last_image(visual: list[int], row: str) -> None:
    marks = torch.tensor([visual], dtype=torch.bool)
    assert torch.equal(token_roles(marks, None), roles(row))
    assert torch.equal(token_roles(marks[:, :, None], None), roles(row))


def test_tokens_are_counted() -> None:
    rows = roles("ppvvi", "vvvtt", "ppppp")
    assert visual_counts(rows).tolist() == [2, 3, 0]
    assert padding_counts(rows).tolist() == [[2], [0], [5]]


# ----------------------------------------------------------- numbers of each sample's


@pytest.mark.parametrize(
    ("row", "scores", "share", "order", "leaving"),
    [
        # Of 4 visual tokens, 2 of 4: two leave, then padding, visual ones, text.
        ("pvvvvt", [0, 4, 1, 3, 2, 0], 2, [2, 4, 0, 3, 1, 5], 2),
        # Of 2 one: then padding.
        ("pppvvt", [0, 0, 0, 2, 1, 0], 2, [4, 0, 1, 2, 3, 5], 1),
        # 3 of 4 of 2 is 1.
        ("pppvvt", [0, 0, 0, 2, 1, 0], 3, [4, 0, 1, 2, 3, 5], 1),
        ("pppttt", [0] * 6, 2, [0, 1, 2, 3, 4, 5], 0),
    ],
)
def test_a_sample_loses_its_share_then_padding(
    row: str, scores: list[float], share: int, order: list[int], leaving: int
) -> None:
    marks = roles(row)
    came = visual_counts(marks)
    found = per_sample.per_sample_order(torch.tensor([scores]), marks, came, share, 4)
    assert found.tolist() == [order]
    gone = per_sample.per_sample_dropped(found, came, share, 4)
    assert gone.tolist() == [[place < leaving for place in range(6)]]


@pytest.mark.parametrize(
    ("staying", "leaving", "keep", "stand_in"),
    [
        ([5, 2, 4], [0, 0, 0], [2, 4, 5], [2, 4, 5]),
        ([5, 2, 4], [1, 0, 0], [-1, 2, 4], [5, 2, 4]),
        ([5, 2, 0], [1, 0, 1], [-1, -1, 2], [0, 5, 2]),
    ],
)
def test_tokens_dropped_in_place_stand_in_front(
    staying: list[int], leaving: list[int], keep: list[int], stand_in: list[int]
) -> None:
    gone = torch.tensor([leaving], dtype=torch.bool)
    keys = per_sample.per_sample_keys(torch.tensor([staying]), gone).sort(dim=1).values
    assert per_sample.per_sample_keep_set(keys).tolist() == [keep]
    assert per_sample.per_sample_stand_ins(keys).tolist() == [stand_in]


def test_places_begin_with_a_samples_first_token() -> None:
    """Two of padding stood in front; now three do: one left in place."""
    rows = roles("ppvvvi")
    stand_in = torch.tensor([[0, 1, 2, 4, 5]])
    keep = torch.tensor([[0, 1, -1, 4, 5]])
    found = per_sample.per_sample_places(rows, stand_in, keep, padding_counts(rows))
    # The fourth in the row takes the place of the first token, which is 2.
    assert found.tolist() == [[0, 0, 1, 2, 3]]


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.float16])
def test_no_token_attends_to_dropped_ones(dtype: torch.dtype) -> None:
    keep = torch.tensor([[-1, 3, 7]])
    mask = torch.ones(1, 1, 3, 3, dtype=dtype)
    found = per_sample.mask_without(mask, keep)
    never = False if dtype == torch.bool else torch.finfo(dtype).min
    assert (found[0, 0, :, 0] == never).all()
    assert (found[0, 0, :, 1:] == 1).all()
    assert per_sample.roles_without(roles("vvi"), keep).tolist() == [[3, 1, 2]]


@pytest.mark.parametrize(
    ("row", "drops", "shares", "enough"),
    [
        ("vvvvtt", (2,), (2,), True),
        ("vvpttt", (2,), (2,), True),
        ("vvtttt", (2,), (2,), False),
        ("vvpttt", (2, 1), (2, 1), False),
        ("vvpptt", (2, 1), (2, 1), True),
        ("ppptpt", (2, 2), (2, 2), True),
        ("ppptvt", (2, 2), (2, 2), False),
    ],
)
def test_padding_makes_up_for_smaller_images(
    row: str, drops: tuple[int, ...], shares: tuple[int, ...], *, enough: bool
) -> None:
    """Shares of 4: a sample of v loses v * share // 4, and padding beside it."""
    assert bool(per_sample.enough_padding(roles(row), drops, shares, 4)) is enough


# --------------------------------------------------------------------------- recycling


def loops_of_recycling(tokens: Tensor, clusters: int, *, paper: bool) -> Tensor:
    """[C, E] of [m, E], as the module's docstring says it."""
    count, width = tokens.shape
    numbers = range(count)
    apart = [
        [
            math.sqrt(sum((float(a - b)) ** 2 for a, b in zip(x, y, strict=True)))
            / math.sqrt(width)
            for y in tokens
        ]
        for x in tokens
    ]
    density = [
        math.exp(-sum(d * d for d in sorted(apart[i])[:clusters]) / clusters)
        for i in numbers
    ]
    farthest = max(map(max, apart))
    peak = []
    for i in numbers:
        denser = [
            j
            for j in numbers
            if density[j] > density[i] or (density[j] == density[i] and j < i)
        ]
        peak.append(density[i] * min((apart[i][j] for j in denser), default=farthest))
    centres = sorted(numbers, key=lambda i: (-peak[i], i))[:clusters]
    joined: list[list[int]] = [[centre] for centre in centres]
    for i in numbers:
        if i in centres:
            continue
        if paper:
            far = [1 - cosine(tokens[i], tokens[c]) for c in centres]
        else:
            far = [apart[i][c] for c in centres]
        joined[far.index(min(far))].append(i)
    sums = [tokens[each].sum(dim=0) for each in joined]
    if paper:
        return torch.stack(sums)
    return torch.stack([s / len(each) for s, each in zip(sums, joined, strict=True)])


def cosine(one: Tensor, other: Tensor) -> float:
    return float(one @ other / (one.norm() * other.norm()))


@pytest.mark.parametrize("paper", [False, True])
@pytest.mark.parametrize(("count", "clusters"), [(5, 1), (7, 3), (9, 4), (6, 6)])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_clusters_are_density_peaks(
    count: int, clusters: int, seed: int, *, paper: bool
) -> None:
    hidden = drawn(2, 12, 4, seed=seed)
    best = torch.stack([torch.randperm(12)[:count] for _ in range(2)])
    found = recycling.merge(hidden.float(), best, clusters, paper)
    for sample in range(2):
        tokens = hidden[sample, best[sample]]
        wanted = loops_of_recycling(tokens, clusters, paper=paper)
        torch.testing.assert_close(found[sample].double(), wanted, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("drop", "chosen", "best"), [(4, 2, [2, 3]), (4, 4, [2, 3, 0, 5]), (1, 1, [5])]
)
def test_the_best_of_those_that_leave(drop: int, chosen: int, best: list[int]) -> None:
    order = torch.tensor([[5, 0, 3, 2, 1, 4]])
    assert recycling.best_of_dropped(order, drop, chosen).tolist() == [best]
    stay = order.shape[1] - drop
    assert attention_rank.best_of_dropped(order, stay, chosen).tolist() == [best]


@pytest.mark.parametrize(
    ("row", "staying", "new", "keep", "stand_in"),
    [
        # New tokens stand after the last visual one, whether that stays or not.
        ("tvvvii", [0, 2, 4, 5], 2, [0, 2, -2, -1, 4, 5], [0, 2, 3, 3, 4, 5]),
        ("tvvvii", [0, 3, 4, 5], 1, [0, 3, -1, 4, 5], [0, 3, 3, 4, 5]),
        # In text alone they stand where the first of the padding left.
        ("ppttii", [2, 3, 4, 5], 1, [-1, 2, 3, 4, 5], [0, 2, 3, 4, 5]),
    ],
)
def test_new_tokens_stand_after_the_last_image(
    row: str, staying: list[int], new: int, keep: list[int], stand_in: list[int]
) -> None:
    marks = roles(row)
    gone = [n for n in range(len(row)) if n not in staying]
    order = torch.tensor([gone + staying])
    keys = torch.cat(
        (
            recycling.kept_keys(torch.tensor([staying]), new),
            recycling.last_keys(order, marks, new),
        ),
        dim=1,
    )
    ascending = keys.sort(dim=1).values
    assert recycling.keep_set(ascending, new).tolist() == [keep]
    assert recycling.stand_ins(ascending, new).tolist() == [stand_in]


def test_tokens_that_share_a_place_see_only_those_before_them() -> None:
    stand_in = torch.tensor([[0, 3, 3, 3, 5]])
    hidden = recycling.hidden_from_each_other(stand_in)[0, 0]
    for row, column in itertools.product(range(5), repeat=2):
        wanted = {row, column} <= {1, 2, 3} and column > row
        assert bool(hidden[row, column]) is wanted


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_hidden_pairs_may_not_attend(dtype: torch.dtype) -> None:
    pairs = torch.tensor([[[[False, True], [False, False]]]])
    mask = torch.ones(1, 1, 2, 2, dtype=dtype)
    found = recycling.hide(mask, pairs).flatten().tolist()
    never = False if dtype == torch.bool else torch.finfo(dtype).min
    assert found == [1, never, 1, 1]


# -------------------------------------------------------------------------- contextual


@pytest.mark.parametrize("leading", [0, 1, 2])
def test_attention_of_the_class_token(leading: int) -> None:
    """Two images of 3 patches, placed into two rows, by loops."""
    images, heads, patches, width, scale = 2, 2, 3, 4, 0.5
    query = drawn(images, heads, leading + patches, width)
    key = drawn(images, heads, leading + patches, width, seed=1)
    visual = torch.tensor([[0, 1, 1, 1, 0], [1, 1, 1, 0, 0]], dtype=torch.bool)
    found = contextual.class_attention(
        query.float(), key.float(), visual, scale, leading
    )
    for image, places in enumerate([[1, 2, 3], [0, 1, 2]]):
        rows = [0] if leading else range(patches)
        wanted = torch.zeros(leading + patches, dtype=torch.float64)
        for head in range(heads):
            for row in rows:
                products = key[image, head] @ query[image, head, row] * scale
                wanted += products.softmax(dim=0) / len(rows)
        got = found[image, places].double()
        torch.testing.assert_close(got, wanted[leading:], atol=1e-6, rtol=0)


def test_keys_are_means_over_heads_in_the_order_of_the_batch() -> None:
    key = drawn(2, 3, 4, 5)
    visual = torch.tensor([[1, 0, 1, 1], [1, 1, 0, 1]], dtype=torch.bool)[..., None]
    found = contextual.mean_keys(key, visual, 1).double()
    for row, places in enumerate([[0, 2, 3], [0, 1, 3]]):
        for patch, place in enumerate(places):
            wanted = sum(key[row, head, 1 + patch] for head in range(3)) / 3
            torch.testing.assert_close(found[row, place], wanted, atol=1e-6, rtol=0)


@pytest.mark.parametrize(("count", "new"), [(6, 2), (7, 3), (4, 4), (5, 1)])
@pytest.mark.parametrize("seed", [0, 1])
def test_contextual_tokens_are_targets_and_the_mean_of_their_likes(
    count: int, new: int, seed: int
) -> None:
    hidden, keys = drawn(1, 10, 4, seed=seed), drawn(1, 10, 3, seed=seed + 9)
    clustered = torch.randperm(10)[:count]
    found = contextual.merge(hidden.float(), keys.float(), clustered[None], new)
    ordered = sorted(clustered.tolist())
    targets = ordered[:: count // new][:new]
    joined: list[list[int]] = [[] for _ in targets]
    for token in ordered:
        if token not in targets:
            like = [cosine(keys[0, token], keys[0, target]) for target in targets]
            joined[like.index(max(like))].append(token)
    for number, (target, members) in enumerate(zip(targets, joined, strict=True)):
        wanted = hidden[0, target].clone()
        for member in members:
            wanted += hidden[0, member] / len(members)
        got = found[0, number].double()
        torch.testing.assert_close(got, wanted, atol=1e-5, rtol=0)
