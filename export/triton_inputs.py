"""What the graphs of an export take and return, for Triton's configuration."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

from transformers.exporters.base import EXPORT_MANIFEST_FILE

from vtprune_fx.errors import ExportError, InputError
from vtprune_fx.export.manifest import Manifest, refused
from vtprune_fx.export.target import GraphSpec, TensorSpec
from vtprune_fx.export.trust import COMPONENTS
from vtprune_fx.models.fields import read_fields
from vtprune_fx.optional import optional

if TYPE_CHECKING:
    import onnx_ir


class _Recorded(TypedDict):
    """An input or output of an engine: its type, and its shape at three sizes."""

    type: str
    shapes: list[list[int]]


class _EngineRecord(TypedDict):
    """What ``to_tensorrt`` recorded of an engine."""

    batch: list[int]
    images: list[int]
    inputs: dict[str, _Recorded]
    outputs: dict[str, _Recorded]


def read_onnx(folder: Path, contents: Manifest, max_batch: int) -> dict[str, GraphSpec]:
    """Read inputs and outputs from ONNX graphs, after checking the graphs.

    Raises:
        ExportError: The graphs are not safe to load.
        MissingDependencyError: The packages that read ONNX files are not installed.
    """
    optional("onnx_ir", "onnx", "reading an ONNX export", "onnxruntime")
    import onnx_ir  # noqa: PLC0415 - an optional package

    from vtprune_fx.export.onnx_trust import check_graphs  # noqa: PLC0415 - reads ONNX

    check_graphs(folder)
    found = {}
    for name in COMPONENTS:
        graph = onnx_ir.load(folder / f"{name}.onnx").graph
        found[name] = GraphSpec(_of_values(graph.inputs), _of_values(graph.outputs))
    return found


def _of_values(values: Iterable[onnx_ir.Value]) -> tuple[TensorSpec, ...]:
    return tuple(
        TensorSpec(
            str(value.name),
            value.dtype.name if value.dtype else "",
            tuple(n if isinstance(n, int) else -1 for n in value.shape or ()),
        )
        for value in values
    )


def read_engines(
    folder: Path, contents: Manifest, max_batch: int
) -> dict[str, GraphSpec]:
    """Read inputs and outputs from what was recorded when engines were built.

    Raises:
        ExportError: The engines are TensorRT for RTX's, which Triton does not run.
        InputError: The engines were built for fewer prompts than ``max_batch``.
    """
    if "tensorrt" not in contents.packages:
        raise ExportError(
            f"export {folder}",
            expected="engines of full TensorRT, which Triton's TensorRT backend reads",
            found="engines of TensorRT for RTX",
            fix="Build them with `vtprune-fx[tensorrt]`, or export to ONNX.",
        )
    fields = read_fields(folder / EXPORT_MANIFEST_FILE)
    found = {}
    for name in COMPONENTS:
        record: _EngineRecord = fields["components"][name]["metadata"]["export_config"]
        try:
            largest = record["batch"][-1] if record["images"][0] == 1 else 0
            inputs, outputs = _recorded(record["inputs"]), _recorded(record["outputs"])
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            expected = f"export.json to say what {name}.engine takes and returns"
            raise refused(folder, expected, repr(error)[:300]) from error
        _check_batch(largest, max_batch)
        found[name] = GraphSpec(inputs, outputs)
    return found


def _check_batch(largest: int, max_batch: int) -> None:
    """Check that engines take as many joined prompts, which have one image each."""
    if max_batch > largest:
        raise InputError(
            "--max-batch",
            expected=f"at most {largest}, which the engines were built for",
            found=str(max_batch),
            fix="Choose a smaller number, or export again with a larger --batch, and "
            "with --images from 1 on.",
        )


def _recorded(tensors: Mapping[str, _Recorded]) -> tuple[TensorSpec, ...]:
    return tuple(
        TensorSpec(
            name,
            tensor["type"],
            tuple(
                sizes[0] if len(set(sizes)) == 1 else -1
                for sizes in zip(*tensor["shapes"], strict=True)
            ),
        )
        for name, tensor in tensors.items()
    )
