"""Few cuts instead of many: neighbouring cuts of a recipe merged into one.

A cut costs a compiler a set of kernels, and a runtime a score and a gather. Merging two
cuts moves tokens to an earlier or a later layer: earlier saves more and loses
attention, later the other way round. There are many ways to merge neighbours into at
most so many cuts, and several layers that a merged cut may go to. This finds one that
meets the budget and keeps much attention. It need not be the best one: it is found by a
price on MACs, which reaches the convex hull of MACs and attention alone, and then moved
to later layers while the budget is met.

The attention kept is the mean over layers and calibration prompts of the share that the
tokens kept by a layer's cut hold of what all visual tokens receive there in the
unpruned model, from the instruction and from visual tokens alike, if those with the
best scores are kept.

Shapes: N samples, L layers, V visual tokens.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from vtprune_fx.fitting.attention_statistics import Statistics
from vtprune_fx.fitting.search import Account, Prompts
from vtprune_fx.recipes.counting import Geometry

HALVINGS = 30
"""Of the interval that the price of a MAC lies in."""


def attention_kept(statistics: Statistics, usual: int) -> Tensor:
    """[L, usual + 1]: the share of a layer's attention that so many tokens hold.

    Args:
        statistics: Of the calibration prompts.
        usual: The number of visual tokens that recipes count in.
    """
    left = torch.arange(usual + 1)
    visual = statistics.visual[:, None]
    # Like Recipe.drops: a sample with another number of tokens loses the same share.
    left = visual - (usual - left) * visual // usual
    layers = []
    for cross, own in zip(
        statistics.cross.double().unbind(dim=1),
        statistics.own.double().unbind(dim=1),
        strict=True,
    ):
        best = (cross * own).argsort(dim=1, descending=True, stable=True)
        held = (_shares(cross) + _shares(own)).gather(1, best).cumsum(dim=1) / 2
        held = torch.nn.functional.pad(held, (1, 0))
        layers.append(held.gather(1, left).mean(dim=0))
    return torch.stack(layers)


def _shares(received: Tensor) -> Tensor:
    total = received.sum(dim=1, keepdim=True)
    return received / total.clamp(min=torch.finfo(received.dtype).tiny)


def mean_kept(kept: Tensor, drops: Sequence[int]) -> float:
    """The share of the attention that a recipe keeps, mean over all layers.

    Args:
        kept: The result of ``attention_kept``.
        drops: Drops of each layer; those after the last drop nothing.
    """
    gone = torch.tensor([*drops, *[0] * (len(kept) - len(drops))]).cumsum(dim=0)
    left = kept.shape[1] - 1 - gone
    return float(kept.gather(1, left[:, None]).mean())


def coalesced(
    drops: Sequence[int],
    cuts: int,
    kept: Tensor,
    geometry: Geometry,
    prompts: Prompts,
    budget: float,
) -> tuple[int, ...]:
    """Merge neighbouring cuts.

    For a price of a MAC the best merges are found exactly, by dynamic programming over
    the cuts. The price is the lowest at which they meet the budget: at the highest each
    cut goes to the first of its layers, which saves no less than the recipe did.

    Args:
        drops: Drops of each layer; they meet the budget.
        cuts: How many layers may, at least 1.
        kept: The result of ``attention_kept``.
        geometry: Of the decoder.
        prompts: The calibration prompts.
        budget: Share of the MACs to save.

    Returns:
        Drops of each layer, up to the last cut.
    """
    at = [layer for layer, drop in enumerate(drops) if drop]
    if len(at) <= cuts:
        return tuple(drops)
    merges = _Merges(drops, at, kept, geometry, prompts)
    cheap, dear = 0.0, 1e3
    best = merges.best(cuts, dear)
    for _ in range(HALVINGS):
        price = (cheap + dear) / 2
        found = merges.best(cuts, price)
        if _saved(found, geometry, prompts) >= budget:
            best, dear = found, price
        else:
            cheap = price
    return _late(best, kept, geometry, prompts, budget)


def _late(
    drops: tuple[int, ...],
    kept: Tensor,
    geometry: Geometry,
    prompts: Prompts,
    budget: float,
) -> tuple[int, ...]:
    """Cuts moved to later layers, one layer at a time, as long as the budget is met."""
    while True:
        later = [
            moved
            for moved in _moved(drops, len(kept))
            if _saved(moved, geometry, prompts) >= budget
        ]
        if not later:
            return drops
        drops = max(later, key=lambda moved: mean_kept(kept, moved))


def _moved(drops: tuple[int, ...], layers: int) -> Iterator[tuple[int, ...]]:
    """With one cut a layer later, where that has none."""
    padded = (*drops, 0)[:layers]
    for layer, (drop, next_drop) in enumerate(itertools.pairwise(padded)):
        if drop and not next_drop:
            moved = (*padded[:layer], 0, drop, *padded[layer + 2 :])
            last = max(at for at, count in enumerate(moved) if count)
            yield moved[: last + 1]


def _saved(drops: Sequence[int], geometry: Geometry, prompts: Prompts) -> float:
    account = Account(geometry, prompts)
    for drop in drops:
        account.cut(drop)
    return account.saved()


Cuts = tuple[tuple[int, int], ...]
"""Layers, and how many tokens each drops."""


class _Merges:
    """Costs of merging neighbours: each merge independent of the others.

    Between the first layer of a merge and that of the next, tokens are dropped once.
    """

    def __init__(
        self,
        drops: Sequence[int],
        at: list[int],
        kept: Tensor,
        geometry: Geometry,
        prompts: Prompts,
    ) -> None:
        self._at, self._kept = at, kept
        self._geometry, self._prompts = geometry, prompts
        gone = itertools.accumulate((drops[layer] for layer in at), initial=0)
        self._left = [prompts.usual - count for count in gone]
        self._known: dict[tuple[int, int], float] = {}
        self._options = {
            (first, last): list(self._merged(first, last))
            for first in range(len(at))
            for last in range(first, len(at))
        }

    def best(self, cuts: int, price: float) -> tuple[int, ...]:
        """The cheapest merges into at most so many cuts, as what layers drop."""
        nothing: tuple[float, Cuts] = (math.inf, ())
        # The m-th entry: what the first m cuts come to, and the merges they are in.
        ways = [(0.0, ()), *[nothing] * len(self._at)]
        for _ in range(cuts):
            ways = [min(self._ends(m, ways, price)) for m in range(len(ways))]
        merged = dict(ways[-1][1])
        return tuple(merged.get(layer, 0) for layer in range(max(merged) + 1))

    def _ends(
        self, m: int, ways: list[tuple[float, Cuts]], price: float
    ) -> Iterator[tuple[float, Cuts]]:
        """The first m cuts as they were, or with one merge more at the end."""
        yield ways[m]
        for first, (cost, merges) in enumerate(ways[:m]):
            more, layer = min(
                (lost + price * macs, layer)
                for layer, lost, macs in self._options[first, m - 1]
            )
            drop = self._left[first] - self._left[m]
            yield cost + more, (*merges, (layer, drop))

    def _merged(self, first: int, last: int) -> Iterator[tuple[int, float, float]]:
        """Layers that two cuts and those between may merge in.

        With each the attention lost and the MACs spent from the first one's layer to
        that of the next cut after them, as shares of all layers'.
        """
        before, after = self._left[first], self._left[last + 1]
        layers = len(self._kept)
        start, end = self._at[first], (*self._at, layers)[last + 1]
        for layer in range(start, self._at[last] + 1):
            held = self._kept[start:layer, before].sum()
            held += self._kept[layer:end, after].sum()
            macs = self._macs(before, after)
            macs += (layer - start) * self._macs(before, before)
            macs += (end - layer - 1) * self._macs(after, after)
            yield layer, (end - start - float(held)) / layers, macs / layers

    def _macs(self, before: int, after: int) -> float:
        """MACs of a layer with so many of the usual tokens before and after its cut."""
        if (before, after) not in self._known:
            prompts = self._prompts
            entering, kept = (
                prompts.visual * count // prompts.usual + prompts.text
                for count in (before, after)
            )
            every = prompts.visual + prompts.text
            geometry = self._geometry
            macs = geometry.macs_before_cut(entering) + geometry.macs_after_cut(kept)
            dense = geometry.macs_before_cut(every) + geometry.macs_after_cut(every)
            self._known[before, after] = float(macs.sum() / dense.sum())
        return self._known[before, after]
