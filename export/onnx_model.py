"""Running an exported folder on ONNX Runtime, with transformers' own generation."""

from __future__ import annotations

import contextlib
import importlib.util
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    Cache,
    DynamicCache,
    GenerationConfig,
    GenerationMixin,
    PreTrainedModel,
)
from transformers.exporters import ExportMetadata, OnnxExporter
from transformers.exporters.runners.base import ModelRunner
from transformers.exporters.runners.runner_onnx import OnnxModelRunner

from vtprune_fx.errors import ExportError, InputError, MissingDependencyError
from vtprune_fx.export import manifest
from vtprune_fx.export.graph_outputs import (
    KEEP_SETS,
    bare_metadata,
    causal_output_of,
    keep_sets_of,
)
from vtprune_fx.export.manifest import Manifest
from vtprune_fx.export.trust import COMPONENTS
from vtprune_fx.models.arguments import CACHE_NAMES, PAST, given_cache, refuse_unknown
from vtprune_fx.planning.report import in_prompt
from vtprune_fx.selection.attention_rank import check_alone

_WEIGHTS_FOLDER = "session.model_external_initializers_file_folder_path"
"""ONNX Runtime's option for graphs that do not come from a file."""


def require_onnxruntime() -> None:
    """Check that ONNX Runtime and what reads its files are installed.

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


class OnnxModel(PreTrainedModel, GenerationMixin):
    """A pruned model on ONNX Runtime: ``generate`` as of any transformers model.

    It has no torch weights; torch tensors are what goes in and comes out.

    Args:
        folder: A folder that was found whole and safe.
        contents: Its manifest.
        runners: What runs the graphs ``prefill`` and ``decode``.
    """

    main_input_name = "input_ids"
    _supports_sdpa = True

    def __init__(
        self, folder: Path, contents: Manifest, runners: Mapping[str, ModelRunner]
    ) -> None:
        super().__init__(
            AutoConfig.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
        )
        self.generation_config = GenerationConfig.from_pretrained(
            folder, local_files_only=True
        )
        self.manifest = contents
        self._prompts: Any = runners["prefill"]
        self._steps: Any = runners["decode"]

    def show_keep_sets(self, folder: Path) -> None:
        """Make keep sets outputs of a prefill that was exported without ``keep_sets``.

        Args:
            folder: Where the model was loaded from.

        Raises:
            ExportError: The graph has none.
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
        # Without a file of its own a session asks where the weights lie.
        del program.meta["path"]
        options = session_options()
        options.add_session_config_entry(_WEIGHTS_FOLDER, str(folder.resolve()))
        self._prompts = OnnxGraph.from_program(
            program, self._prompts.metadata, self.device, session_options=options
        )

    @property
    def keep_sets(self) -> dict[int, Tensor]:
        """What the last prompt with images kept at each cut, if the prefill tells.

        For each layer with a cut, [B, K]: positions in the prompt as it came, -1 for
        tokens made of dropped ones.
        """
        return in_prompt(self._prompts.keep_sets)

    @property
    def device(self) -> torch.device:
        """Where the graphs run."""
        device: torch.device = self._steps.device
        return device

    @property
    def dtype(self) -> torch.dtype:
        """The precision the graphs were exported in."""
        dtype: torch.dtype = getattr(torch, self.manifest.precision)
        return dtype

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        pixel_values: Tensor | None = None,
        **options: Any,
    ) -> Any:
        """Run one step: a prompt with images, or what follows.

        Args:
            input_ids: [B, S].
            attention_mask: [B, past + S], left padding; all ones if left out.
            position_ids: [B, S]; counted from the mask if left out.
            past_key_values: The ragged cache, or an empty one.
            pixel_values: [I, 3, H, W], all images of the batch, of any float type.
            options: ``cache``, another name of ``past_key_values``, and options that
                ``generate`` passes, if they ask for what a graph gives.

        Returns:
            The model's output: logits [B, tokens kept, vocabulary], and the cache.

        Raises:
            InputError: A sample holds fewer visual tokens than the cuts take, a prompt
                with an image follows another, a second prompt follows one that was cut
                before the first layer, the export takes other sizes, or an argument
                is unknown or asks for what a graph does not give.
        """
        _check_options(options)
        cache = given_cache({PAST: past_key_values} | options)
        self._check_sizes(input_ids, pixel_values)
        past = int(cache.get_seq_length()) if cache is not None else 0
        if attention_mask is None:
            samples, new = input_ids.shape
            attention_mask = input_ids.new_ones(samples, past + new)
        if position_ids is None:
            positions = (attention_mask.cumsum(1) - 1).clamp(min=0)
            position_ids = positions[:, -input_ids.shape[1] :]
        if pixel_values is None:
            return self._decode(input_ids, attention_mask, position_ids, cache)
        if past:
            raise InputError(
                "pixel_values",
                expected="images in the first prompt alone",
                found="a prompt with images on a filled cache",
                fix="Start from an empty cache, with the whole conversation.",
            )
        self._check_visual_tokens(input_ids)
        return self._prompts(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            pixel_values=pixel_values.to(self.dtype),
        )

    def _decode(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor,
        cache: Cache | None,
    ) -> Any:
        """What is not pruned: a step, a further turn, a prompt of text alone."""
        if (
            _filled(cache)
            and input_ids.shape[1] > 1
            and self.manifest.recipe.cuts_ahead
        ):
            raise InputError(
                "past_key_values",
                expected="one new token at a time",
                found=f"{input_ids.shape[1]}, behind a prompt that was cut ahead of "
                "the first layer: the cache does not tell how long it was",
                fix="Start from an empty cache, with the whole conversation.",
            )
        return self._steps(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=cache if _filled(cache) else self._empty_cache(input_ids),
        )

    def _empty_cache(self, input_ids: Tensor) -> DynamicCache:
        text = self.config.get_text_config()
        width = getattr(text, "head_dim", None)
        width = width or text.hidden_size // text.num_attention_heads
        shape = (input_ids.shape[0], text.num_key_value_heads, 0, width)
        cache = DynamicCache()
        for layer in range(text.num_hidden_layers):
            keys, values = torch.zeros(2, *shape, dtype=self.dtype, device=self.device)
            cache.update(keys, values, layer)
        return cache

    def _check_sizes(self, input_ids: Tensor, pixel_values: Tensor | None) -> None:
        """Check the sizes that were fixed when the folder was written."""
        batch, prompt = self.manifest.batch, self.manifest.prompt
        expected = [
            input_ids.shape[0] if batch is None else batch,
            input_ids.shape[1] if prompt is None or pixel_values is None else prompt,
        ]
        if list(input_ids.shape) != expected:
            raise InputError(
                "input_ids",
                expected=f"shape {expected}, which the folder was exported for",
                found=str(list(input_ids.shape)),
                fix="Pad in front (processor(..., padding='max_length', max_length=N)),"
                " or export without --batch and --prompt.",
            )

    def _check_visual_tokens(self, input_ids: Tensor) -> None:
        contents = self.manifest
        recipe = contents.recipe
        if recipe.adaptive:
            check_alone(len(input_ids))
            return
        exact = recipe.of is not None
        least = recipe.needed(contents.visual_tokens)
        needed = contents.visual_tokens if exact else least
        counts = (input_ids == contents.image_token_id).sum(dim=1).tolist()
        if any(n != needed if exact else n < needed for n in counts):
            raise InputError(
                "prompts",
                expected=f"{'exactly' if exact else 'at least'} {needed} visual tokens "
                f"in each, on which recipe {recipe.name} counts",
                found=", ".join(map(str, counts)),
                fix="Run prompts without images by themselves.",
            )


