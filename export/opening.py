"""Loading an exported folder, and the records of the two targets of this package."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from vtprune_fx.errors import VtpruneError, first_sentence
from vtprune_fx.export.graph_model import GraphModel
from vtprune_fx.export.manifest import refused
from vtprune_fx.export.onnx_model import open_onnx
from vtprune_fx.export.target import (
    ExportTarget,
    TritonSupport,
    register_target,
    target_of,
)
from vtprune_fx.export.tensorrt_model import FORMAT, open_tensorrt
from vtprune_fx.export.triton_inputs import read_engines, read_onnx
from vtprune_fx.export.trust import held, trusted

register_target(
    ExportTarget(
        name="onnx",
        suffix=".onnx",
        open=open_onnx,
        shows_keep_sets=True,
        triton=TritonSupport("onnxruntime", read_onnx),
    )
)
register_target(
    ExportTarget(
        name=FORMAT,
        suffix=".engine",
        open=open_tensorrt,
        triton=TritonSupport("tensorrt", read_engines),
    )
)


def load(folder: Path, device: str | None = None) -> GraphModel:
    """Load an exported folder: an object with ``generate``.

    No code in the folder runs, and no file outside of it is read.

    Args:
        folder: A folder that ``vtprune export`` wrote.
        device: ``cpu`` or ``cuda``; left out, CUDA where it works. TensorRT engines
            run on CUDA alone.

    Raises:
        ExportError: The folder is incomplete or was changed, is not safe to load, is of
            a target that is not registered, or does not run on ``device``.
        MissingDependencyError: The runtime is not installed.
    """
    folder = Path(folder)
    with held(folder):
        contents = trusted(folder)
        with _naming_what_is_wrong(folder):
            model = target_of(folder, contents).open(folder, contents, device)
        _check_layers(folder, model)
    return model


@contextlib.contextmanager
def _naming_what_is_wrong(folder: Path) -> Iterator[None]:
    """Whatever a library says of the files in a folder becomes an error of ours."""
    try:
        yield
    except VtpruneError:
        raise
    except Exception as error:
        found = f"{type(error).__name__}: {first_sentence(error)}"
        raise refused(folder, "files that its runtime can read", found) from error


def _check_layers(folder: Path, model: GraphModel) -> None:
    expected = len(model.manifest.tokens_per_layer)
    found = model.config.get_text_config().num_hidden_layers
    if found != expected:
        raise refused(folder, f"config.json with {expected} layers", str(found)[:80])
