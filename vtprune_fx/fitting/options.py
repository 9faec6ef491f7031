"""Options and results of ``vtprune fit``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from vtprune_fx.recipes.schema import Recipe
from vtprune_fx.timing import Target

Count = Literal["all", "visual"]
"""Which tokens' MACs a budget is a share of."""


@dataclass(frozen=True)
class Options:
    """Options of ``vtprune fit``.

    Attributes:
        budgets: Shares of the decoder's prefill MACs to save.
        count: Of all tokens' MACs, or of the visual tokens' alone, as the paper counts.
        exact: Recompute attention on the pruned sequence, as the published code does.
        max_cuts: Merge neighbouring cuts until there are at most so many.
        latency: Where to measure, if budgets are shares of the time to the first token
            rather than of MACs.
        statistics: A file to use instead of the one in the folder.
        model: The user's name of the model.
        command: The command line.
    """

    budgets: Sequence[float]
    count: Count = "all"
    exact: bool = False
    max_cuts: int | None = None
    latency: Target | None = None
    statistics: Path | None = None
    model: str = "model"
    command: str = "vtprune_fx.fitting"


@dataclass(frozen=True)
class Fitted:
    """A recipe that meets a budget.

    Attributes:
        recipe: The recipe.
        budget: What was asked for, of MACs or of time.
        tolerance: The share of its attention that a layer may lose, alpha.
        saved: Share of the prefill's MACs that it saves on the calibration prompts.
        saved_visual: The same over the visual tokens alone.
        kept: Share of the attention that it keeps (``coalesce.mean_kept``).
        kept_before: The same of the recipe before cuts were merged.
        saved_time: Share of the time to the first token that it saves, where measured.
    """

    recipe: Recipe
    budget: float
    tolerance: float
    saved: float
    saved_visual: float
    kept: float
    kept_before: float
    saved_time: float | None = None


@dataclass(frozen=True)
class Request:
    """The model and data of ``vtprune fit``.

    Attributes:
        model: A checkpoint folder or a hub id.
        data: The source for ``open_calibration``.
        limit: Samples at most.
        device: Of torch, or None for a GPU if there is one.
        dtype: Of the weights, a name of torch.
    """

    model: str
    data: str
    limit: int = 64
    device: str | None = None
    dtype: str = "float32"
