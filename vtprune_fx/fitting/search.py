"""FitPrune's recipe search (arXiv:2409.10197): how many tokens each layer drops.

Say ``c[i]`` and ``e[i]`` are the attention that visual token i receives in a layer
from the instruction and from the visual tokens, ``Wc`` and ``Ws`` their sums over all
visual tokens of the unpruned model. Given a tolerance alpha, a layer may lose by ``c``
the largest set of tokens with the smallest ``c`` whose removal keeps at least
``Wc (1 - alpha)``, and likewise by ``e`` and ``Ws``. It drops what both sets hold. A
recipe is the mean over samples of how many that are, rounded down; layers after the
one at which the budget is met drop nothing. The smallest alpha whose recipe meets the
budget is found by bisection.

What layers drop at a tolerance comes from a ``Trial``: ``attention_statistics.Counts``
estimates it, ``exact.Trials`` recomputes attention on the kept tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vtprune_fx.errors import InputError
from vtprune_fx.recipes.counting import Geometry
from vtprune_fx.recipes.schema import Cut, Provenance, Recipe

Trial = Callable[[float], Iterator[Tensor]]
"""A tolerance in; for each layer in turn, [N] tokens that each sample loses, out."""


@dataclass(frozen=True)
class Prompts:
    """Calibration prompts, as far as their cost depends on them.

    Attributes:
        visual: [N] int64, visual tokens of each sample.
        text: [N] int64, its other tokens, or zeros to count visual tokens alone.
    """

    visual: Tensor
    text: Tensor

    @property
    def usual(self) -> int:
        """The number of visual tokens that most samples have."""
        return int(self.visual.mode().values)

    def drop(self, counts: Tensor) -> int:
        """A recipe's number for the [N] tokens that samples lose.

        Their mean, rounded down as the published search does; a sample with more or
        fewer visual tokens than usual counts by the share that it loses.
        """
        usual = counts.double() * self.usual / self.visual
        return int(usual.mean().floor())


class Account:
    """What a recipe saves on calibration prompts, layer by layer.

    Args:
        geometry: Of the decoder.
        prompts: What it prefills.
    """

    def __init__(self, geometry: Geometry, prompts: Prompts) -> None:
        self._geometry, self._prompts = geometry, prompts
        self._left, self._none = prompts.visual, torch.zeros_like(prompts.visual)
        self._dense = geometry.layers * self._layer(self._left, self._left)
        self._empty = self._layer(self._none, self._none)
        self._spent, self._layers = 0, geometry.layers

    def cut(self, drop: int) -> None:
        """Drop tokens in the next layer: so many of the usual number."""
        prompts = self._prompts
        after = self._left - drop * prompts.visual // prompts.usual
        self._spent += self._layer(self._left, after)
        self._left, self._layers = after, self._layers - 1

    def saved(self) -> float:
        """Share of the MACs that is saved if no more tokens are dropped."""
        rest = self._layers * self._layer(self._left, self._left)
        return 1 - (self._spent + rest) / self._dense

    def at_most(self) -> float:
        """Share of the MACs that is saved if the next layer drops all tokens."""
        if self._layers == 0:
            return self.saved()
        rest = self._layer(self._left, self._none) + (self._layers - 1) * self._empty
        return 1 - (self._spent + rest) / self._dense

    def _layer(self, before: Tensor, after: Tensor) -> int:
        """MACs of one layer with so many visual tokens before and after its cut."""
        text, geometry = self._prompts.text, self._geometry
        entering = geometry.macs_before_cut(before + text)
        return int((entering + geometry.macs_after_cut(after + text)).sum())


@dataclass(frozen=True)
class Found:
    """What meets a budget.

    Attributes:
        tolerance: The smallest alpha tried that does.
        drops: What layers drop, up to the one at which the budget is met.
    """

    tolerance: float
    drops: tuple[int, ...]

    def recipe(
        self, name: str, layers: int, visual_tokens: int, provenance: Provenance
    ) -> Recipe:
        """The recipe, for samples with any number of visual tokens."""
        return Recipe(
            schema_version=1,
            name=name,
            method="fitprune",
            score="fitprune",
            positions="kept",
            layers=layers,
            visual_tokens=visual_tokens,
            of=visual_tokens,
            cuts=tuple(
                Cut(layer=layer, drop=drop)
                for layer, drop in enumerate(self.drops)
                if drop
            ),
            provenance=provenance,
        )


Estimate = Callable[[float], float]
"""A share of the MACs to save in, a tolerance that is likely to save it out."""


def search(
    trial: Trial,
    geometry: Geometry,
    prompts: Prompts,
    budgets: Sequence[float],
    steps: int,
    estimate: Estimate | None = None,
) -> dict[float, Found]:
    """The smallest tolerance that meets each budget.

    Bisection: a larger tolerance saves more. A trial serves all budgets it decides.
    With an estimate, steps near it are tried first; each trial's saving corrects it.

    Args:
        trial: What layers drop at a tolerance.
        geometry: Of the decoder.
        prompts: The calibration prompts.
        budgets: Shares of the MACs to save.
        steps: Halvings: tolerances are multiples of ``2**-steps``.
        estimate: Where to start.

    Raises:
        InputError: A budget is not between 0 and 1, or out of reach.
    """
    most = Account(geometry, prompts).at_most()
    for budget in budgets:
        check_budget(budget, most)
    scale, factor = 2**steps, 1.0
    brackets = {budget: _Bracket(scale) for budget in budgets}
    for budget, bracket in brackets.items():
        likely = estimate(budget) if estimate else None
        while bracket.high - bracket.low > 1:
            guess = None if likely is None else likely * factor * scale
            step = bracket.next(guess)
            asked = {b: other for b, other in brackets.items() if other.holds(step)}
            account = Account(geometry, prompts)
            met = _met(trial(step / scale), prompts, account, asked)
            for share, other in asked.items():
                other.learn(step, met.get(share))
            if estimate and not met:
                # The trial ended when it was sure to miss: somewhere between these.
                saved = (account.saved() + account.at_most()) / 2
                factor = step / scale / estimate(saved)
        if likely:
            factor = bracket.high / scale / likely
    return {
        budget: Found(bracket.high / scale, bracket.drops or (prompts.usual,))
        for budget, bracket in brackets.items()
    }


def check_budget(budget: float, most: float = 1.0) -> None:
    """Refuse a budget that is no share, or larger than ``most``.

    Raises:
        InputError: It is.
    """
    if not 0 < budget < 1:
        raise InputError(
            f"budget {budget}",
            expected="a share of the prefill's MACs to save, between 0 and 1",
            found=str(budget),
            fix="60 % is 0.6.",
        )
    if budget > most:
        raise InputError(
            f"budget {budget}",
            expected=f"at most {most:.4f}: so much is saved where the first layer "
            "drops all visual tokens",
            found=str(budget),
            fix="Ask for less.",
        )


def _met(
    trial: Iterator[Tensor],
    prompts: Prompts,
    account: Account,
    budgets: Collection[float],
) -> dict[float, tuple[int, ...]]:
    """The budgets that a trial meets, and what layers drop until each is met."""
    pending, met = set(budgets), dict[float, tuple[int, ...]]()
    drops: list[int] = []
    for counts in trial:
        drops.append(prompts.drop(counts))
        account.cut(drops[-1])
        saved, most = account.saved(), account.at_most()
        met |= {budget: tuple(drops) for budget in pending if saved >= budget}
        pending = {budget for budget in pending if saved < budget <= most}
        if not pending:
            break
    return met


class _Bracket:
    """Where the smallest tolerance for a budget is, in steps.

    ``low`` misses the budget and ``high`` meets it. At first they are 0, at which only
    tokens without attention are dropped, and a tolerance of 1, at which all may be.
    """

    def __init__(self, scale: int) -> None:
        self.low, self.high = 0, scale
        self.drops: tuple[int, ...] | None = None
        self._stride = 1

    def holds(self, step: int) -> bool:
        """Whether it is not known what a step does."""
        return self.low < step < self.high

    def next(self, guess: float | None) -> int:
        """A step to try: the guess, beyond it further and further, or the middle."""
        half = (self.low + self.high) // 2
        if guess is None:
            return half
        step = math.ceil(guess)
        if self.holds(step):
            return step
        stride, self._stride = self._stride, 2 * self._stride
        if step <= self.low:
            return min(self.low + stride, half)
        return max(self.high - stride, half)

    def learn(self, step: int, drops: tuple[int, ...] | None) -> None:
        """Note what layers drop if a step meets the budget, or that it does not."""
        if drops is None:
            self.low = step
        else:
            self.high, self.drops = step, drops
