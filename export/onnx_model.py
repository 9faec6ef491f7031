"""Running an exported folder on ONNX Runtime."""

from __future__ import annotations

import contextlib
import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.exporters import ExportMetadata, OnnxExporter
from transformers.exporters.runners.runner_onnx import OnnxModelRunner
from transformers.modeling_outputs import CausalLMOutputWithPast

from vtprune_fx.errors import ExportError, MissingDependencyError
from vtprune_fx.export import manifest
from vtprune_fx.export.graph_model import GraphModel
from vtprune_fx.export.graph_outputs import (
    KEEP_SETS,
    bare_metadata,
    causal_output_of,
    keep_sets_of,
)
from vtprune_fx.export.manifest import Manifest
from vtprune_fx.export.trust import COMPONENTS

if TYPE_CHECKING:
    import onnx_ir

_WEIGHTS_FOLDER = "session.model_external_initializers_file_folder_path"
"""ONNX Runtime's option for graphs that do not come from a file."""


def require_onnxruntime() -> None:
    """Check that ONNX Runtime and the packages that read ONNX files are installed.

    Raises:
        MissingDependencyError: One of them is not.
    """
    needed = ("onnxruntime", "onnx", "onnxscript")
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingDependencyError(
            "ONNX Runtime",
            expected=f"the package {missing[0]}",
            found="it is not installed",
            fix="Install `vtprune-fx[onnxruntime]`, or `vtprune-fx[onnxruntime-gpu]` "
            "for NVIDIA GPUs: one of them, not both.",
        )


class OnnxModel(GraphModel):
    """A pruned model on ONNX Runtime: ``generate`` as of any transformers model."""

    def show_keep_sets(self, folder: Path) -> None:
        """Make keep sets outputs of a prefill that was exported without ``keep_sets``.

        Args:
            folder: The folder that the model was loaded from.

        Raises:
            ExportError: The graph holds no keep sets.
        """
        if self.manifest.keep_sets:
            return
        program = OnnxExporter.load_program(folder / "prefill.onnx")
        made = {v.name: v for node in program.graph for v in node.outputs}
        drops = self.manifest.recipe.drops(self.manifest.visual_tokens)
        names = [f"{KEEP_SETS}{layer}" for layer in sorted(drops)]
        for name in names:
            if name not in made:
                raise manifest.refused(
                    folder, f"a value {name} in prefill.onnx", "none"
                )
        program.graph.outputs[:0] = [made[name] for name in names]
        # The session gets no path of a file, so it is given the weights' folder below.
        del program.meta["path"]
        options = session_options()
        options.add_session_config_entry(_WEIGHTS_FOLDER, str(folder.resolve()))
        self._prefill_graph = _session(
            program, self.manifest.precision, self.device, options
        )


class OnnxGraph(OnnxModelRunner):
    """Runs one graph on ONNX Runtime.

    Attributes:
        keep_sets: As in ``GraphRunner``.
    """

    def __init__(self, metadata: ExportMetadata, session: Any) -> None:
        super().__init__(metadata, session)
        self._outputs = [str(output.name) for output in session.get_outputs()]
        self.keep_sets: dict[int, Tensor] = {}

    def unflatten(self, outputs: list[Tensor]) -> CausalLMOutputWithPast:
        """Build the model's output from the graph's; keep sets are stored."""
        values = dict(zip(self._outputs, outputs, strict=True))
        self.keep_sets = keep_sets_of(values)
        return causal_output_of(values)


def session_options() -> Any:
    """Options for errors only: users can do nothing about unfolded constants."""
    import onnxruntime  # noqa: PLC0415 - an optional package

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return options


def open_onnx(folder: Path, contents: Manifest, device: str | None) -> OnnxModel:
    """Open a folder whose files were checked on ONNX Runtime.

    Args:
        folder: The export.
        contents: Its manifest.
        device: ``cpu`` or ``cuda``; left out, CUDA where it works.

    Raises:
        ExportError: The graphs are not safe to load, or ONNX Runtime does not run on
            ``device``, or lacks an operator of the graphs in their precision.
        MissingDependencyError: ONNX Runtime is not installed.
    """
    require_onnxruntime()
    from vtprune_fx.export.onnx_trust import check_graphs  # noqa: PLC0415 - reads ONNX

    check_graphs(folder)
    _check_offered(device)
    with refusing_operators(contents.precision):
        runners = {
            name: _opened(folder / f"{name}.onnx", contents.precision, device)
            for name in COMPONENTS
        }
    # ONNX Runtime falls back to the CPU without an error where CUDA does not load.
    runs_on = runners["decode"].device.type
    if device is not None and runs_on != torch.device(device).type:
        raise ExportError(
            f"device {device}",
            expected="ONNX Runtime to run on it",
            found=f"a session on {runs_on}",
            fix="Check that the CUDA libraries load, or run on the CPU.",
        )
    return OnnxModel(folder, contents, runners)


def _opened(path: Path, precision: str, device: str | None) -> OnnxGraph:
    program = OnnxExporter.load_program(path)
    return _session(program, precision, device, session_options())


def _session(
    program: onnx_ir.Model,
    precision: str,
    device: torch.device | str | None,
    options: object,
) -> OnnxGraph:
    graph = OnnxGraph.from_program(
        program, bare_metadata(precision), device, session_options=options
    )
    assert isinstance(graph, OnnxGraph), "annotated as the base class"
    return graph


def _check_offered(device: str | None) -> None:
    import onnxruntime  # noqa: PLC0415 - an optional package

    offered = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
    available = onnxruntime.get_available_providers()
    if device is None or offered.get(torch.device(device).type) in available:
        return
    raise ExportError(
        f"device {device}",
        expected="an execution provider of ONNX Runtime for it",
        found=", ".join(available),
        fix="Install `vtprune-fx[onnxruntime-gpu]`, or run on the CPU.",
    )


@contextlib.contextmanager
def refusing_operators(precision: str) -> Iterator[None]:
    """Name the operator that a provider lacks in a precision."""
    from onnxruntime.capi import onnxruntime_pybind11_state as states  # noqa: PLC0415 - optional

    try:
        yield
    except states.NotImplemented as error:
        found = re.search(r"implementation for (\S+)", str(error))
        raise ExportError(
            f"ONNX Runtime in {precision}",
            expected="every operator of the graphs",
            found=f"none for {found[1]}" if found else str(error),
            fix="Run it on another device, or export with --dtype float32.",
        ) from error
