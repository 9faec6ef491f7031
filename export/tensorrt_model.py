"""Running an exported folder of TensorRT engines, with transformers' generation.

Engines read and write the memory of torch tensors, on torch's current stream: only what
is in the wrong place, of the wrong type or not contiguous is copied.
"""

from __future__ import annotations

import mmap
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeAlias

import torch
from torch import Tensor
from transformers.exporters import (
    ExportMetadata,
    OnnxConfig,
    OnnxExporter,
    register_backend,
)
from transformers.exporters.runners.base import ModelRunner
from transformers.exporters.utils import onnx_inputs
from transformers.modeling_outputs import CausalLMOutputWithPast

from vtprune_fx.errors import ExportError, InputError
from vtprune_fx.export.graph_model import GraphModel
from vtprune_fx.export.graph_outputs import bare_metadata, causal_output_of
from vtprune_fx.export.manifest import Manifest, refused
from vtprune_fx.export.tensorrt_library import library, log, version
from vtprune_fx.export.tensorrt_types import Engine
from vtprune_fx.export.trust import COMPONENTS
from vtprune_fx.models.fields import read_fields

Buffer: TypeAlias = bytes | mmap.mmap
"""A serialised engine."""

FORMAT = "tensorrt"
"""What transformers calls exports of this kind."""

OUTPUTS = "outputs"
"""Where an engine's record has its outputs in order, which the engine does not say."""

_TYPES = {
    "FLOAT": torch.float32,
    "HALF": torch.float16,
    "BF16": torch.bfloat16,
    "INT64": torch.int64,
    "INT32": torch.int32,
    "BOOL": torch.bool,
}


class TensorRTModel(GraphModel):
    """A pruned model on TensorRT: ``generate`` as of any transformers model.

    Inputs and outputs of its graphs are those of an ONNX export, without keep sets.
    """


class TensorRTRunner(ModelRunner):
    """Runs one engine.

    Calls must not overlap: an engine has one execution context here.

    Args:
        metadata: ``export_config`` holds the outputs' names in order.
        engine: The engine.
        device: Where it runs.

    Attributes:
        keep_sets: None: engines do not return them.
    """

    keep_sets: Mapping[int, Tensor] = MappingProxyType({})

    def __init__(
        self, metadata: ExportMetadata, engine: Engine, device: torch.device
    ) -> None:
        super().__init__(metadata)
        self._engine, self._device = engine, device
        self._context = engine.create_execution_context()
        outputs = list(metadata.export_config[OUTPUTS])
        names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        self._inputs = [name for name in names if name not in outputs]
        self._outputs = outputs

    @property
    def device(self) -> torch.device:
        """Where the engine runs."""
        return self._device

    @classmethod
    def from_program(
        cls,
        program: Buffer,
        metadata: ExportMetadata,
        device: torch.device | str | None = None,
    ) -> TensorRTRunner:
        """As in the base class; the program is a serialised engine."""
        place = torch.device("cuda" if device is None else device)
        if place.index is None and place.type == "cuda":
            place = torch.device("cuda", torch.cuda.current_device())
        return cls(metadata, _deserialized(program, place), place)

    def __call__(
        self, share_inputs: bool = True, share_outputs: bool = False, **kwargs: object
    ) -> CausalLMOutputWithPast:
        """Run the engine on the traced forward's arguments.

        Returns:
            The model's output, in newly allocated memory.

        Raises:
            InputError: An input is missing, or of a size the engine was not built for.
            ExportError: TensorRT does not run.
        """
        held = [self._bind_input(*item) for item in self._named_inputs(kwargs).items()]
        outputs = [self._bind_output(name) for name in self._outputs]
        if not self._context.execute_async_v3(_stream(self._device)):
            raise _does_not(f"run on {self._device}")
        del held  # read by then, as torch's allocator sees it: in the stream's order
        return causal_output_of(dict(zip(self._outputs, outputs, strict=True)))

    def _named_inputs(self, kwargs: Mapping[str, object]) -> dict[str, Tensor]:
        values: dict[str, Tensor] = onnx_inputs(self._inputs, dict(kwargs))
        missing = [name for name in self._inputs if name not in values]
        if missing:
            raise InputError(
                "inputs",
                expected=", ".join(self._inputs),
                found=f"no {missing[0]}",
                fix="Pass what the model's processor returns.",
            )
        return values

    def _bind_input(self, name: str, value: Tensor) -> Tensor:
        dtype = _TYPES[self._engine.get_tensor_dtype(name).name]
        value = value.to(self._device, dtype).contiguous()
        self._check_size(name, tuple(value.shape))
        if not self._context.set_input_shape(name, tuple(value.shape)):
            raise _does_not(f"take {name} of shape {tuple(value.shape)}")
        return self._bind(name, value)

    def _check_size(self, name: str, shape: tuple[int, ...]) -> None:
        least, _, most = map(tuple, self._engine.get_tensor_profile_shape(name, 0))
        fits = len(shape) == len(least) and all(
            a <= size <= b for a, size, b in zip(least, shape, most, strict=True)
        )
        if not fits:
            raise InputError(
                f"input {name}",
                expected=f"a shape from {least} to {most}, which the engine was built "
                "for",
                found=str(shape),
                fix="Export again with --batch, --prompt, --images or --new-tokens to "
                "fit.",
            )

    def _bind_output(self, name: str) -> Tensor:
        shape = tuple(self._context.get_tensor_shape(name))
        dtype = _TYPES[self._engine.get_tensor_dtype(name).name]
        value = torch.empty(shape, dtype=dtype, device=self._device)
        self._bind(name, value)
        return value

    def _bind(self, name: str, value: Tensor) -> Tensor:
        """Set a tensor's address; TensorRT wants one for an empty tensor too."""
        held = value if value.numel() else value.new_empty(1)
        if not self._context.set_tensor_address(name, held.data_ptr()):
            raise _does_not(f"take the memory of {name}")
        return held


