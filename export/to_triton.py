"""A model repository for NVIDIA Triton Inference Server, of an exported folder.

    REPO/NAME_prefill/config.pbtxt
    REPO/NAME_prefill/1/prefill.onnx        or prefill.engine, and what lies beside it
    REPO/NAME_decode/...

Triton joins requests to a prefill into one batch where their prompts are equally long
and have one image each, so that every input and output has one row a request. Steps of
decoding are not joined: each request has a cache of its own, as long as what its prompt
left and it has said since, and joining caches would copy them at every token.

The configuration follows Triton's ``model_config.proto``.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers.exporters.base import EXPORT_MANIFEST_FILE

from vtprune_fx.errors import ExportError, InputError
from vtprune_fx.export.manifest import Manifest
from vtprune_fx.export.trust import trusted
from vtprune_fx.optional import optional

if TYPE_CHECKING:
    import onnx_ir

_TYPES = {
    "INT64": "TYPE_INT64",
    "INT32": "TYPE_INT32",
    "BOOL": "TYPE_BOOL",
    "FLOAT": "TYPE_FP32",
    "FLOAT16": "TYPE_FP16",
    "BFLOAT16": "TYPE_BF16",
}

_BACKENDS = {"onnx": "onnxruntime", "tensorrt": "tensorrt"}

_FEATURES = "image_hidden_states"
"""An output of some models with a row for each visual token, which no request owns."""


@dataclass(frozen=True)
class Tensor:
    """An input or output: its name, ONNX type and dimensions, -1 where they vary."""

    name: str
    type: str
    dims: tuple[int, ...]


@dataclass(frozen=True)
class Graph:
    """One graph of an export: its files, and what it takes and gives."""

    files: tuple[Path, ...]
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]


def write_triton(folder: Path, repository: Path, max_batch: int) -> list[Path]:
    """Write a model for each graph of an export into a repository.

    Files are linked where they can be, else copied.

    Args:
        folder: An exported folder.
        repository: New, or with other models in it.
        max_batch: Prompts that Triton may join. With 0 it joins none: requests bring
            batches of their own, with any number of images.

    Returns:
        The folders of the models.

    Raises:
        ExportError: The folder is no whole export, or Triton does not run it.
        InputError: The models are there already, or engines were built for fewer.
        MissingDependencyError: What reads ONNX files is not installed.
    """
    contents = trusted(folder)
    _check_runs(folder, contents)
    if contents.target == "onnx":
        _check_onnx(folder)
    graphs = _graphs(folder, contents, max_batch)
    name = folder.resolve().name
    models = {part: repository / f"{name}_{part}" for part in graphs}
    for model in models.values():
        _check_new(model)
    repository.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=repository, prefix=".") as scratch:
        for part, model in models.items():
            joined = max_batch if part == "prefill" else 0
            text = configuration(
                model.name, _BACKENDS[contents.target], graphs[part], joined
            )
            _write(Path(scratch) / part, graphs[part], text)
        for part, model in models.items():
            (Path(scratch) / part).rename(model)
    return list(models.values())


def configuration(name: str, backend: str, graph: Graph, max_batch: int) -> str:
    """A model's ``config.pbtxt``.

    Args:
        name: The model's, which is its folder's.
        backend: Triton's name of what runs it.
        graph: What it takes and gives.
        max_batch: Requests that may be joined. Dimensions then leave out the batch.
    """
    outputs = [t for t in graph.outputs if not (max_batch and t.name == _FEATURES)]
    lines = [
        f"name: {json.dumps(name)}",
        f"backend: {json.dumps(backend)}",
        f"default_model_filename: {json.dumps(graph.files[0].name)}",
        f"max_batch_size: {max_batch}",
        *_tensors("input", graph.inputs, bool(max_batch)),
        *_tensors("output", outputs, bool(max_batch)),
    ]
    return "\n".join([*lines, *(["dynamic_batching { }"] if max_batch else []), ""])


def _tensors(kind: str, tensors: Iterable[Tensor], batched: bool) -> Iterable[str]:
    for tensor in tensors:
        dims = ", ".join(map(str, tensor.dims[batched:]))
        yield (
            f"{kind} {{ name: {json.dumps(tensor.name)} "
            f"data_type: {_TYPES[tensor.type]} dims: [ {dims} ] }}"
        )


def _check_runs(folder: Path, contents: Manifest) -> None:
    if contents.target == "tensorrt" and "tensorrt" not in contents.packages:
        raise ExportError(
            f"export {folder}",
            expected="engines of full TensorRT, which Triton's TensorRT backend reads",
            found="engines of TensorRT for RTX",
            fix="Build them with `vtprune-fx[tensorrt]`, or export to ONNX.",
        )


def _check_onnx(folder: Path) -> None:
    """Check graphs ahead of reading what they take and give."""
    optional("onnx_ir", "onnx", "reading an ONNX export", "onnxruntime")
    from vtprune_fx.export.onnx_trust import check_graphs  # noqa: PLC0415 - reads ONNX

    check_graphs(folder)


def _check_new(model: Path) -> None:
    if model.exists():
        raise InputError(
            f"model {model}",
            expected="a name that is not taken in the repository",
            found="a folder that is there already",
            fix="Remove it, or name another --output. Nothing was changed.",
        )


def _graphs(folder: Path, contents: Manifest, max_batch: int) -> dict[str, Graph]:
    record = json.loads((folder / EXPORT_MANIFEST_FILE).read_text(encoding="utf-8"))
    found = {}
    for part, component in record["components"].items():
        # Weights lie beside a graph, under its name and what follows.
        names = sorted(n for n in contents.files if n.startswith(component["file"]))
        files = tuple(folder / name for name in names)
        if contents.target == "onnx":
            found[part] = Graph(files, *_of_onnx(files[0]))
        else:
            config = component["metadata"]["export_config"]
            found[part] = Graph(files, *_of_engine(config))
            _check_batch(config, max_batch)
    return found


def _check_batch(config: dict[str, Any], max_batch: int) -> None:
    """Joined prompts have one image each, and are no more than engines take."""
    largest = config["batch"][-1] if config["images"][0] == 1 else 0
    if max_batch > largest:
        raise InputError(
            "--max-batch",
            expected=f"at most {largest}, which the engines were built for",
            found=str(max_batch),
            fix="Name a smaller one, or export again with a larger --batch, and with "
            "--images from 1 on.",
        )


def _of_onnx(file: Path) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    import onnx_ir  # noqa: PLC0415 - an optional package

    graph = onnx_ir.load(file).graph

    def read(values: Iterable[onnx_ir.Value]) -> tuple[Tensor, ...]:
        return tuple(
            Tensor(
                str(value.name),
                value.dtype.name if value.dtype else "",
                tuple(n if isinstance(n, int) else -1 for n in value.shape or ()),
            )
            for value in values
        )

    return read(graph.inputs), read(graph.outputs)


def _of_engine(
    config: dict[str, Any],
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """What ``to_tensorrt`` recorded: types, and shapes at three sizes."""

    def read(tensors: dict[str, Any]) -> tuple[Tensor, ...]:
        return tuple(
            Tensor(
                name,
                tensor["type"],
                tuple(
                    n[0] if len(set(n)) == 1 else -1
                    for n in zip(*tensor["shapes"], strict=True)
                ),
            )
            for name, tensor in tensors.items()
        )

    return read(config["inputs"]), read(config["outputs"])


def _write(model: Path, graph: Graph, text: str) -> None:
    version = model / "1"
    version.mkdir(parents=True)
    (model / "config.pbtxt").write_text(text, encoding="utf-8")
    for file in graph.files:
        try:
            os.link(file, version / file.name)
        except OSError:  # another disk, or one without links
            shutil.copyfile(file, version / file.name)
