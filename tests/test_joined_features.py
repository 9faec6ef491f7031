"""What encoders return, as the decoder's graph gets it: one tensor for all images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import FuyuConfig, FuyuForCausalLM
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import ModelOutput

from tests import zoo
from vtprune_fx.models.encoding import FEATURES, encoded

WIDTH = zoo.WIDTH


@dataclass
class Needed(ModelOutput):
    """An output whose first field has no default, as that of timm's towers."""

    last_hidden_state: Tensor | None
    pooler_output: Tensor | list[Tensor] | None = None
    indicators: Tensor | None = None


def model_of(features: ModelOutput) -> Any:
    """A model whose encoder returns this."""
    model: Any = zoo.tiny("LLaVA-NeXT")

    def prepared(inputs: dict[str, Any]) -> dict[str, Any]:
        rest = {k: v for k, v in inputs.items() if k not in ("pixel_values", "sizes")}
        return rest | {FEATURES: {"image": features}}

    model._prepare_multimodal_encoder_kwargs_for_generation = prepared
    return model


def joined(features: ModelOutput) -> Any:
    inputs = {"input_ids": torch.ones(1, 4), "pixel_values": torch.zeros(2, 3, 4, 4)}
    return encoded(model_of(features), inputs, anyway=True)[FEATURES]["image"]


def rows(count: int, start: int = 0) -> Tensor:
    return torch.arange(start, start + count * WIDTH, dtype=torch.float32).view(
        count, WIDTH
    )


def test_a_list_of_images_becomes_one_tensor_in_order() -> None:
    images: Any = [rows(2), rows(3, 1000)]
    given = BaseModelOutputWithPooling(last_hidden_state=rows(9), pooler_output=images)
    found = joined(given)
    [all_rows] = found.pooler_output
    assert torch.equal(all_rows, torch.cat([rows(2), rows(3, 1000)]))
    # The encoder's states are no input of the graph: nothing reads them.
    assert found.last_hidden_state is None
    assert type(found) is BaseModelOutputWithPooling


def test_a_tensor_of_images_stays_as_it_is() -> None:
    given = BaseModelOutputWithPooling(pooler_output=rows(6).view(2, 3, WIDTH))
    assert joined(given).pooler_output is given.pooler_output


def test_a_field_that_must_be_given_is_none() -> None:
    found = joined(Needed(last_hidden_state=rows(9), pooler_output=rows(4)))
    assert found.last_hidden_state is None
    assert torch.equal(found.pooler_output, rows(4))


def test_what_a_model_reads_beside_the_features_is_kept() -> None:
    given = Needed(None, pooler_output=rows(4), indicators=rows(1))
    assert joined(given).indicators is given.indicators


@pytest.mark.parametrize("as_list", [True, False])
def test_without_pooled_features_the_states_are_the_features(*, as_list: bool) -> None:
    given: Any = [rows(2), rows(1)] if as_list else rows(3)
    found = joined(BaseModelOutputWithPooling(last_hidden_state=given))
    if as_list:
        [found_rows] = found.last_hidden_state
        assert torch.equal(found_rows, torch.cat(given))
    else:
        assert found.last_hidden_state is given
    assert found.pooler_output is None


def test_a_model_without_pooled_features_answers_from_them() -> None:
    """Fuyu's patches go straight into the decoder."""
    torch.manual_seed(0)
    config = FuyuConfig(
        text_config=zoo.text("persimmon"),
        image_size=8,
        patch_size=4,
        image_token_id=zoo.IMAGE,
    )
    model = FuyuForCausalLM(config)
    model.train(mode=False)
    ids = torch.tensor([[*[zoo.IMAGE] * 4, 5, 6, 7]])
    inputs: Any = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    pixels = torch.randn(1, 4, 48)
    with torch.no_grad():
        expected = model(**inputs, pixel_values=pixels).logits
        ready = encoded(model, inputs | {"pixel_values": pixels}, anyway=True)
        found = model(**ready).logits
    assert "pixel_values" not in ready
    torch.testing.assert_close(found, expected, atol=0, rtol=0)
