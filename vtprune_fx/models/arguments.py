"""Names of arguments: the cache's, which changed, and those that a model lacks.

A cache is an argument of ``forward`` and a field of its output. transformers up to 5.23
calls both ``past_key_values``, from 5.24 on ``cache``. All code that passes a cache to
a model, or takes one from it, gets the name here. Exported graphs use
``past_key_values``.
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
from collections.abc import Callable, Collection, Mapping
from typing import Any, cast

from transformers import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast

from vtprune_fx.errors import InputError

PAST = "past_key_values"
"""The name in exported graphs, and in transformers up to 5.23."""

CACHE_NAMES = ("cache", PAST)
"""All names, the newest first."""


def cache_argument(function: Callable[..., object]) -> str | None:
    """Name of the argument by which a function takes a cache, None if it takes none."""
    return _first_of(inspect.signature(function).parameters)


def cache_field(outputs: object) -> str | None:
    """Name of the field by which a model's output returns a cache."""
    if not dataclasses.is_dataclass(outputs):
        return None
    return _first_of({field.name for field in dataclasses.fields(outputs)})


def _first_of(names: Collection[str]) -> str | None:
    return next((name for name in CACHE_NAMES if name in names), None)


def cache_of(outputs: object) -> Any:
    """The ``Cache`` that a model returned, None if it returned none."""
    name = cache_field(outputs)
    return None if name is None else getattr(outputs, name)


def given_cache(arguments: Mapping[str, object]) -> Cache | None:
    """The cache among arguments of ``forward``, under any of its names.

    Raises:
        InputError: It is there under two names.
    """
    given = {n: arguments[n] for n in CACHE_NAMES if arguments.get(n) is not None}
    if len(given) > 1:
        raise InputError(
            " and ".join(given),
            expected="one cache",
            found="two, under the old and the new name of the argument",
            fix=f"Pass {CACHE_NAMES[0]} alone.",
        )
    return cast("Cache | None", next(iter(given.values()), None))


def causal_output(logits: object, cache: Cache) -> CausalLMOutputWithPast:
    """Logits and a cache as the output of transformers' language models.

    Args:
        logits: [B, S, vocabulary].
        cache: The filled cache.
    """
    name = cache_field(CausalLMOutputWithPast)
    assert name is not None, "it has had a cache under one of the names so far"
    made: Callable[..., CausalLMOutputWithPast] = CausalLMOutputWithPast
    return made(**{"logits": logits, name: cache})


def refuse_unknown(arguments: Mapping[str, object], known: Collection[str]) -> None:
    """Refuse arguments that nothing reads: a misspelt mask would be no mask.

    Args:
        arguments: What ``forward`` was called with.
        known: Names that it takes.

    Raises:
        InputError: There is another name among them.
    """
    unknown = sorted(arguments.keys() - set(known))
    if not unknown:
        return
    close = difflib.get_close_matches(unknown[0], known, n=1)
    raise InputError(
        f"argument {', '.join(unknown)}",
        expected="arguments that the model takes",
        found="a name that it does not know",
        fix=f"Did you mean {close[0]}?" if close else "Omit it.",
    )
