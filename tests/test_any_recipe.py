"""Any recipe on any batch: what is compiled is the oracle."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.tiny import (
    Compiled,
    assert_matches_oracle,
    batch,
    counted_positions,
    recipe_for,
    tiny_llava,
)
from vtprune_fx.recipes.schema import Recipe

LAYERS = 3
IMAGE = 16
"""Visual tokens of an image."""


@st.composite
def recipes(draw: st.DrawFn) -> Recipe:
    """Cuts in some layers, of at most one image's tokens in all."""
    left, drops = IMAGE, {}
    for layer in range(LAYERS):
        drop = draw(st.integers(0, left))
        if drop:
            drops[layer] = drop
            left -= drop
    return recipe_for(LAYERS, drops)


@st.composite
def prompts(draw: st.DrawFn, dropped: int) -> list[tuple[int, ...]]:
    """Samples with one image or two anywhere, and of text alone where that fits."""
    texts = st.integers(0, 9)
    behind = st.integers(1 if dropped < IMAGE else 2, 9)  # two tokens are left
    with_images = st.one_of(st.tuples(texts, behind), st.tuples(texts, texts, behind))
    samples: list[tuple[int, ...]] = [
        *draw(st.lists(with_images, min_size=1, max_size=3))
    ]
    longest = max(sum(s) + IMAGE * (len(s) - 1) for s in samples)
    if longest - dropped > 1 and draw(st.booleans()):
        alone = draw(st.integers(1, longest - dropped))
        samples.insert(draw(st.integers(0, len(samples))), (alone,))
    return samples


@pytest.mark.slow
@settings(
    max_examples=300,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)
@given(st.data())
def test_any_recipe_on_any_batch_is_the_oracle(data: st.DataObject) -> None:
    model = tiny_llava(layers=LAYERS)
    recipe = data.draw(recipes())
    dropped = sum(recipe.drops(IMAGE).values())
    torch.compiler.reset()
    compiled = Compiled(model, recipe)
    # The second batch runs in the graph of the first where their sizes allow it.
    for seed in range(2):
        inputs = batch(model, *data.draw(prompts(dropped)), seed=seed)
        inputs["position_ids"] = counted_positions(inputs)
        outputs = compiled(**inputs)
        kept = compiled.recorded.keep_sets
        assert_matches_oracle(outputs, kept, model, recipe, inputs)
