"""Scorers by the name that recipes use: those that ship, and those registered.

Importing this module does not import torch.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from vtprune_fx.errors import RecipeError

if TYPE_CHECKING:
    from torch import Tensor

    from vtprune_fx.scorers.evidence import Evidence

Rate = Callable[..., "Tensor"]
"""``(evidence, **options) -> scores``."""

Raters = Callable[["Tensor", "Tensor"], "Tensor"]
"""``(embeddings, roles) -> roles``."""


@dataclass(frozen=True)
class Scorer:
    """One way to rate visual tokens.

    Attributes:
        rate: ``(evidence, **options) -> [B, S]``. The visual tokens with the lowest
            scores are dropped; what it gives other tokens is not read. It is traced:
            no shape and no branch that depends on values, no tensor made of numbers.
        raters: ``(embeddings [B, S, E], roles [B, S]) -> roles``: run once on what
            enters the decoder; which text is instruction. None: all after the images.
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


class _BuiltIn(NamedTuple):
    """What is known of a scorer that ships, without importing torch.

    Attributes:
        rows: ``Scorer.rows``: of keys for dart, of the residual stream for divprune; of
            the vision tower none are counted.
        tower: ``Scorer.tower``.
    """

    rows: int | None = None
    tower: bool = False


_BUILT_IN = {
    # The name, that of a module in this package with ``rate`` and, if it has them,
    # ``raters``. A scorer that ships is that module and its line here.
    "dart": _BuiltIn(rows=8),
    "divprune": _BuiltIn(),
    "fitprune": _BuiltIn(),
    "inverted": _BuiltIn(),
    "last-token": _BuiltIn(rows=1),
    "random": _BuiltIn(rows=0),
    "sparsevlm": _BuiltIn(),
    "sparsevlm-plus": _BuiltIn(),
    "uniform": _BuiltIn(rows=0),
    "visionzip": _BuiltIn(rows=0, tower=True),
}

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
            expected="another name than those of scorers that ship",
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
    return Scorer(module.rate, raters, *_BUILT_IN[name])


def rows(name: str) -> int | None:
    """``Scorer.rows``, without importing torch."""
    return (_BUILT_IN.get(name) or _REGISTERED[name]).rows


def sees_tower(name: str) -> bool:
    """``Scorer.tower``, without importing torch."""
    found = _BUILT_IN.get(name) or _REGISTERED.get(name)
    return found is not None and found.tower


def rate_of(name: str, options: Mapping[str, object]) -> Callable[[Evidence], Tensor]:
    """A scorer with its options: ``Evidence -> scores [B, S]``."""
    return partial(scorer(name).rate, **options)
