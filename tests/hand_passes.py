"""Recipes placed on hand-built graphs, and the passes made for them.

How a plan or a pass is made, and how a node that a pass inserted is found, is here and
nowhere else among the tests on hand-built graphs.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from tests.graphs import IMAGE, Inputs, Spec, decoder
from vtprune_fx.analysis.anatomy import Anatomy, read
from vtprune_fx.backend import add_schedule
from vtprune_fx.graph.stamps import STAMP
from vtprune_fx.passes import (
    AsyncChecks,
    CheckTokens,
    Form,
    GatherTokens,
    InsertScores,
    OwnLengths,
    Pass,
    ReadRows,
    RefreshValues,
    ShareAttention,
    ShiftKeys,
    StampKind,
    cut_nodes,
)
from vtprune_fx.planning.place import place
from vtprune_fx.planning.plan import PrunePlan
from vtprune_fx.recipes.schema import Cut, Provenance, Recipe, Site

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

ATEN: Form = "aten"
SCORE_OP: Form = "score_op"
CUT_OP: Form = "cut_op"
FORMS: tuple[Form, ...] = (ATEN, SCORE_OP, CUT_OP)

PASSES: dict[str, Callable[[PrunePlan, Form], Pass]] = {
    "AsyncChecks": lambda _plan, _form: AsyncChecks(),
    "InsertScores": InsertScores,
    "CheckTokens": lambda plan, _form: CheckTokens(plan),
    "GatherTokens": GatherTokens,
    "ShiftKeys": lambda plan, _form: ShiftKeys(plan),
    "ReadRows": lambda plan, _form: ReadRows(plan),
    "ShareAttention": lambda plan, _form: ShareAttention(plan),
    "OwnLengths": lambda plan, _form: OwnLengths(plan),
    "RefreshValues": lambda _plan, _form: RefreshValues(),
}
"""All passes by name, in the order in which they run."""


@dataclass(frozen=True)
class Case:
    """A graph, a recipe for it, and how cuts are written.

    Attributes:
        spec: Of the graph.
        drops: By layer, how many visual tokens leave.
        score: The scorer.
        site: Where in the layer.
        form: How cuts are written.
        per_sample: Whether each sample loses its own share.
        scheduled: Whether numbers come with each run, as the graph's first input.
        rules: By layer, rules by rank instead of numbers.
        fields: Other fields of the recipe.
    """

    spec: Spec = Spec()  # noqa: RUF009 - it is frozen
    drops: Mapping[int, int] = field(default_factory=dict)
    score: str = "uniform"
    site: Site = "after_attention"
    form: Form = ATEN
    per_sample: bool = False
    scheduled: bool = False
    rules: Mapping[int, Any] = field(default_factory=dict)
    fields: Mapping[str, Any] = field(default_factory=dict)

    @property
    def recipe(self) -> Recipe:
        """The recipe."""
        cuts = [Cut(layer=n, drop=d, site=self.site) for n, d in self.drops.items()]
        cuts += [Cut(layer=n, by_rank=r, site=self.site) for n, r in self.rules.items()]
        given: dict[str, Any] = {"positions": "kept", "of": None, **self.fields}
        return Recipe(
            schema_version=1,
            name="by-hand",
            method="custom",
            score=self.score,
            layers=self.spec.layers,
            visual_tokens=IMAGE,
            cuts=tuple(cuts),
            provenance=Provenance(source="this test"),
            **given,
        )

    def planned(self) -> tuple[GraphModule, PrunePlan]:
        """The graph, and the recipe placed on it."""
        return self.run()

    def run(self, *names: str) -> tuple[GraphModule, PrunePlan]:
        """A graph that some passes have written to; the caller may write to it."""
        module, plan = _snapshot(self, names)
        return copy.deepcopy(module), plan

    def pruned(self) -> GraphModule:
        """A graph that all passes which every front end runs have written to."""
        module, _ = self.run(*list(PASSES)[:6])
        return module


def earlier(name: str) -> list[str]:
    """The passes that run before one.

    Lengths are hidden from compilers, and values refreshed for exports: never both.
    """
    before = list(PASSES)[: list(PASSES).index(name)]
    return [n for n in before if name != "RefreshValues" or n != "OwnLengths"]


_SNAPSHOTS: dict[str, tuple[GraphModule, PrunePlan]] = {}
"""Graphs by their case and the passes that ran: to trace a score takes a second."""


def _snapshot(case: Case, names: tuple[str, ...]) -> tuple[GraphModule, PrunePlan]:
    key = f"{case} {names}"
    if key not in _SNAPSHOTS:
        if names:
            *earlier, last = names
            module, plan = case.run(*earlier)
            PASSES[last](plan, case.form)(module)
        else:
            module = decoder(case.spec)
            anatomy, graph, schedule = anatomy_of(module), module.graph, None
            if case.scheduled:
                schedule = add_schedule(graph, len(case.recipe.cuts))
            plan = place(
                case.recipe,
                anatomy,
                graph,
                per_sample=case.per_sample,
                schedule=schedule,
            )
        _SNAPSHOTS[key] = module, plan
    return _SNAPSHOTS[key]


def anatomy_of(module: GraphModule) -> Anatomy:
    """What the analysis finds; it must find something."""
    anatomy = read(module.graph)
    assert anatomy is not None
    return anatomy


def keep_node(module: GraphModule, layer: int) -> Node:
    """The keep set of a layer's cut."""
    return cut_nodes(module.graph)[layer].keep


def new_node(module: GraphModule, layer: int) -> Node:
    """The new tokens that a layer's cut makes."""
    new = cut_nodes(module.graph)[layer].new
    assert new is not None
    return new


def roles_node(module: GraphModule) -> Node:
    """The tokens' roles."""
    return next(iter(cut_nodes(module.graph).values())).roles


def node_named(module: GraphModule, name: str) -> Node:
    """The node of a name."""
    found: Node
    [found] = [node for node in module.graph.nodes if node.name == name]
    return found


class _Recorder(Interpreter):
    """Runs a graph node by node and remembers all values."""

    def __init__(self, module: GraphModule) -> None:
        super().__init__(module, garbage_collect_values=False)
        self.values: dict[Node, Any] = {}

    def run_node(self, n: Node) -> Any:
        """Run a node."""
        self.values[n] = super().run_node(n)
        return self.values[n]


def run(module: GraphModule, given: Inputs) -> tuple[Any, dict[Node, Any]]:
    """What a graph returns, and the value of each node."""
    recorder = _Recorder(module)
    with torch.no_grad():
        outputs = recorder.run(*given.values())
    return outputs, recorder.values


def keep_sets(module: GraphModule, given: Inputs) -> dict[int, Tensor]:
    """What a graph keeps at each cut."""
    _, values = run(module, given)
    found: dict[int, Tensor] = {}
    for node, value in values.items():
        if STAMP in node.meta and node.meta[STAMP].kind is StampKind.KEEP:
            found[node.meta[STAMP].layer] = value
    return found


def calls(module: GraphModule, *targets: object) -> list[Node]:
    """Nodes that call one of some operators."""
    return [node for node in module.graph.nodes if node.target in targets]