class TensorRTFormat(OnnxExporter):
    """How transformers' ``ExportedModel`` writes engines, and reads them.

    What it exports is the graph that ``to_tensorrt`` builds an engine of.
    """

    export_format: Any = FORMAT
    config_class = OnnxConfig
    program_suffix = ".engine"

    @classmethod
    def save_program(cls, program: Any, path: str | Path) -> None:
        """Write one engine."""
        Path(path).write_bytes(program)

    @classmethod
    def load_program(cls, path: str | Path) -> Any:
        """One engine, mapped from its file: nothing is read yet."""
        with Path(path).open("rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    @classmethod
    def program_files(cls, filename: str) -> list[str]:
        """An engine holds its weights."""
        return [filename]


register_backend(TensorRTFormat, TensorRTRunner)


def open_tensorrt(
    folder: Path, contents: Manifest, device: str | None
) -> TensorRTModel:
    """Open a folder of engines whose files were checked.

    Args:
        folder: The export.
        contents: Its manifest.
        device: A CUDA device; left out, the current one.

    Raises:
        ExportError: There is no such device, or the engines are another TensorRT's.
        MissingDependencyError: TensorRT is not installed.
    """
    [(name, number)] = version().items()
    if name not in contents.packages:
        raise ExportError(
            f"export {folder}",
            expected=f"engines of {name} {number}, which is installed",
            found="engines of another TensorRT package",
            fix="Install the one that built them, or build them again.",
        )
    _check_device(device)
    runners = {
        name: TensorRTRunner.from_program(
            TensorRTFormat.load_program(folder / f"{name}.engine"),
            _metadata(folder, name, contents.precision),
            device,
        )
        for name in COMPONENTS
    }
    return TensorRTModel(folder, contents, runners)


def _metadata(folder: Path, name: str, precision: str) -> ExportMetadata:
    """What a runner needs: an engine does not know the order of its outputs."""
    try:
        fields = read_fields(folder / "export.json")
        outputs = fields["components"][name]["metadata"]["export_config"][OUTPUTS]
        names = [str(output) for output in outputs]
    except (OSError, ValueError, KeyError, TypeError) as error:
        expected = f"export.json to name the outputs of {name}.engine"
        raise refused(folder, expected, repr(error)) from error
    metadata = bare_metadata(precision)
    metadata.export_config = {OUTPUTS: names}
    return metadata


def _check_device(device: str | None) -> None:
    wrong = device is not None and torch.device(device).type != "cuda"
    if wrong or not torch.cuda.is_available():
        raise ExportError(
            f"device {device or 'cuda'}",
            expected="a CUDA device, where engines run",
            found="another kind" if wrong else "no CUDA device that works",
            fix="Run on a machine with an NVIDIA GPU, or export for ONNX Runtime.",
        )


def _deserialized(plan: Buffer, device: torch.device) -> Engine:
    with torch.cuda.device(device):
        log().errors.clear()
        runtime = library().Runtime(log())
        engine: Engine | None = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        raise _does_not(f"read the engine with {version()} on {device}")
    return engine


def _does_not(what: str) -> ExportError:
    return ExportError(
        "TensorRT",
        expected=f"it to {what}",
        found=log().errors[0] if log().errors else "that it does not",
        fix="Build the engines again, with this TensorRT and for this GPU.",
    )


def _stream(device: torch.device) -> int:
    """Handle of torch's current stream; 0 where there are none."""
    if device.type != "cuda":
        return 0
    return int(torch.cuda.current_stream(device).cuda_stream)
