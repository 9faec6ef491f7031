"""What a recipe does to a model of full size, from its configuration alone."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from vtprune_fx.api import explain
from vtprune_fx.errors import PlanError
from vtprune_fx.models.weightless import build, example_prompts, load_config
from vtprune_fx.planning.interface import PROMPT, Port
from vtprune_fx.recipes.counting import Cost, Geometry, cost

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from vtprune_fx.planning.interface import Interface
    from vtprune_fx.planning.plan import PlannedCut, PrunePlan
    from vtprune_fx.recipes.schema import Recipe

GIB = 2**30

BITS = {"float32": 32, "float16, bfloat16": 16, "int8": 8, "int4": 4}
"""Bits of a weight, by precision; scales of quantised weights come on top."""


@dataclass(frozen=True)
class FullSize:
    """A model of full size under a recipe.

    Attributes:
        config: The configuration that was asked for.
        model: The model's class.
        plan: The recipe's cuts, placed on the model's graph.
        geometry: Sizes of its decoder.
        cost: What one prompt costs.
        interface: Inputs and outputs of the pruned prefill graph.
        weights: Number of parameters.
    """

    config: str
    model: str
    plan: PrunePlan
    geometry: Geometry
    cost: Cost
    interface: Interface
    weights: int

    def tables(self) -> list[Table]:
        """Layers, the prefill graph's inputs and outputs, and bytes of weights."""
        return [self._layers(), self._ports(), self._weights()]

    def _layers(self) -> Table:
        plan = self.plan
        table = Table(
            title=f"{self.config} ({self.model}), {plan.layers} layers\n"
            f"{plan.recipe.name}: {plan.visual_tokens} visual tokens",
            caption="Lengths: cache of its keys and values, output of what it returns.",
            box=SIMPLE_HEAD,
        )
        for title in ("layer", "dropped", "new", "kept"):
            table.add_column(title, justify="right")
        for title in ("cut", "cache", "output"):
            table.add_column(title, no_wrap=True)
        cuts = {cut.attention.layer: cut for cut in plan.cuts}
        gone = 0
        for layer in range(plan.layers):
            cut, before = cuts.get(layer), gone
            gone = cut.dropped if cut else gone
            cached = gone if cut and cut.site == "before_layer" else before
            lengths = (_length(cached), _length(gone))
            table.add_row(str(layer), *self._cut(cut), *lengths)
        return table

    def _cut(self, cut: PlannedCut | None) -> tuple[str, ...]:
        if cut is None:
            return ("", "", "", "")
        kept = self.plan.visual_tokens - cut.dropped
        return (str(cut.drop), str(cut.new or ""), str(kept), cut.site)

    def _ports(self) -> Table:
        table = Table(title="An export's prefill graph", box=SIMPLE_HEAD)
        table.add_column("", no_wrap=True)
        table.add_column("name", overflow="fold")
        for title in ("type", "shape"):
            table.add_column(title, no_wrap=True)
        sides = (("takes", self.interface.inputs), ("returns", self.interface.outputs))
        for side, ports in sides:
            for index, port in enumerate(_cache_as_one(ports)):
                shape = escape(f"[{', '.join(port.shape)}]")
                table.add_row("" if index else side, port.name, port.dtype, shape)
        return table

    def _weights(self) -> Table:
        table = Table(
            title=f"Weights: {self.weights:,} numbers",
            caption="Without the scales of int8 and int4.",
            box=SIMPLE_HEAD,
        )
        for precision in BITS:
            table.add_column(precision, justify="right", no_wrap=True)
        sizes = (self.bytes_in(precision) / GIB for precision in BITS)
        table.add_row(*(f"{size:.1f} GiB" for size in sizes))
        return table

    def bytes_in(self, precision: str) -> int:
        """Bytes of all weights in one of the precisions that ``BITS`` lists."""
        return self.weights * BITS[precision] // 8

    def fields(self) -> dict[str, object]:
        """Cuts, inputs and outputs, and bytes of weights as JSON's types."""
        cuts = [
            {
                "layer": cut.attention.layer,
                "site": cut.site,
                "leave": cut.drop,
                "new": cut.new,
                "stay": self.plan.visual_tokens - cut.dropped,
                "gathered": [value.node for value in cut.live],
            }
            for cut in self.plan.cuts
        ]
        return {
            "config": self.config,
            "model": self.model,
            "cuts": cuts,
            **dataclasses.asdict(self.interface),
            "weights": self.weights,
            "weight_bytes": {name: self.bytes_in(name) for name in BITS},
        }


def explain_config(
    source: str, recipe: Recipe | None, visual_tokens: int | None, text_tokens: int
) -> FullSize:
    """Trace a model of full size on fake tensors and place a recipe on it.

    Args:
        source: A configuration, as ``weightless.load_config`` takes it.
        recipe: What to cut, or None for the default, stretched to the model's depth.
        visual_tokens: Visual tokens of the prompt; those of one image if left out.
        text_tokens: All its other tokens.

    Raises:
        CaptureError: The model does not export.
        InputError: The configuration, or a number of tokens, is not usable.
        AnatomyError: The model cannot be pruned.
        PlanError: The recipe does not fit the model.
    """
    config = load_config(source)
    geometry = Geometry.from_config(config)
    if recipe is not None and recipe.layers != geometry.layers:
        raise PlanError(
            f"recipe {recipe.name}, field layers",
            expected=f"{geometry.layers}, the layers of {source}",
            found=str(recipe.layers),
            fix="Omit the recipe for one that is stretched to the model, or fit "
            "one with `vtprune fit`.",
        )
    model = build(config)
    inputs = example_prompts(model, visual_tokens, text_tokens)
    with _quiet():
        found = explain(model, inputs, recipe)
    if found.refused is not None:
        raise found.refused
    assert found.plan is not None, "the prompt has an image"
    assert found.interface is not None, "there is a plan"
    taken = found.plan.visual_tokens
    return FullSize(
        config=source,
        model=found.model,
        plan=found.plan,
        geometry=geometry,
        cost=cost(found.plan.recipe, geometry, taken, text_tokens),
        interface=found.interface,
        weights=sum(weight.numel() for weight in model.parameters()),
    )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hide that the exporter was tested with another version of torch."""
    logger = logging.getLogger("transformers.exporters.utils")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _length(gone: int) -> str:
    return f"{PROMPT} - {gone}" if gone else PROMPT


def _cache_as_one(ports: Iterable[Port]) -> Iterator[Port]:
    """Ports; the keys and values of a cache, which differ in length alone, as one."""
    for cached, run in itertools.groupby(ports, key=_is_cached):
        if not cached:
            yield from run
            continue
        first, *_, last = run
        batch, heads, _, width = first.shape
        shape = (batch, heads, "as above", width)
        yield Port(f"{first.name} to\n{last.name}", first.dtype, shape)


def _is_cached(port: Port) -> bool:
    return port.name.startswith("past_key_values")
