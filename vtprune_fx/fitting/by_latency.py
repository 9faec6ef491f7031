"""Recipes that save a share of the time to the first token."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from vtprune_fx.errors import InputError
from vtprune_fx.fitting.options import Fitted

TRIES, NEAR, MOST, LEAST = 3, 0.02, 0.9, 0.1
"""Recipes timed for each limit of cuts, the distance from a budget that is near enough,
the largest share of the MACs to save, and the least slope of time over MACs."""


def enough_time(
    timed: Callable[[float, int | None], Fitted],
    budget: float,
    limits: Sequence[int | None],
) -> Fitted:
    """Of recipes that save enough time, the one that keeps most attention.

    For each limit of cuts a few shares of the MACs are tried: one as large as the
    budget, one larger by what that misses, and then along the line through both.

    Args:
        timed: Maps (MAC share, most cuts) to the fitted recipe with its measured time.
        budget: Share of the time to save.
        limits: The most cuts to try, None for any number.

    Raises:
        InputError: None does.
    """
    tried: list[Fitted] = []
    for cuts in limits:
        share, slope = budget, 1.0
        before: tuple[float, float] | None = None
        for _ in range(TRIES):
            tried.append(timed(share, cuts))
            time = tried[-1].saved_time or 0.0
            if budget <= time <= budget + NEAR:
                break
            if before is not None and share != before[0]:
                slope = max(LEAST, (time - before[1]) / (share - before[0]))
            before = (share, time)
            share = min(share + (budget + NEAR / 2 - time) / slope, MOST)
    enough = [one for one in tried if (one.saved_time or 0.0) >= budget]
    if not enough:
        most = max(one.saved_time or 0.0 for one in tried)
        raise InputError(
            f"budget {budget}",
            expected="a share of the time that a recipe saves here",
            found=f"{most:.1%} saved by the fastest of {len(tried)}",
            fix="Ask for less. Small models spend their time outside the arithmetic.",
        )
    best = max(enough, key=lambda one: one.kept)
    return dataclasses.replace(best, budget=budget)
