"""Running an exported folder on ONNX Runtime, with transformers' own generation."""

from __future__ import annotations

import contextlib
import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.exporters import ExportedModel, ExportMetadata, OnnxExporter
from transformers.exporters.runners.runner_onnx import OnnxModelRunner

from vtprune_fx.errors import ExportError, InputError, MissingDependencyError
from vtprune_fx.export import manifest
from vtprune_fx.export.manifest import Manifest
from vtprune_fx.planning.report import in_prompt
from vtprune_fx.selection.attention_rank import check_alone

KEEP_SETS = "keep_sets."
"""Name of a keep set's value in a prefill graph, ahead of its layer's number."""

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
        exported: The graphs ``prefill`` and ``decode``.
        contents: The folder's manifest.
    """

    main_input_name = "input_ids"
    _supports_sdpa = True

    def __init__(self, exported: ExportedModel, contents: Manifest) -> None:
        assert exported.config is not None, "load() checks it"
        assert exported.generation_config is not None, "load() checks it"
        super().__init__(exported.config)
        self.generation_config = exported.generation_config
        self.manifest = contents
        self._exported = exported
        self._prompts = self._prompt_runner(exported.runners.pop("prefill"))

    @staticmethod
    def _prompt_runner(runner: Any) -> Any:
        """What runs prompts, and may have noted their keep sets."""
        return _Prefill(runner.metadata, runner.session)

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
        runner: Any = _Prefill.from_program(
            program, self._prompts.metadata, self.device, session_options=options
        )
        self._prompts = runner

    @property
    def keep_sets(self) -> dict[int, Tensor]:
        """What the last prompt with images kept at each cut, if the prefill tells.

        For each layer with a cut, [B, K]: positions in the prompt as it came, -1 for
        tokens made of dropped ones.
        """
        return in_prompt(getattr(self._prompts, "keep_sets", {}))

    @property
    def device(self) -> torch.device:
        """Where the graphs run."""
        return self._exported.device

    @property
    def dtype(self) -> torch.dtype:
        """The precision the graphs were exported in."""
        return self._exported.dtype

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: DynamicCache | None = None,
        pixel_values: Tensor | None = None,
        **_: object,
    ) -> Any:
        """Run one step: a prompt with images, or what follows.

        Args:
            input_ids: [B, S].
            attention_mask: [B, past + S], left padding; all ones if left out.
            position_ids: [B, S]; counted from the mask if left out.
            past_key_values: The ragged cache, or an empty one.
            pixel_values: [I, 3, H, W], all images of the batch, of any float type.

        Returns:
            The model's output: logits [B, tokens left, vocabulary], and the cache.

        Raises:
            InputError: A sample holds fewer visual tokens than the cuts take, a prompt
                with an image follows another, a second prompt follows one that was cut
                ahead of the first layer, or the export takes other sizes.
        """
        self._check_sizes(input_ids, pixel_values)
        past = past_key_values.get_seq_length() if past_key_values is not None else 0
        if attention_mask is None:
            samples, new = input_ids.shape
            attention_mask = input_ids.new_ones(samples, past + new)
        if position_ids is None:
            positions = (attention_mask.cumsum(1) - 1).clamp(min=0)
            position_ids = positions[:, -input_ids.shape[1] :]
        if pixel_values is None:
            return self._decode(
                input_ids, attention_mask, position_ids, past_key_values
            )
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
        cache: DynamicCache | None,
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
        return self._exported.runners["decode"](
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


class _Prefill(OnnxModelRunner):
    """Runs the prefill, and notes what it tells ahead of the model's own outputs.

    Attributes:
        keep_sets: For each layer with a cut, [B, K]: positions among what was left.
    """

    def __init__(self, metadata: ExportMetadata, session: Any) -> None:
        super().__init__(metadata, session)
        names = [output.name for output in session.get_outputs()]
        self._told = [n for n in names if n.startswith(KEEP_SETS)]
        self.keep_sets: dict[int, Tensor] = {}

    def unflatten(self, outputs: list[Any]) -> Any:
        """The model's output; keep sets are noted."""
        told = zip(self._told, outputs, strict=False)
        self.keep_sets = {int(n.removeprefix(KEEP_SETS)): kept for n, kept in told}
        return super().unflatten(outputs)


def _filled(cache: DynamicCache | None) -> bool:
    return cache is not None and cache.get_seq_length() > 0


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
        exported = ExportedModel.from_pretrained(
            folder,
            device=device,
            local_files_only=True,
            session_options=session_options(),
        )
    # ONNX Runtime falls back to the CPU in silence where CUDA does not load.
    if device is not None and exported.device.type != torch.device(device).type:
        raise ExportError(
            f"device {device}",
            expected="ONNX Runtime to run on it",
            found=f"a session on {exported.device.type}",
            fix="Check that the CUDA libraries load, or run on the CPU.",
        )
    return OnnxModel(exported, contents)


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
