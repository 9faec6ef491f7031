"""The driver: a graph is read, a recipe planned on it, and the passes carry it out."""

from __future__ import annotations

import copy
import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any

import sympy
from torch.export import ExportedProgram
from torch.fx import Graph, GraphModule
from torch.utils._sympy.value_ranges import ValueRanges

from vtprune_fx.analysis.anatomy import read
from vtprune_fx.errors import AnatomyError, PlanError
from vtprune_fx.graph.fakes import fake_mode_of, uncached_fakes
from vtprune_fx.graph.sizes import assume_at_least, size_hint
from vtprune_fx.graph.values import READ
from vtprune_fx.passes.pipeline import ExtraPass, Pipeline, default_pipeline
from vtprune_fx.planning.place import place
from vtprune_fx.planning.plan import PrunePlan
from vtprune_fx.planning.report import PruneReport
from vtprune_fx.recipes.default import default_recipe
from vtprune_fx.recipes.schema import Recipe

logger = logging.getLogger(__name__)


@functools.cache
def say_default(recipe: Recipe) -> None:
    """Warn, once for each, of a recipe that nobody chose."""
    logger.warning(
        "No recipe given: %s drops %d of %d visual tokens over %d layers. Give one "
        "that was fitted to the model to be sure of its answers.",
        recipe.name,
        sum(recipe.drops(recipe.visual_tokens).values()),
        recipe.visual_tokens,
        recipe.layers,
    )


def prune_graph(
    module: GraphModule,
    recipe: Recipe | None,
    visual_tokens: int | None = None,
    *,
    per_sample: bool = False,
    schedule: str | None = None,
    pipeline: Callable[[PrunePlan], Pipeline] = default_pipeline,
) -> PruneReport | None:
    """Prune a graph, in place.

    Args:
        module: ATen before dispatch, with a dynamic prompt length.
        recipe: What to cut, or None for the default that fits the model.
        visual_tokens: Of a sample that has any, where that is known better than from
            the sizes in the graph.
        per_sample: Let each sample drop its share, as ``place`` takes it.
        schedule: Name of the input with the numbers of a run, as ``place`` takes it.
        pipeline: Makes the passes that carry out a plan.

    Returns:
        What was done, or None where the graph places no image.

    Raises:
        AnatomyError: The graph lacks something that pruning needs.
        PlanError: The recipe does not fit the graph.
    """
    before = len(module.graph.nodes)
    anatomy = read(module.graph, visual_tokens)
    if anatomy is None:
        return None
    if recipe is None:
        recipe = default_recipe(len(anatomy.layers), anatomy.visual_tokens)
        say_default(recipe)
    plan = place(
        recipe, anatomy, module.graph, per_sample=per_sample, schedule=schedule
    )
    if plan.cuts:
        _check_leaves_two(module.graph, plan)
    with uncached_fakes(fake_mode_of(module.graph)):
        records = pipeline(plan).run(module)
    return PruneReport(plan, records, before, len(module.graph.nodes))


def prune_program(
    program: ExportedProgram,
    recipe: Recipe | None,
    passes: Sequence[ExtraPass] = (),
) -> tuple[ExportedProgram, PruneReport]:
    """A pruned copy of an exported program; weights are shared, not copied.

    Raises:
        AnatomyError: The program places no image, or lacks what pruning needs.
        PlanError: The recipe does not fit the program.
    """
    module = copy.deepcopy(program.graph_module)
    pipeline = functools.partial(default_pipeline, target="export", extra=passes)
    report = prune_graph(module, recipe, pipeline=pipeline)
    if report is None:
        raise AnatomyError(
            "exported program",
            expected="a model that places image features with masked_scatter",
            found="no visual tokens",
            fix="Export with an image among the inputs.",
        )
    pruned = ExportedProgram(
        root=module,
        graph=module.graph,
        graph_signature=program.graph_signature,
        state_dict=program.state_dict,
        range_constraints=_longer_than_cuts(program, report.plan, module),
        module_call_graph=program.module_call_graph,
        example_inputs=program.example_inputs,
        constants=program.constants,
        verifiers=program.verifiers,
    )
    return pruned, report


def _shortest_prompt(plan: PrunePlan) -> int:
    """Two tokens are left: a length of 1 would be a size that broadcasts."""
    return plan.needed + 2


def _check_leaves_two(graph: Graph, plan: PrunePlan) -> None:
    """Let the graph know how long a prompt is at least."""
    least = _shortest_prompt(plan)
    mask = next(node for node in graph.nodes if node.name in plan.visual)
    length = size_hint(mask.meta["val"].shape[1])
    if length < least:
        raise PlanError(
            f"recipe {plan.recipe.name}",
            expected=f"prompts of at least {least} tokens, of which two are left",
            found=f"{length} tokens, {plan.needed} of which are dropped",
            fix="Drop fewer, or prompt with more text.",
        )
    assume_at_least(graph, plan.tokens, least)


def _longer_than_cuts(
    program: ExportedProgram, plan: PrunePlan, module: GraphModule
) -> dict[sympy.Symbol, ValueRanges[Any]]:
    """The program's ranges, with a prompt of which the cuts keep something."""
    known = program.range_constraints
    holds = ValueRanges(_shortest_prompt(plan), known[plan.tokens].upper)
    return {**known, plan.tokens: holds, **_ranges_read(module)}


def _ranges_read(module: GraphModule) -> dict[sympy.Symbol, ValueRanges[Any]]:
    """Ranges of counts that are read from the data."""
    environment = fake_mode_of(module.graph).shape_env
    assert environment is not None, "the prompt's length is a symbol of it"
    values = (n.meta["val"] for n in module.graph.nodes if READ in n.meta)
    read = [value.node.expr for value in values]
    return {symbol: environment.var_to_range[symbol] for symbol in read}
