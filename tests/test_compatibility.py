"""What differs between releases of transformers: names, outputs, folders."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

import vtprune_fx
from examples import check_installation
from tests.test_onnx_safety import trust_again
from tests.tiny import CACHE, batch, recipe_for, tiny_llava
from vtprune_fx.errors import InputError
from vtprune_fx.export import load, manifest
from vtprune_fx.models.arguments import (
    cache_argument,
    cache_field,
    cache_of,
    given_cache,
)

pytestmark = pytest.mark.compat

OTHER = ({"cache", "past_key_values"} - {CACHE}).pop()
"""What another release calls the cache."""


def test_the_reference_model_answers_as_the_oracle_everywhere(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert check_installation.main("eager")
    lines = capsys.readouterr().out.splitlines()
    # Two batches with each kind of cache, one on ONNX Runtime, and the last line.
    assert len(lines) == 2 * 2 + 1 + 1
    assert all(line.endswith("same") for line in lines)


# ------------------------------------------------------------------- the cache's name


def takes_old(past_key_values: object = None) -> None: ...


def takes_new(cache: object = None) -> None: ...


@dataclasses.dataclass
class ReturnsOld:
    past_key_values: object = None


@dataclasses.dataclass
class ReturnsNew:
    cache: object = None


def test_both_names_are_known() -> None:
    assert cache_argument(takes_old) == cache_field(ReturnsOld()) == "past_key_values"
    assert cache_argument(takes_new) == cache_field(ReturnsNew()) == "cache"
    assert cache_argument(test_both_names_are_known) is None
    cache: Any = DynamicCache()
    assert cache_of(ReturnsOld(cache)) is cache_of(ReturnsNew(cache)) is cache
    assert given_cache({"past_key_values": cache, "cache": None}) is cache
    with pytest.raises(InputError, match="found two, under the old and the new name"):
        given_cache({"past_key_values": cache, "cache": cache})


def pruning_model() -> Any:
    return vtprune_fx.compile(
        tiny_llava(layers=2), recipe_for(2, {0: 3}), inner="eager"
    )


def test_a_compiled_model_takes_its_cache_by_either_name() -> None:
    model = pruning_model()
    inputs, token = batch(model, (3, 6)), torch.tensor([[5]])
    found = []
    try:
        for name in (CACHE, OTHER):
            with torch.no_grad():
                cache = cache_of(model(**inputs))
                found.append(model(input_ids=token, **{name: cache}).logits)
            assert cache.layers[0].held() == inputs["input_ids"].shape[1] + 1
    finally:
        vtprune_fx.undo(model)
    assert torch.equal(*found)


def test_an_export_takes_its_cache_by_either_name(onnx_folder: Path) -> None:
    model: Any = load(onnx_folder)
    text, token = torch.tensor([[1, 40, 41]]), torch.tensor([[5]])
    steps = [
        model(input_ids=token, **{name: cache_of(model(input_ids=text))}).logits
        for name in (CACHE, OTHER)
    ]
    longer = model(input_ids=torch.cat([text, token], dim=1)).logits[:, -1:]
    torch.testing.assert_close(steps[0], longer)
    assert torch.equal(*steps)


# ------------------------------------------------------------------- unknown arguments


def test_a_compiled_model_refuses_what_it_does_not_know() -> None:
    model = pruning_model()
    inputs = batch(model, (3, 6))
    try:
        with pytest.raises(InputError, match=r"atention_mask: .* mean attention_mask"):
            model(inputs["input_ids"], atention_mask=inputs["attention_mask"])
        with torch.no_grad():
            kept = model(**inputs).logits.shape[1]
    finally:
        vtprune_fx.undo(model)
    assert kept == inputs["input_ids"].shape[1] - 3, "it goes on pruning"


def test_a_program_refuses_what_it_does_not_know() -> None:
    model = tiny_llava(layers=2)
    inputs: dict[str, Tensor] = batch(model, (3, 6))
    pruned = vtprune_fx.prune(model, inputs, recipe_for(2, {0: 3}))
    with pytest.raises(InputError, match=r"pixel_value: .* mean pixel_values"):
        pruned(**inputs, pixel_value=inputs["pixel_values"])
    with pytest.raises(InputError, match="found no pixel_values"):
        pruned.keep_sets(**{n: v for n, v in inputs.items() if n != "pixel_values"})


@pytest.mark.parametrize(
    ("argument", "says"),
    [
        ({"pixel_value": torch.zeros(1)}, "mean pixel_values"),
        ({"labels": torch.zeros(1, 3)}, "labels: expected None, found a tensor"),
        ({"output_hidden_states": True}, "output_hidden_states: expected None or Fals"),
        ({"logits_to_keep": 1}, "logits_to_keep: expected None or 0, found 1"),
        ({"return_dict": False}, "return_dict: expected None or True, found False"),
        ({"inputs_embeds": torch.zeros(1)}, "inputs_embeds: expected None"),
    ],
)
def test_an_export_refuses_what_it_does_not_know_or_give(
    onnx_folder: Path, argument: dict[str, Any], says: str
) -> None:
    model: Any = load(onnx_folder)
    with pytest.raises(InputError, match=says):
        model(input_ids=torch.tensor([[1, 40, 41]]), **argument)


# ------------------------------------------------------------------- exported folders


def test_a_folder_of_another_release_runs(onnx_folder: Path, tmp_path: Path) -> None:
    """What it says about classes of outputs is not read, here of one that is not."""
    folder = shutil.copytree(onnx_folder, tmp_path / "onnx")
    described = json.loads((folder / "export.json").read_text(encoding="utf-8"))
    for component in described["components"].values():
        component["metadata"]["out_spec"] = json.dumps(
            [1, {"type": "transformers.no_module.NoOutput", "context": "[]"}]
        )
    (folder / "export.json").write_text(json.dumps(described), encoding="utf-8")
    trust_again(folder)
    text = torch.tensor([[1, 40, 41, 42]])
    models: list[Any] = [load(folder), load(onnx_folder)]
    options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False}
    ids, expected = (model.generate(text, **options) for model in models)
    assert torch.equal(ids, expected)


def test_a_folder_says_past_key_values_whatever_wrote_it(onnx_folder: Path) -> None:
    model: Any = load(onnx_folder)
    names = [spec.name for spec in model._prefill_graph.session.get_outputs()]
    layers = manifest.read(onnx_folder).recipe.layers
    cached = [
        f"past_key_values.layers.{layer}.{kind}"
        for layer in range(layers)
        for kind in ("keys", "values")
    ]
    assert sorted(names) == sorted(["logits", *cached])