class OnnxGraph(OnnxModelRunner):
    """Runs one graph.

    Attributes:
        keep_sets: For each layer with a cut, [B, K]: positions among what was left, if
            the graph returns them.
    """

    def __init__(self, metadata: ExportMetadata, session: Any) -> None:
        super().__init__(metadata, session)
        self._outputs = [str(output.name) for output in session.get_outputs()]
        self.keep_sets: dict[int, Tensor] = {}

    def unflatten(self, outputs: list[Any]) -> Any:
        """The model's output; keep sets are noted."""
        values = dict(zip(self._outputs, outputs, strict=True))
        self.keep_sets = keep_sets_of(values)
        return causal_output_of(values)


_OPTIONS: dict[str, tuple[object, ...]] = {
    "use_cache": (None, True),
    "return_dict": (None, True),
    "output_attentions": (None, False),
    "output_hidden_states": (None, False),
    "labels": (None,),
    "inputs_embeds": (None,),
    "logits_to_keep": (None, 0),
}
"""Options of ``forward`` that ``generate`` or a caller may pass, and what a graph can
honour of each."""

_ARGUMENTS = ("input_ids", "attention_mask", "position_ids", "pixel_values")


def _check_options(options: Mapping[str, Any]) -> None:
    """Refuse options that are unknown, or that no graph honours.

    Raises:
        InputError: There is one.
    """
    refuse_unknown(options, {*_ARGUMENTS, *CACHE_NAMES, *_OPTIONS})
    for name, value in options.items():
        if name in _OPTIONS and not any(value is fine for fine in _OPTIONS[name]):
            raise InputError(
                f"argument {name}",
                expected=" or ".join(map(str, _OPTIONS[name])),
                found="a tensor" if isinstance(value, Tensor) else str(value),
                fix="A graph gives logits of all kept tokens and the cache. Run the "
                "original model for anything else.",
            )


def _filled(cache: Cache | None) -> bool:
    return cache is not None and int(cache.get_seq_length()) > 0


def session_options() -> Any:
    """Errors only: warnings about constants that stay unfolded help nobody."""
    import onnxruntime  # noqa: PLC0415 - an optional package

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return options


def open_onnx(folder: Path, contents: Manifest, device: str | None) -> OnnxModel:
    """Open a folder that was found whole on ONNX Runtime.

    Args:
        folder: The export.
        contents: Its manifest.
        device: ``cpu`` or ``cuda``; left out, CUDA where it works.

    Raises:
        ExportError: The folder holds what is not safe to load, or ONNX Runtime does not
            run on ``device``, or not the graphs' operators in their precision.
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
    # ONNX Runtime falls back to the CPU in silence where CUDA does not load.
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
    graph: Any = OnnxGraph.from_program(
        OnnxExporter.load_program(path),
        bare_metadata(precision),
        device,
        session_options=session_options(),
    )
    return graph  # type: ignore[no-any-return] # annotated as of the base class


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
    """Say which operator it is that a provider lacks in a precision."""
    from onnxruntime.capi import onnxruntime_pybind11_state as states  # noqa: PLC0415 - optional

    try:
        yield
    except states.NotImplemented as error:
        found = re.search(r"implementation for (\S+)", str(error))
        raise ExportError(
            f"ONNX Runtime in {precision}",
            expected="every operator of the graphs",
            found=f"none for {found[1]}" if found else str(error),
            fix="Run it on another device, or export with --precision float32.",
        ) from error
