"""A pruned model whose graphs another runtime runs, with transformers' generation.

What all runtimes share: the choice of the graph, the checks before it runs, and
``generate``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol, TypeGuard

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
from transformers.modeling_outputs import CausalLMOutputWithPast

from vtprune_fx.errors import ExportError, InputError
from vtprune_fx.export.manifest import Manifest
from vtprune_fx.models.arguments import CACHE_NAMES, PAST, given_cache, refuse_unknown
from vtprune_fx.models.encoding import counted_positions
from vtprune_fx.planning.report import in_prompt
from vtprune_fx.recipes.counting import key_value_sizes
from vtprune_fx.selection.attention_rank import check_alone


class GraphRunner(Protocol):
    """Runs one graph of an export."""

    @property
    def device(self) -> torch.device:
        """Where the graph runs."""

    @property
    def keep_sets(self) -> Mapping[int, Tensor]:
        """Keep sets of the last run: for each layer with a cut, [B, K].

        Positions among the tokens before that cut. Empty for graphs without keep sets.
        """

    def __call__(
        self,
        *,
        input_ids: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor,
        pixel_values: Tensor = ...,
        past_key_values: Cache = ...,
    ) -> CausalLMOutputWithPast:
        """Run the graph on the arguments that it was traced with.

        Returns:
            Logits [B, tokens kept, vocabulary], and the cache.
        """


class GraphModel(PreTrainedModel, GenerationMixin):
    """A pruned model of two graphs: ``generate`` as of any transformers model.

    It has no torch weights, but takes and returns torch tensors. Subclass it for a
    runtime.

    Args:
        folder: A folder whose files were checked.
        contents: Its manifest.
        runners: Runs the graphs, by name: ``prefill`` and ``decode``.
    """

    main_input_name = "input_ids"
    _supports_sdpa = True

    def __init__(
        self, folder: Path, contents: Manifest, runners: Mapping[str, GraphRunner]
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
        self._prefill_graph = runners["prefill"]
        self._decode_graph = runners["decode"]

    def show_keep_sets(self, folder: Path) -> None:
        """Make keep sets outputs of a prefill that was exported without ``keep_sets``.

        Args:
            folder: The folder that the model was loaded from.

        Raises:
            ExportError: The runtime cannot, or the graph holds no keep sets.
        """
        raise ExportError(
            f"export {folder}",
            expected="a runtime that returns values from inside of a graph",
            found=f"target {self.manifest.target!r}, which does not",
            fix="Use an ONNX export of the same model.",
        )

    @property
    def keep_sets(self) -> dict[int, Tensor]:
        """Tokens kept of the last prompt with images, if the prefill returns them.

        For each layer with a cut, [B, K]: positions in the prompt, -1 for tokens that
        were merged from dropped ones.
        """
        return in_prompt(self._prefill_graph.keep_sets)

    @property
    def device(self) -> torch.device:
        """Where the graphs run."""
        return self._decode_graph.device

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
        **options: object,
    ) -> CausalLMOutputWithPast:
        """Run one step: a prompt with images, or the tokens after it.

        Args:
            input_ids: [B, S].
            attention_mask: [B, past + S], left padding; all ones if left out.
            position_ids: [B, S]; counted from the mask if left out.
            past_key_values: The ragged cache, or an empty one.
            pixel_values: [I, 3, H, W], all images of the batch, of any float type.
            options: ``cache``, another name of ``past_key_values``, and options that
                ``generate`` passes, if the graphs support their values.

        Returns:
            The model's output: logits [B, tokens kept, vocabulary], and the cache.

        Raises:
            InputError: Images or visual tokens are too few or too many, a prompt with
                an image follows another, a second prompt one that was cut before the
                first layer, or sizes or an argument are not the export's.
        """
        _check_options(options)
        cache = given_cache({PAST: past_key_values, **options})
        self._check_sizes(input_ids, pixel_values)
        past = int(cache.get_seq_length()) if cache is not None else 0
        if attention_mask is None:
            samples, new = input_ids.shape
            attention_mask = input_ids.new_ones(samples, past + new)
        if position_ids is None:
            positions = counted_positions(attention_mask)
            position_ids = positions[:, -input_ids.shape[1] :]
        if pixel_values is None:
            return self._run_decode(input_ids, attention_mask, position_ids, cache)
        if past:
            raise _image_after_prompt()
        self._check_visual_tokens(input_ids)
        self._check_images(input_ids, len(pixel_values))
        return self._prefill_graph(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            pixel_values=pixel_values.to(self.dtype),
        )

    def _run_decode(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor,
        cache: Cache | None,
    ) -> CausalLMOutputWithPast:
        """Run what is not pruned: a step, a further turn, a prompt of text alone."""
        if (
            _filled(cache)
            and input_ids.shape[1] > 1
            and self.manifest.recipe.cuts_before_all
        ):
            raise InputError(
                "past_key_values",
                expected="one new token at a time",
                found=f"{input_ids.shape[1]}, after a prompt that was cut before "
                "the first layer: its length cannot be read from the cache",
                fix="Start from an empty cache, with the full conversation.",
            )
        return self._decode_graph(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=cache
            if _filled(cache)
            else zero_cache(self, [0] * self._layers(), len(input_ids)),
        )

    def _layers(self) -> int:
        return int(self.config.get_text_config().num_hidden_layers)

    def _check_sizes(self, input_ids: Tensor, pixel_values: Tensor | None) -> None:
        """Check batch and prompt length, where the export fixed them."""
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
                fix="Pad on the left (processor(..., padding='max_length', "
                "max_length=N)), or export without --batch and --prompt.",
            )

    def _check_images(self, input_ids: Tensor, images: int) -> None:
        """Check that there is a place for each image: no graph does."""
        per_image, placeholder = self.manifest.per_image, self.manifest.image_token_id
        places = int((input_ids == placeholder).sum())
        if per_image is not None and places != images * per_image:
            raise InputError(
                "images of the prompt",
                expected=f"{per_image} placeholders for each image",
                found=f"{images} images for {places} placeholders",
                fix="Make the prompt by the export's processor, with one placeholder "
                "for each image, and pass all that it returns.",
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
                f"in each, which recipe {recipe.name} needs",
                found=", ".join(map(str, counts)),
                fix="Run prompts without images by themselves.",
            )


_OPTIONS: dict[str, tuple[object, ...]] = {
    "use_cache": (None, True),
    "return_dict": (None, True),
    "output_attentions": (None, False),
    "output_hidden_states": (None, False),
    "labels": (None,),
    "inputs_embeds": (None,),
    "logits_to_keep": (None, 0),
}
"""Options of ``forward`` that ``generate`` or a caller may pass, and the values of each
that the graphs support."""

_ARGUMENTS = ("input_ids", "attention_mask", "position_ids", "pixel_values")


def _check_options(options: Mapping[str, object]) -> None:
    """Refuse unknown options, and values that the graphs do not support.

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
                fix="The graphs return logits of all kept tokens and the cache. Run "
                "the original model for other outputs.",
            )


def zero_cache(
    model: PreTrainedModel, lengths: Sequence[int], samples: int
) -> DynamicCache:
    """A cache of zeros for a model.

    Args:
        model: Its configuration has the sizes.
        lengths: Tokens in each layer.
        samples: Samples of the batch.
    """
    text = model.config.get_text_config()
    groups, width = key_value_sizes(text)
    cache = DynamicCache()
    for layer, length in enumerate(lengths):
        shape = (samples, groups, length, width)
        keys, values = torch.zeros(2, *shape, dtype=model.dtype, device=model.device)
        cache.update(keys, values, layer)
    return cache


def _image_after_prompt() -> InputError:
    return InputError(
        "pixel_values",
        expected="images in the first prompt alone",
        found="a prompt with images on a filled cache",
        fix="Start from an empty cache, with the full conversation.",
    )


def _filled(cache: Cache | None) -> TypeGuard[Cache]:
    return cache is not None and int(cache.get_seq_length()) > 0
