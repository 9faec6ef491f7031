"""The ``torch.compile`` backend.

Call it by name or by itself, ``backend="vtprune"`` being the same::

    torch.compile(
        model, backend=vtprune_backend, options={"recipe": ...}, fullgraph=True
    )

The graph with the images is pruned and handed to an inner backend; every other graph
(text-only prompts, decode steps) goes there as it is.

With a dynamic prompt length, ``torch._dynamo.mark_dynamic(ids, 1)``, one graph serves
all prompts; without, Dynamo makes one for the first length and one for all others.
Inductor packs weights where its ``config.freezing`` is set, pruned graphs' too.
With ``fullgraph=True`` one graph has it all; without, Dynamo breaks it where
transformers compares the number of image placeholders with that of image features.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch._dynamo import lookup_backend
from torch._dynamo.exc import InvalidBackend
from torch._guards import detect_fake_mode
from torch._inductor import config
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, GraphModule
from transformers.utils.output_capturing import maybe_install_capturing_hooks

from vtprune_fx.capture.aten import lower
from vtprune_fx.capture.literal_length import places_images
from vtprune_fx.capture.subclasses import has_any, parts
from vtprune_fx.capture.weights import hold, lifted
from vtprune_fx.errors import InputError
from vtprune_fx.graph.fakes import fake_mode_of, lengths_from_data, uncached_fakes
from vtprune_fx.graph.stamps import cut_nodes
from vtprune_fx.passes import ExtraPass, Form, Target, default_pipeline
from vtprune_fx.planning.plan import PrunePlan
from vtprune_fx.planning.report import PruneReport
from vtprune_fx.pruning import prune_graph
from vtprune_fx.recipes.loading import load_recipe
from vtprune_fx.recipes.schema import Recipe

logger = logging.getLogger(__name__)

# A model's first call installs hooks, under a lock that Dynamo cannot trace. Installing
# them while it traces is as good.
torch.compiler.assume_constant_result(  # type: ignore[no-untyped-call]
    maybe_install_capturing_hooks
)

_OPTIONS = (
    "recipe",
    "inner",
    "mode",
    "visual_tokens",
    "per_sample",
    "schedule",
    "on_report",
    "on_dense",
    "passes",
)

Compiler = Callable[..., Callable[..., Any]]
"""What compiles a graph: ``(module, example_inputs, **kwargs) -> callable``."""


def vtprune_backend(
    module: GraphModule,
    example_inputs: list[Tensor],
    *,
    options: dict[str, Any] | None = None,
    **kwargs: Any,
) -> Callable[..., Any]:
    """Prune a graph and compile it with an inner backend.

    Args:
        module: Dynamo's graph.
        example_inputs: Dynamo's inputs.
        options: ``recipe``: a shipped name, a file, a ``Recipe``; left out, the default
            (``recipes.default_recipe``) stretched to the model, which is said once.
            ``inner`` and ``mode``: as ``inner_compiler`` takes them.
            ``visual_tokens``: of a sample that has any, or what returns their number;
                read from the graph's sizes if left out.
            ``per_sample``: let each sample drop its share, as ``planning.place`` does.
            ``schedule``: returns how many tokens each cut of the recipe drops in the
                next run, [cuts, 3] as ``PrunePlan.schedule``: no part of the graph.
            ``on_report``: called with a pruned graph's report after each run of it.
                ``on_dense``: called before a graph is compiled that is not pruned.
            ``passes``: further passes, as ``vtprune_fx.prune`` takes them.
        kwargs: For the inner backend; ``mode`` among them is that of ``torch.compile``.

    Raises:
        InputError: An option is unknown.
        RecipeError: The recipe cannot be loaded.
        AnatomyError: The graph lacks what pruning needs.
        PlanError: The recipe does not fit the graph.
    """
    options = dict(options or {})
    _check_known(options)
    mode = options.get("mode") or kwargs.pop("mode", None)
    inner = inner_compiler(options.get("inner", "inductor"), mode)
    given = options.get("recipe")
    recipe = None if given is None else load_recipe(given)
    # A mode may ask for CUDA graphs, which record no length that is a symbol.
    target: Target = "compile" if mode is None else "trace"
    found = _prune(module, recipe, target, options)
    if found is None:
        options.get("on_dense", bool)()
        return inner(module, example_inputs, **kwargs)
    pruned, report = found
    given = list(parts(example_inputs))
    if report.plan.schedule is not None:
        mode = detect_fake_mode(example_inputs) or fake_mode_of(pruned.graph)
        given.insert(0, _empty_schedule(len(report.plan.cuts), mode))
    with _tracing(pruned, report.plan, example_inputs), _inductor_settings():
        compiled = inner(pruned, given, **kwargs)
    if report.plan.schedule is not None:
        compiled = _with_schedule(compiled, options["schedule"])
    recorded = _recording(compiled, report, options.get("on_report"))
    if not has_any(example_inputs):
        return recorded
    return lambda *inputs: recorded(*parts(inputs))


def _with_schedule(
    compiled: Callable[..., Any], schedule: Callable[[], Tensor]
) -> Callable[..., Any]:
    """A compiled graph that gets its schedule, its first input, at each run."""
    return lambda *inputs: compiled(schedule(), *inputs)


def _empty_schedule(cuts: int, mode: FakeTensorMode) -> Tensor:
    numbers = torch.zeros(cuts, 3, dtype=torch.int64)
    return mode.from_tensor(numbers, static_shapes=True)


def add_schedule(graph: Graph, cuts: int) -> str:
    """Let a graph get the numbers of a run, [cuts, 3], as its first input."""
    with graph.inserting_before(next(iter(graph.nodes))):
        node = graph.placeholder("vtprune_schedule")
    node.meta["val"] = _empty_schedule(cuts, fake_mode_of(graph))
    return node.name


def _check_known(options: dict[str, Any]) -> None:
    if unknown := sorted(options.keys() - set(_OPTIONS)):
        raise InputError(
            "torch.compile options",
            expected=" or ".join(_OPTIONS),
            found=", ".join(unknown),
            fix="Options of the inner backend are not passed on.",
        )


@contextmanager
def _tracing(
    pruned: GraphModule, plan: PrunePlan, example_inputs: list[Tensor]
) -> Iterator[None]:
    """Let the inner backend trace a pruned graph in Dynamo's mode."""
    made_in = fake_mode_of(pruned.graph)
    mode = detect_fake_mode(example_inputs) or made_in
    if mode is not made_in:
        # A graph of a literal length. Its symbols would be taken for Dynamo's.
        for node in pruned.graph.nodes:
            node.meta.pop("unbacked_bindings", None)
    few = 2 * len(plan.cuts) < plan.layers
    # Most layers are then as long as others are, and worth being remembered.
    remembering = nullcontext() if few else uncached_fakes(mode)
    with remembering, lengths_from_data(mode):
        yield


