"""``prune``: from a model, or a program exported from one, to a pruned program.

``explain`` says beforehand what would be cut.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Interpreter, Node
from torch.utils import _pytree as pytree
from transformers import PreTrainedModel

from vtprune_fx.analysis.anatomy import read
from vtprune_fx.capture.aten import export
from vtprune_fx.errors import CaptureError, InputError, VtpruneError
from vtprune_fx.graph.stamps import STAMP, Stamp, StampKind
from vtprune_fx.models.arguments import refuse_unknown
from vtprune_fx.passes import ExtraPass
from vtprune_fx.planning.interface import interface
from vtprune_fx.planning.place import place
from vtprune_fx.planning.report import Explanation, PruneReport, in_prompt
from vtprune_fx.pruning import prune_program
from vtprune_fx.recipes.default import default_recipe
from vtprune_fx.recipes.loading import load_recipe
from vtprune_fx.recipes.schema import Recipe


@dataclass(frozen=True)
class PrunedProgram:
    """A pruned model, as ``torch.export`` sees it.

    Attributes:
        program: The pruned graph with the model's weights.
        report: What was cut where.
    """

    program: ExportedProgram
    report: PruneReport

    def __call__(self, **inputs: Any) -> Any:
        """Run it: what the model returns, with a ragged cache.

        Raises:
            InputError: An input is missing, or unknown.
        """
        _flat(self.program, inputs)
        with torch.no_grad():
            return self._module(**inputs)

    @functools.cached_property
    def _module(self) -> torch.nn.Module:
        """The program as a module: made once, since that costs more than a run."""
        return self.program.module()

    def keep_sets(self, **inputs: Any) -> dict[int, Tensor]:
        """Run it, and say which tokens are kept.

        Returns:
            For each layer with a cut, [B, K]: positions in the prompt as it came.

        Raises:
            InputError: An input is missing, or unknown.
        """
        recorder = KeepRecorder(self._module)
        with torch.no_grad():
            recorder.run(*_flat(self.program, inputs), enable_io_processing=False)
        return recorder.kept


class KeepRecorder(Interpreter):
    """Runs a pruned graph and notes its keep sets."""

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__(module)
        self._found: dict[int, Tensor] = {}

    @property
    def kept(self) -> dict[int, Tensor]:
        """The keep sets, as ``in_prompt`` says them."""
        return in_prompt(self._found)

    def run_node(self, n: Node) -> Any:
        """Run one node; note what it says of a cut."""
        result = super().run_node(n)
        stamp: Stamp | None = n.meta.get(STAMP)
        if stamp is not None and stamp.kind is StampKind.KEEP:
            self._found[stamp.layer] = result
        return result


def _flat(program: ExportedProgram, inputs: Mapping[str, Any]) -> list[Any]:
    """Keyword inputs as the flat arguments of the program's graph.

    Raises:
        InputError: An input is missing, or unknown.
    """
    spec = program.call_spec.in_spec
    assert spec is not None
    names = spec.children()[1].context
    refuse_unknown(inputs, names)
    if missing := [name for name in names if name not in inputs]:
        raise InputError(
            "inputs",
            expected=f"{', '.join(names)}, which the program was traced with",
            found=f"no {missing[0]}",
            fix="Pass what the processor returned, prepared as for the trace.",
        )
    return pytree.tree_leaves([inputs[name] for name in names])


def prune(
    model_or_program: PreTrainedModel | ExportedProgram,
    inputs: Mapping[str, Any] | None = None,
    recipe: str | Recipe | None = None,
    passes: Sequence[ExtraPass] = (),
) -> PrunedProgram:
    """Prune a model.

    Args:
        model_or_program: An unmodified transformers model, which is exported with
            ``inputs``, or a program that ``torch.export`` made of one with a dynamic
            prompt length. Neither is changed.
        inputs: An example, as the model's processor returns it. Batch, prompt length
            and number of images are dynamic. Only for a model.
        recipe: A recipe, the name of a shipped one, or a recipe file; left out, the
            default (``recipes.default_recipe``) stretched to the model.
        passes: Further passes, or what makes them of the plan: they run after those
            that prune, and are verified as these are.

    Raises:
        CaptureError: The model does not export, or ``inputs`` are missing.
        RecipeError: The recipe cannot be loaded.
        AnatomyError: The model has no visual tokens, or no decoder that can be pruned.
        PlanError: The recipe does not fit the model.
    """
    loaded = load_recipe(recipe) if recipe is not None else None
    if isinstance(model_or_program, ExportedProgram):
        program = model_or_program
    elif inputs is None:
        raise CaptureError(
            "prune",
            expected="example inputs to trace the model with",
            found="none",
            fix="Pass what the model's processor returns.",
        )
    else:
        program = export(model_or_program, inputs)
    pruned, report = prune_program(program, loaded, passes)
    return PrunedProgram(pruned, report)


def explain(
    model: PreTrainedModel,
    inputs: Mapping[str, Any],
    recipe: str | Recipe | None = None,
) -> Explanation:
    """Say which layers a model has, and which cuts a recipe would place where.

    The model is traced on fake tensors: nothing is computed, and nothing changed.

    Args:
        model: An unmodified transformers model.
        inputs: An example, as the model's processor returns it.
        recipe: What to cut, as ``prune`` takes it.

    Raises:
        CaptureError: The model does not export.
        RecipeError: The recipe cannot be loaded.
    """
    loaded = load_recipe(recipe) if recipe is not None else None
    program = export(model, inputs)
    graph = program.graph_module.graph
    name, anatomy = type(model).__name__, None
    try:
        anatomy = read(graph)
        if anatomy is None:
            return Explanation(name, None, None, None)
        wanted = loaded or default_recipe(len(anatomy.layers), anatomy.visual_tokens)
        plan = place(wanted, anatomy, graph)
    except VtpruneError as error:
        return Explanation(name, anatomy, None, error)
    ports = interface(program, anatomy, plan)
    return Explanation(name, anatomy, plan, None, ports)
