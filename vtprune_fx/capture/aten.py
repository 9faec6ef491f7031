"""Two front ends for the form that passes read: ATen operators before dispatch.

* ``export``: ``torch.export`` through transformers' exporter, which carries the patches
  that models need.
* ``lower``: the graph that Dynamo passes to a backend, traced to the same operators.
  Symbols and ``nn_module_stack`` survive.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim, ExportedProgram
from torch.fx import GraphModule, Interpreter
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.traceback import preserve_node_meta
from torch.utils import _pytree as pytree
from transformers import PreTrainedModel
from transformers.exporters import DynamoConfig, DynamoExporter

from vtprune_fx.capture.literal_length import EXAMPLE, free_length, literal_length
from vtprune_fx.capture.subclasses import parts, rebuilt, replaced
from vtprune_fx.errors import CaptureError, first_sentence
from vtprune_fx.models.encoding import FEATURES, encoded, token_axis
from vtprune_fx.models.ragged_attention import check_traceable


def export(model: PreTrainedModel, inputs: Mapping[str, object]) -> ExportedProgram:
    """Export a model with batch, prompt length and number of images dynamic.

    Args:
        model: An unmodified transformers model.
        inputs: The processor's output: ``input_ids`` [B, S], ``attention_mask``
            [B, S], pixel values [I, ...], I images in all. The program takes the
            inputs that ``encoding.encoded`` returns for it.

    Raises:
        CaptureError: There are no ``input_ids``, or the model does not export.
        InputError: The decoder's graph could not be pruned
            (``ragged_attention.check_traceable``).
    """
    check_traceable(model.config.get_text_config())
    with torch.no_grad():
        inputs = encoded(model, example(inputs))
    config = DynamoConfig(dynamic_shapes=dynamic_shapes(inputs))
    with images_as_one_sequence(model):
        try:
            return DynamoExporter().export_program(model, dict(inputs), config)[0]
        except (RuntimeError, torch._dynamo.exc.UserError) as error:
            raise CaptureError(
                f"torch.export of {type(model).__name__}",
                expected="a graph",
                found=first_sentence(error),
                fix="Check that the model runs on the same inputs, and that it was "
                "loaded with attn_implementation='sdpa' or 'eager'.",
            ) from error


def example(inputs: Mapping[str, object]) -> dict[str, Any]:
    """The inputs with at least two samples.

    ``torch.export`` takes a size of 1 for a constant: a single sample is repeated.
    """
    ids = inputs.get("input_ids")
    if not isinstance(ids, Tensor) or ids.dim() != 2:
        raise CaptureError(
            "inputs, field input_ids",
            expected="a tensor [batch, prompt]",
            found=f"fields {sorted(inputs)}" if ids is None else str(type(ids)),
            fix="Pass what the model's processor returns.",
        )
    if ids.shape[0] > 1:
        return dict(inputs)
    return {
        key: torch.cat([value, value]) if isinstance(value, Tensor) else value
        for key, value in inputs.items()
    }


def dynamic_shapes(inputs: Mapping[str, object]) -> dict[str, object]:
    """Which dimensions may vary: [batch, prompt] as in ``input_ids``, and images."""
    ids = inputs["input_ids"]
    assert isinstance(ids, Tensor), "checked in ``example``"
    batch, prompt, images = Dim("batch"), Dim("prompt"), Dim("images")
    shapes: dict[str, object] = {}
    for name, value in inputs.items():
        axis = token_axis(value, ids.shape)
        if name == FEATURES and isinstance(value, dict):
            shapes[name] = {
                kind: _rows_of(features, Dim(kind)) for kind, features in value.items()
            }
        elif axis is not None:
            shapes[name] = {axis - 1: batch, axis: prompt}
        else:
            shapes[name] = {0: images} if isinstance(value, Tensor) else None
    return shapes


def _rows_of(features: object, rows: Dim) -> object:
    """Dynamic shapes of an encoder's output, in the structure of ``torch.export``."""
    if isinstance(features, Tensor):
        return {0: rows}
    if isinstance(features, (list, tuple)):
        return [_rows_of(part, rows) for part in features]
    parts, _ = pytree.SUPPORTED_NODES[type(features)].flatten_fn(features)
    return [_rows_of(part, rows) for part in parts]


@contextlib.contextmanager
def images_as_one_sequence(model: PreTrainedModel) -> Iterator[None]:
    """Keep the number of images dynamic.

    LLaVA makes a list of its images' features and concatenates it, which fixes their
    number in a trace. With a projector that returns all images as one long image the
    list has one item, and the concatenation is the same tensor.
    """
    projector = getattr(model.base_model, "multi_modal_projector", None)
    if projector is None:
        yield
        return
    hook = projector.register_forward_hook(_join_images)
    try:
        yield
    finally:
        hook.remove()


def _join_images(module: object, args: object, features: Tensor) -> Tensor:
    """[I, P, E] to [1, I * P, E]."""
    return features.flatten(0, 1).unsqueeze(0)


def lower(module: GraphModule) -> GraphModule:
    """Trace Dynamo's graph to ATen operators, with the prompt's length as a symbol.

    Args:
        module: The graph that a ``torch.compile`` backend is called with.

    Returns:
        A graph whose inputs are the parts (``subclasses.parts``) of the graph's.

    Raises:
        AnatomyError: The length is a number that other sizes have too.
        CaptureError: Weights are shards of a tensor-parallel model.
    """
    examples = [
        node.meta[EXAMPLE] for node in module.graph.find_nodes(op="placeholder")
    ]
    _refuse_shards(examples)
    length = literal_length(module)
    if length is not None:
        freed = free_length(module, length)
        return _traced(freed, freed.inputs, freed.mode)
    context = torch._guards.TracingContext.try_get()
    mode = context.fake_mode if context else detect_fake_mode(examples)
    assert mode is not None, "Dynamo gives every graph a fake mode"
    with mode:
        fakes = [replaced(value, _fake_like) for value in examples]
    return _traced(Interpreter(module), fakes, mode)


def _refuse_shards(examples: Sequence[object]) -> None:
    """Refuse DTensors: their operators become each rank's operators at dispatch.

    Passes read operators before dispatch, where attention is still one operator.
    """
    if any(type(value).__name__ == "DTensor" for value in examples):
        raise CaptureError(
            "the model's weights",
            expected="complete tensors",
            found="DTensors: shards of a tensor-parallel model",
            fix="Load the complete model on each rank, without tp_plan, and split the "
            "data instead.",
        )


def _traced(
    interpreter: Interpreter, fakes: list[object], mode: FakeTensorMode
) -> GraphModule:
    def run(*given: object) -> object:
        return interpreter.run(*rebuilt(fakes, given))

    with mode, preserve_node_meta():
        trace = make_fx(run, tracing_mode="real", pre_dispatch=True)
        lowered: GraphModule = trace(*parts(fakes))
    return lowered


def _fake_like(value: object) -> object:
    """The same sizes in the backend's fake mode; Dynamo traced in another one."""
    if not isinstance(value, Tensor):
        return value
    return torch.empty_strided(
        value.size(), value.stride(), dtype=value.dtype, device=value.device
    )