def _inductor_settings() -> AbstractContextManager[None]:
    """Inductor as it is set, but for what does not suit pruned graphs.

    * Kernels after a cut all depend on the buffer that its length is read off. Each is
      tried with so many of them for fusion; few are enough for the same kernels.
    * Freezing lays convolutions' weights out anew, and then asks for the strides of the
      graph's outputs. Lengths after cuts are symbols that torch 2.13 has renamed by
      then, and ``torch.fx.Graph.materialize_symints`` looks for the names of before.
    """
    attempts = min(8, config.max_fusion_buffer_group_pairwise_attempts)
    patched: AbstractContextManager[None] = config.patch(
        max_fusion_buffer_group_pairwise_attempts=attempts,
        layout_optimization=config.layout_optimization and not config.freezing,
    )
    return patched


def _recording(
    compiled: Callable[..., Any],
    report: PruneReport,
    on_report: Callable[[PruneReport], None] | None,
) -> Callable[..., Any]:
    """Run a graph that returns its keep sets too, and report them."""
    cuts = len(report.plan.cuts)

    def run(*inputs: Any) -> list[Any]:
        values = list(compiled(*inputs))
        outputs, keep_sets = values[: len(values) - cuts], values[len(values) - cuts :]
        if on_report is not None:
            on_report(report.of_run(keep_sets))
        return outputs

    return run


def inner_compiler(inner: str | Compiler, mode: str | None) -> Compiler:
    """What compiles the pruned graph.

    Args:
        inner: A registered backend by its name, or a function.
        mode: A mode of inductor, which is then the inner backend: ``reduce-overhead``,
            ``max-autotune``, ...

    Raises:
        InputError: There is no such backend, or no such mode of it.
    """
    if callable(inner):
        return inner
    if mode is not None:
        return _in_mode(inner, mode)
    try:
        compiler: Compiler = lookup_backend(inner)
    except InvalidBackend as error:
        raise InputError(
            "inner backend",
            expected=" or ".join(torch.compiler.list_backends()),
            found=inner,
            fix="Leave it out for inductor.",
        ) from error
    return compiler


def _in_mode(inner: str, mode: str) -> Compiler:
    modes = torch._inductor.list_mode_options()
    if inner != "inductor" or mode not in modes:
        raise InputError(
            f"mode of the inner backend {inner}",
            expected=f"one of inductor's, {', '.join(modes)}",
            found=mode,
            fix="Leave the mode out.",
        )
    return functools.partial(torch._inductor.compile, options=modes[mode])


def _prune(
    module: GraphModule,
    recipe: Recipe | None,
    target: Target,
    options: Mapping[str, Any],
) -> tuple[GraphModule, PruneReport] | None:
    """The pruned graph, which returns its keep sets too; None if nothing is pruned."""
    if not places_images(module):
        return None
    given, weights = lifted(module)
    lowered = lower(given)
    extra: Sequence[ExtraPass] = options.get("passes", ())
    pipeline = functools.partial(
        default_pipeline, form=_form_for(lowered), target=target, extra=extra
    )
    schedule = None
    if recipe is not None and options.get("schedule") is not None:
        schedule = add_schedule(lowered.graph, len(recipe.cuts))
    visual = options.get("visual_tokens")
    report = prune_graph(
        lowered,
        recipe,
        visual() if callable(visual) else visual,
        per_sample=bool(options.get("per_sample")),
        schedule=schedule,
        pipeline=pipeline,
    )
    if report is None:
        logger.info("not pruned: the graph places no image")
        return None
    logger.info("%s", report)
    _return_keep_sets(lowered, report.plan)
    hold(lowered, weights)
    return lowered, report


def _form_for(module: GraphModule) -> Form:
    """Compile time counts on a CPU, launches on what else there is."""
    inputs = module.graph.find_nodes(op="placeholder")
    values = (node.meta.get("val") for node in inputs)
    devices = {value.device.type for value in values if isinstance(value, Tensor)}
    return "cut_op" if devices == {"cpu"} else "score_op"


def _return_keep_sets(module: GraphModule, plan: PrunePlan) -> None:
    """Let a graph return its keep sets, after its outputs."""
    found = cut_nodes(module.graph)
    keep_sets = [found[cut.attention.layer].keep for cut in plan.cuts]
    [output] = module.graph.find_nodes(op="output")
    output.args = ((*output.args[0], *keep_sets),)
    module.recompile()
