"""Scorers by the name that recipes use: those that ship, and those registered.

Importing this module does not import torch.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vtprune_fx.errors import RecipeError

if TYPE_CHECKING:
    from torch import Tensor

Rate = Callable[..., "Tensor"]
"""``(evidence, **options) -> scores``."""

Raters = Callable[["Tensor", "Tensor"], "Tensor"]
"""``(embeddings, roles) -> roles``."""


@dataclass(frozen=True)
class Scorer:
    """One way to rate visual tokens.

    Attributes:
        rate: ``(evidence, **options) -> [B, S]``. The visual tokens with the lowest
            scores leave; what it gives other tokens is not read. It must be traceable:
            no shape and no branch that depends on values, no tensor made of numbers.
        raters: ``(embeddings [B, S, E], roles [B, S]) -> roles``: run once on what
            enters the decoder; which text is instruction. None: all behind the images.
        rows: How many query rows of attention it computes, None for all: what ``cost``
            counts for it.
        tower: Whether it reads ``Evidence.class_attention``. The graph must then have
            the vision tower in it.
    """

    rate: Rate
    raters: Raters | None = None
    rows: int | None = None
    tower: bool = False

    def options(self) -> dict[str, object]:
        """Names and defaults of the options: ``rate``'s keyword-only parameters."""
        return {
            name: parameter.default
            for name, parameter in inspect.signature(self.rate).parameters.items()
            if parameter.kind is parameter.KEYWORD_ONLY
        }


_BUILT_IN: dict[str, int | None] = {
    # The module of that name in this package, and ``Scorer.rows`` (of keys for dart,
    # of the residual stream for divprune, of the vision tower for visionzip, which is
    # not counted).
    "dart": 8,
    "divprune": None,
    "fitprune": None,
    "inverted": None,
    "last-token": 1,
    "random": 0,
    "sparsevlm": None,
    "sparsevlm-plus": None,
    "uniform": 0,
    "visionzip": 0,
}

_OF_TOWER = frozenset({"visionzip"})
"""Those that read ``Evidence.class_attention``."""

_REGISTERED: dict[str, Scorer] = {}


def register_scorer(
    name: str,
    rate: Rate,
    raters: Raters | None = None,
    *,
    rows: int | None = None,
    tower: bool = False,
) -> None:
    """Let recipes use a scorer.

    Args:
        name: What recipes call it.
        rate: As in ``Scorer``. Its keyword-only parameters are options that a recipe
            may set, each with a number for a default.
        raters: As in ``Scorer``.
        rows: As in ``Scorer``.
        tower: As in ``Scorer``.

    Raises:
        RecipeError: A scorer that ships with vtprune has that name.
    """
    if name in _BUILT_IN:
        raise RecipeError(
            f"scorer {name!r}",
            expected="a name of its own",
            found="that of a scorer that ships with vtprune",
            fix="Register it under another name.",
        )
    _REGISTERED[name] = Scorer(rate, raters, rows, tower)


def is_built_in(name: str) -> bool:
    """Whether a scorer ships with vtprune."""
    return name in _BUILT_IN


def names() -> list[str]:
    """Names of all scorers, sorted."""
    return sorted({*_BUILT_IN, *_REGISTERED})


def scorer(name: str) -> Scorer:
    """The scorer of a name that ``names()`` lists. Imports torch."""
    if name in _REGISTERED:
        return _REGISTERED[name]
    module = importlib.import_module(f"vtprune_fx.scorers.{name.replace('-', '_')}")
    raters = getattr(module, "raters", None)
    return Scorer(module.rate, raters, _BUILT_IN[name], name in _OF_TOWER)


def rows(name: str) -> int | None:
    """``Scorer.rows``, without importing torch."""
    return _BUILT_IN[name] if name in _BUILT_IN else _REGISTERED[name].rows


def sees_tower(name: str) -> bool:
    """``Scorer.tower``, without importing torch."""
    return name in _OF_TOWER or (name in _REGISTERED and _REGISTERED[name].tower)


def rate_of(name: str, options: Mapping[str, object]) -> Callable[..., Tensor]:
    """A scorer with its options, a function of the fields of ``Evidence`` in turn.

    The passes trace it, so each is a tensor of its own.
    """
    evidence = importlib.import_module("vtprune_fx.scorers.evidence").Evidence
    found = scorer(name)

    def rate(*fields: object) -> Tensor:
        return found.rate(evidence(*fields), **options)

    return rate
