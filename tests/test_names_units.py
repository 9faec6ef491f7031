"""Names of arguments and outputs, whatever release of transformers is installed."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from transformers import DynamicCache

from vtprune_fx.errors import InputError
from vtprune_fx.export.graph_forward import graph_forward
from vtprune_fx.export.graph_outputs import causal_output_of, keep_sets_of
from vtprune_fx.models.arguments import (
    CACHE_NAMES,
    PAST,
    cache_argument,
    cache_field,
    cache_of,
    causal_output,
    given_cache,
    refuse_unknown,
)

if TYPE_CHECKING:
    from collections.abc import Callable


@dataclasses.dataclass
class Old:
    """As releases up to 5.23 return it."""

    logits: int = 1
    past_key_values: Any = "old"


@dataclasses.dataclass
class New:
    """As later releases do."""

    logits: int = 1
    cache: Any = "new"


@dataclasses.dataclass
class Bare:
    """Logits alone."""

    logits: int = 1


def takes_old(input_ids: int, past_key_values: Any = None) -> None:
    """As releases up to 5.23 take it."""


def takes_new(input_ids: int, cache: Any = None) -> None:
    """As later releases do."""


def takes_both(past_key_values: Any = None, cache: Any = None) -> None:
    """As a release in between might."""


def takes_none(input_ids: int) -> None:
    """No cache."""


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (takes_old, "past_key_values"),
        (takes_new, "cache"),
        (takes_both, "cache"),
        (takes_none, None),
    ],
)
def test_the_argument_that_takes_a_cache(
    function: Callable[..., Any], name: str | None
) -> None:
    assert cache_argument(function) == name


@pytest.mark.parametrize(
    ("outputs", "name", "cache"),
    [
        (Old(), "past_key_values", "old"),
        (New(), "cache", "new"),
        (Bare(), None, None),
        ((1, 2), None, None),
    ],
)
def test_the_field_that_returns_a_cache(
    outputs: object, name: str | None, cache: object
) -> None:
    assert cache_field(outputs) == name
    assert cache_of(outputs) == cache


@pytest.mark.parametrize("name", CACHE_NAMES)
def test_a_cache_is_found_under_any_name(name: str) -> None:
    cache = DynamicCache()
    assert given_cache({name: cache, "input_ids": 1}) is cache
    assert given_cache({name: None}) is None
    assert given_cache({}) is None


def test_a_cache_under_two_names_is_refused() -> None:
    both = {name: DynamicCache() for name in CACHE_NAMES}
    with pytest.raises(InputError, match="two, under the old and the new name"):
        given_cache(both)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"atention_mask": 1}, "Did you mean attention_mask?"),
        ({"zzz": 1}, "Omit it"),
        ({"zzz": 1, "aaa": 2}, "argument aaa, zzz"),
    ],
)
def test_an_unknown_argument_is_refused_with_one_close_to_it(
    given: dict[str, int], message: str
) -> None:
    known = ["attention_mask", "input_ids"]
    with pytest.raises(InputError, match=message.replace("?", r"\?")):
        refuse_unknown(given | {"input_ids": 1}, known)
    refuse_unknown({"input_ids": 1}, known)


def test_an_output_holds_logits_and_cache() -> None:
    cache = DynamicCache()
    outputs = causal_output("logits", cache)
    assert outputs.logits == "logits"
    assert cache_of(outputs) is cache


# ------------------------------------------------------------------ an export's outputs


def layer_values(layer: int, prefix: str = "") -> dict[str, torch.Tensor]:
    """Keys and values of a layer, each of its own number."""
    name = f"{prefix}past_key_values.layers.{layer}"
    return {
        f"{name}.keys": torch.full((1, 2, 3, 4), float(layer)),
        f"{name}.values": torch.full((1, 2, 3, 4), 100.0 + layer),
    }


@pytest.mark.parametrize("prefix", ["", "output."])
def test_outputs_are_read_off_their_names(prefix: str) -> None:
    # Eleven layers, the last first: 10 comes after 9 and not after 1.
    values = {"logits": torch.ones(1, 3, 5), "image_hidden_states": torch.ones(1)}
    for layer in reversed(range(11)):
        values |= layer_values(layer, prefix)
    outputs = causal_output_of(values)
    assert outputs.logits is values["logits"]
    layers = cache_of(outputs).layers
    assert [float(layer.keys.mean()) for layer in layers] == list(range(11))
    assert [float(layer.values.mean()) for layer in layers] == list(range(100, 111))
    assert cache_of(outputs).get_seq_length() == 3


def test_cached_tensors_are_not_copied() -> None:
    values = {"logits": torch.ones(1), **layer_values(0)}
    [layer] = cache_of(causal_output_of(values)).layers
    assert layer.keys is values["past_key_values.layers.0.keys"]
    assert layer.values is values["past_key_values.layers.0.values"]


def test_keep_sets_are_read_by_their_layer() -> None:
    values = {
        "keep_sets.3": torch.tensor([[0]]),
        "keep_sets.12": torch.tensor([[1]]),
        "logits": torch.ones(1),
    }
    found = keep_sets_of(values)
    assert sorted(found) == [3, 12]
    assert found[12] is values["keep_sets.12"]


# ----------------------------------------------------------------------- graph_forward


class Model:
    """What ``graph_forward`` needs of a model."""

    def forward(self, input_ids: Any, past_key_values: Any = None) -> Any:
        seen = SimpleNamespace(ids=input_ids, cache=past_key_values)
        self.seen = seen
        return Old(logits=input_ids, past_key_values=f"after {past_key_values}")


class Newer(Model):
    """The same under the new name."""

    def forward(self, input_ids: Any, cache: Any = None) -> Any:
        self.seen = SimpleNamespace(ids=input_ids, cache=cache)
        return New(logits=input_ids, cache=f"after {cache}")


@pytest.mark.parametrize("model", [Model(), Newer()], ids=["old name", "new name"])
def test_graphs_take_and_return_one_name(model: Any) -> None:
    with graph_forward(model):
        found = model.forward(input_ids=7, past_key_values="cache")
    assert found == {"logits": 7, PAST: "after cache"}
    assert (model.seen.ids, model.seen.cache) == (7, "cache")


def test_the_models_own_forward_is_back_afterwards() -> None:
    model: Any = Model()
    seen: list[bool] = []

    def fail() -> None:
        with graph_forward(model):
            seen.append("forward" in vars(model))
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert seen == [True]
    assert "forward" not in vars(model)
    assert isinstance(model.forward(input_ids=1), Old)


def test_a_forward_that_was_set_is_set_again() -> None:
    model: Any = Model()
    mine = model.forward
    model.forward = mine
    with graph_forward(model):
        assert model.forward is not mine
    assert vars(model)["forward"] is mine
