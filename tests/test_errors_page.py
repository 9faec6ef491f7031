"""The catalogue of errors shows messages that are really produced."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from tests.tiny import calls, planned
from vtprune_fx import errors, prune
from vtprune_fx.capture.aten import example
from vtprune_fx.errors import VtpruneError
from vtprune_fx.export import manifest
from vtprune_fx.models.pictures import open_image
from vtprune_fx.optional import optional
from vtprune_fx.passes import Pass, Pipeline
from vtprune_fx.recipes.counting import LLAVA_1_5_7B, cost
from vtprune_fx.recipes.loading import load_recipe

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch.fx import GraphModule

PAGE = Path(__file__).parents[1] / "docs" / "errors.md"
RECIPE = "fitprune-llava-1.5-7b-60"


def _no_image() -> None:
    double = torch.export.export(torch.nn.ReLU(), (torch.zeros(2),))
    prune(double, recipe=RECIPE)


def _too_deep() -> None:
    shallow = dataclasses.replace(LLAVA_1_5_7B, layers=16)
    cost(load_recipe(RECIPE), shallow, 576, 75)


class _Careless(Pass):
    """Inserts a node the way that leaves ``meta`` empty."""

    def edit(self, module: GraphModule) -> bool:
        first = calls(module, torch.ops.aten.linear.default)[0]
        with module.graph.inserting_after(first):
            module.graph.call_function(torch.ops.aten.neg.default, (first,))
        return True


def _wrong_graph() -> None:
    module, plan = planned({0: 3})
    Pipeline(plan, _Careless()).run(module)


EXAMPLES: dict[str, Callable[[], object]] = {
    "RecipeError": lambda: load_recipe("fitprune-llava-1.5-7b-65"),
    "CaptureError": lambda: example({"pixel_values": torch.zeros(1, 3, 8, 8)}),
    "AnatomyError": _no_image,
    "PlanError": _too_deep,
    "VerifyError": _wrong_graph,
    "ExportError": lambda: manifest.read(Path("llava-60")),
    "InputError": lambda: open_image("cat.jpg"),
    "MissingDependencyError": lambda: optional(
        "no_such_module", "datasets", "data sets", "datasets"
    ),
}


def test_every_error_has_its_section() -> None:
    classes = {
        name
        for name, found in vars(errors).items()
        if isinstance(found, type) and issubclass(found, VtpruneError)
    }
    sections = re.findall(r"^## (\w+)$", PAGE.read_text(encoding="utf-8"), re.M)
    assert set(sections) == classes - {"VtpruneError"} == set(EXAMPLES)


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_message_shown_is_the_one_produced(name: str) -> None:
    with pytest.raises(getattr(errors, name)) as caught:
        EXAMPLES[name]()
    page = PAGE.read_text(encoding="utf-8")
    section = page.split(f"## {name}\n")[1].split("\n## ")[0]
    [shown] = re.findall(r"```text\n(.*?)```", section, re.DOTALL)
    assert " ".join(shown.split()) == " ".join(str(caught.value).split())
