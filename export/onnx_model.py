"""Running an exported folder on ONNX Runtime, with transformers' own generation."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.exporters import ExportedModel

from vtprune_fx.errors import ExportError, InputError, MissingDependencyError
from vtprune_fx.export import manifest
from vtprune_fx.export.manifest import Manifest
from vtprune_fx.rank import check_alone


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
            input_ids: [B, S] with images, else [B, Q].
            attention_mask: [B, past + S], left padding; all ones if left out.
            position_ids: [B, S]; counted from the mask if left out.
            past_key_values: The ragged cache, or an empty one.
            pixel_values: [I, 3, H, W], all images of the batch.

        Returns:
            The model's output: logits [B, tokens left, vocabulary], and the cache.

        Raises:
            InputError: A sample holds fewer visual tokens than the cuts take, or a
                second prompt follows one that was cut ahead of the first layer.
        """
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
        self._check_visual_tokens(input_ids)
        return self._exported.runners["prefill"](
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            pixel_values=pixel_values,
        )

    def _decode(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor,
        cache: DynamicCache | None,
    ) -> Any:
        """One token after another: the decode graph takes one a step."""
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
        cache = self._empty_cache(input_ids) if not _filled(cache) else cache
        past = attention_mask.shape[1] - input_ids.shape[1]
        outputs = None
        for step in range(input_ids.shape[1]):
            outputs = self._exported.runners["decode"](
                input_ids=input_ids[:, step : step + 1],
                attention_mask=attention_mask[:, : past + step + 1],
                position_ids=position_ids[:, step : step + 1],
                past_key_values=cache,
            )
            cache = outputs.past_key_values
        return outputs

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


def _filled(cache: DynamicCache | None) -> bool:
    return cache is not None and cache.get_seq_length() > 0


def _session_options() -> Any:
    """Errors only: warnings about constants that stay unfolded help nobody."""
    import onnxruntime  # noqa: PLC0415 - an optional package

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return options


def load(folder: Path, device: str | None = None) -> OnnxModel:
    """Load an exported folder for ONNX Runtime.

    Args:
        folder: What ``vtprune export onnx`` wrote.
        device: ``cpu`` or ``cuda``; left out, CUDA where it works.

    Raises:
        ExportError: The folder is no whole export, or ONNX Runtime does not run on
            ``device``.
        MissingDependencyError: ONNX Runtime is not installed.
    """
    require_onnxruntime()
    contents = manifest.read(folder)
    manifest.check_whole(folder, contents)
    try:
        exported = ExportedModel.from_pretrained(
            folder, device=device, session_options=_session_options()
        )
    except ValueError as error:
        raise ExportError(
            f"device {device}",
            expected="an execution provider of ONNX Runtime for it",
            found=str(error),
            fix="Install `vtprune-fx[onnxruntime-gpu]`, or run on the CPU.",
        ) from error
    # ONNX Runtime falls back to the CPU in silence where CUDA does not load.
    if device is not None and exported.device.type != torch.device(device).type:
        raise ExportError(
            f"device {device}",
            expected="ONNX Runtime to run on it",
            found=f"a session on {exported.device.type}",
            fix="Check that the CUDA libraries load, or run on the CPU.",
        )
    _check_whole(folder, exported)
    return OnnxModel(exported, contents)


def _check_whole(folder: Path, exported: ExportedModel) -> None:
    for name, found in (
        ("config.json", exported.config),
        ("generation_config.json", exported.generation_config),
    ):
        if found is None:
            raise ExportError(
                f"export {folder}",
                expected=name,
                found="no such file",
                fix="Write it again with `vtprune export onnx`.",
            )
