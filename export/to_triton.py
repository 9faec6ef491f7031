"""A model repository for NVIDIA Triton Inference Server, of an exported folder.

    REPO/NAME_prefill/config.pbtxt
    REPO/NAME_prefill/1/prefill.onnx        or prefill.engine, and its weights
    REPO/NAME_decode/...

Triton joins requests to a prefill into one batch if their prompts are equally long and
have one image each, so that every input and output has one row per request. Decode
requests are not joined: their caches differ in length, and joining caches would
copy them at every token.

The configuration follows Triton's ``model_config.proto``.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from vtprune_fx.errors import ExportError, InputError
from vtprune_fx.export.manifest import Manifest, hashes, refused
from vtprune_fx.export.target import GraphSpec, TensorSpec, target_of
from vtprune_fx.export.trust import trusted
from vtprune_fx.files import check_output, scratch_beside

_TYPES = {
    "INT64": "TYPE_INT64",
    "INT32": "TYPE_INT32",
    "BOOL": "TYPE_BOOL",
    "FLOAT": "TYPE_FP32",
    "FLOAT16": "TYPE_FP16",
    "BFLOAT16": "TYPE_BF16",
}

_FEATURES = "image_hidden_states"
"""Output of some models with a row per visual token, so not one per request."""


def write_triton(folder: Path, repository: Path, max_batch: int) -> list[Path]:
    """Write a model for each graph of an export into a repository.

    Files are linked where the disk allows it, else copied.

    Args:
        folder: An exported folder.
        repository: New, or with other models in it.
        max_batch: Prompts that Triton may join. With 0 it joins none: a request is a
            batch of prompts, with any number of images.

    Returns:
        The folders of the models.

    Raises:
        ExportError: The folder is incomplete or was changed, or Triton does not run it.
        InputError: The models exist already, the repository is in the exported folder
            or cannot be written to, or engines were built for fewer prompts.
        MissingDependencyError: The packages that read ONNX files are not installed.
    """
    check_output(repository, "folder to fill", inputs=[folder])
    contents = trusted(folder)
    target = target_of(folder, contents)
    if target.triton is None:
        raise ExportError(
            f"export {folder}",
            expected="a target that Triton runs",
            found=f"target {target.name!r}",
            fix="Export the same model with `vtprune export onnx`.",
        )
    graphs = target.triton.read(folder, contents, max_batch)
    name = folder.resolve().name
    models = {part: repository / f"{name}_{part}" for part in graphs}
    for model in models.values():
        _check_new(model)
    with scratch_beside(repository / name) as scratch:
        for part, model in models.items():
            joined = max_batch if part == "prefill" else 0
            file = f"{part}{target.suffix}"
            # A graph's weights are in files whose names begin with the graph's.
            files = [folder / n for n in contents.files if n.startswith(file)]
            text = configuration(
                model.name, target.triton.backend, file, graphs[part], joined
            )
            _write(scratch / part, files, text)
            _check_written(folder, scratch / part / "1", contents)
        for part, model in models.items():
            (scratch / part).rename(model)
    return list(models.values())


def configuration(
    name: str, backend: str, file: str, graph: GraphSpec, max_batch: int
) -> str:
    """A model's ``config.pbtxt``.

    Args:
        name: Name of the model and of its folder.
        backend: Triton's name of the runtime.
        file: Name of the graph's file.
        graph: Its inputs and outputs.
        max_batch: Requests that may be joined. Dimensions then omit the batch.
    """
    outputs = [t for t in graph.outputs if not (max_batch and t.name == _FEATURES)]
    lines = [
        f"name: {json.dumps(name)}",
        f"backend: {json.dumps(backend)}",
        f"default_model_filename: {json.dumps(file)}",
        f"max_batch_size: {max_batch}",
        *_tensors("input", graph.inputs, bool(max_batch)),
        *_tensors("output", outputs, bool(max_batch)),
    ]
    return "\n".join([*lines, *(["dynamic_batching { }"] if max_batch else []), ""])


def _tensors(kind: str, tensors: Iterable[TensorSpec], batched: bool) -> Iterable[str]:
    for tensor in tensors:
        dims = ", ".join(map(str, tensor.dims[batched:]))
        yield (
            f"{kind} {{ name: {json.dumps(tensor.name)} "
            f"data_type: {_type(tensor)} dims: [ {dims} ] }}"
        )


def _type(tensor: TensorSpec) -> str:
    if tensor.type not in _TYPES:
        raise ExportError(
            f"{tensor.name!r} of a graph",
            expected=f"a type among {', '.join(_TYPES)}",
            found=tensor.type or "none",
            fix="Write the folder again with `vtprune export`.",
        )
    return _TYPES[tensor.type]


def _check_new(model: Path) -> None:
    if os.path.lexists(model):
        raise InputError(
            f"model {model}",
            expected="a name that is not taken in the repository",
            found="one that exists already",
            fix="Remove it, or choose another --output. Nothing was changed.",
        )


def _check_written(folder: Path, version: Path, contents: Manifest) -> None:
    """Check that what was linked or copied is what was checked."""
    for name, digest in hashes(version).items():
        if digest != contents.files[name]:
            raise refused(folder, f"{name} as it was written", "another content")


def _write(model: Path, files: Iterable[Path], text: str) -> None:
    version = model / "1"
    version.mkdir(parents=True)
    (model / "config.pbtxt").write_text(text, encoding="utf-8")
    for file in files:
        try:
            os.link(file, version / file.name)
        except OSError:  # another disk, or one without links
            shutil.copyfile(file, version / file.name)
