"""A model's ``forward`` that prunes its prompts and steps on ragged caches."""

from __future__ import annotations

import contextlib
import functools
import inspect
import logging
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.exc import BackendCompilerFailed, Unsupported
from torch.utils import _pytree as pytree
from transformers import Cache, DynamicCache, PreTrainedModel, StaticCache
from transformers.utils import TransformersKwargs

from vtprune_fx.backend import vtprune_backend
from vtprune_fx.capture.aten import images_as_one_sequence
from vtprune_fx.errors import InputError, VtpruneError
from vtprune_fx.models import ragged_cache as ragged
from vtprune_fx.models.arguments import (
    CACHE_NAMES,
    PAST,
    cache_argument,
    cache_of,
    given_cache,
    refuse_unknown,
)
from vtprune_fx.models.encoding import (
    FEATURES,
    encoded,
    gives_pixels,
    own_positions,
    token_axis,
)
from vtprune_fx.models.placeholders import visual_token_ids
from vtprune_fx.models.ragged_attention import (
    mark_dynamic,
    set_attention,
    use_ragged_attention,
)
from vtprune_fx.planning.report import PruneReport
from vtprune_fx.recipes.default import default_recipe
from vtprune_fx.recipes.schedule import common_count, dropped_before
from vtprune_fx.recipes.schema import Recipe

logger = logging.getLogger(__name__)


def forward_of(model: PreTrainedModel) -> object:
    """The ``forward`` that was set on the model itself, or None."""
    return vars(model).get("forward")


@dataclass(frozen=True)
class _Numbers:
    """What a graph is made for.

    Attributes:
        visual: Visual tokens that shares are taken of.
        own: Whether each sample loses its own share.
    """

    visual: int
    own: bool


_TEXT = _Numbers(0, own=False)


_GRAPHS = 64
"""Prompts and steps, of one sample and of several, with every kind of mask and cache,
are graphs of one function: more than the 8 after which Dynamo makes no other."""


_NEARLY = 0.9
"""Share of what could leave that a graph made before must let leave, to be taken."""


class PrunedForward:
    """Stands for a model's ``forward``: prompts pruned, steps on ragged caches."""

    def __init__(
        self, model: PreTrainedModel, options: dict[str, Any], decode: bool
    ) -> None:
        self._whole = model.forward
        self._was_own = forward_of(model) is not None
        self._text = model.config.get_text_config()
        self._attention = self._text._attn_implementation
        self._visual_ids = torch.tensor(visual_ids(model))
        self._model = weakref.ref(model)
        self._options = options | {"on_report": self._note}
        self.report: PruneReport | None = None
        self._compiled: dict[_Numbers, Callable[..., Any]] = {}
        self._decode = decode
        self._encodes_ahead = False
        functools.update_wrapper(self, self._whole)
        self._signature = inspect.signature(self._whole)
        self._cache = cache_argument(self._whole) or PAST
        self._known = _known_arguments(model)
        recipe: Recipe | None = options["recipe"]
        self._sees_tower = recipe is not None and recipe.sees_tower
        if self._sees_tower:
            self.__signature__ = _without(self._signature, FEATURES)
        use_ragged_attention(model)

    def _note(self, report: PruneReport) -> None:
        self.report = report

    def _owner(self) -> PreTrainedModel:
        """The model, which holds this object."""
        model = self._model()
        assert model is not None
        return model

    def _give_up(self) -> None:
        """A model that cannot be pruned is left as it was."""
        if (model := self._model()) is not None and forward_of(model) is self:
            self.give_back(model)

    def give_back(self, model: PreTrainedModel) -> None:
        """Make the model what it was."""
        set_attention(model, self._attention)
        if self._was_own:
            model.forward = self._whole
        else:
            del model.forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run a prompt, or what follows on a filled cache."""
        named = self._named(*args, **kwargs)
        _refuse(named)
        try:
            if ragged.length_of(named.get(self._cache)):
                return self._run_step(named)
            return self._run_prompt(named)
        except BackendCompilerFailed as error:
            if isinstance(error.inner_exception, VtpruneError):
                self._give_up()
                raise error.inner_exception from None
            raise

    def _named(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Arguments by the names that the model has for them."""
        given = self._signature.bind_partial(*args, **kwargs)
        named = given.arguments | given.arguments.pop("kwargs", {})
        refuse_unknown(named, self._known)
        cache = given_cache(named)
        named = {n: value for n, value in named.items() if n not in CACHE_NAMES}
        return named if cache is None else named | {self._cache: cache}

    def _run_prompt(self, named: dict[str, Any]) -> Any:
        given: Cache | None = named.get(self._cache)
        ragged.check_can_be_ragged(given)
        static = given if isinstance(given, StaticCache) else None
        if static is not None:
            # Its layers are allocated once it is known how long they become.
            named[self._cache] = DynamicCache(config=self._text)
            named["attention_mask"] = _without_room(named)
        room = None if static is None else static.get_max_length()
        visual = self._visual(named.get("input_ids"))
        numbers = self._numbers(visual, named)
        outputs = self._run_encoded(named, numbers)
        filled: Cache | None = cache_of(outputs)
        if filled is not None:
            came, mask = named["input_ids"].shape[1], named.get("attention_mask")
            left = self._left_ahead(visual) if numbers.own else None
            ragged.make_ragged(filled, came, mask, visual, room, left)
        if static is not None:
            assert filled is not None, "a cache that was passed is returned"
            static.layers = filled.layers
            setattr(outputs, self._cache, static)
        return outputs

    def _numbers(self, visual: Tensor, named: dict[str, Any]) -> _Numbers:
        """How many visual tokens shares are taken of."""
        counts: list[int] = visual.tolist()
        recipe = self._recipe(max(counts))
        if recipe.of is None or not recipe.cuts or len({*counts} - {0}) <= 1:
            return _Numbers(max(counts), own=False)
        if named.get("attention_mask") is None:
            named["attention_mask"] = torch.ones_like(named["input_ids"])
        padding = named["attention_mask"].shape[1] - named["attention_mask"].sum(dim=1)
        return _Numbers(common_count(recipe, counts, padding.tolist()), own=True)

    def _recipe(self, visual: int) -> Recipe:
        given: Recipe | None = self._options["recipe"]
        return given or default_recipe(self._text.num_hidden_layers, max(visual, 1))

    def _left_ahead(self, visual: Tensor) -> list[Tensor]:
        """[B] for each layer: visual tokens that left each sample ahead of it."""
        layers = self._text.num_hidden_layers
        recipe = self._recipe(int(visual.max()))
        left = [dropped_before(recipe, count, layers) for count in visual.tolist()]
        return list(torch.tensor(left, device=visual.device).unbind(dim=1))

    def _run_encoded(self, named: dict[str, Any], numbers: _Numbers) -> Any:
        """Run a prompt whole; encoders that Dynamo cannot trace run ahead of it."""
        named = encoded(self._owner(), named, anyway=self._encodes_ahead)
        _mark_prompt(named)
        try:
            with self._encoding_images(named):
                return self._compiled_for(numbers)(**named)
        except Unsupported:
            if self._encodes_ahead or not gives_pixels(named):
                raise
        self._encodes_ahead = True
        return self._run_encoded(named, numbers)

    def _encoding_images(
        self, named: dict[str, Any]
    ) -> contextlib.AbstractContextManager[None]:
        """Let one graph encode images, any number of them."""
        pixels, model = named.get("pixel_values"), self._model()
        if not self._sees_tower or pixels is None or model is None:
            return contextlib.nullcontext()
        _refuse_mixed_up(named["input_ids"], pixels)
        if named.get("return_dict") is model.config.return_dict:
            # Dynamo reads no signature, as encoding does, once that is taken off.
            del named["return_dict"]
        return images_as_one_sequence(model)

    def _visual(self, ids: Tensor | None) -> Tensor:
        """[B] visual tokens of each sample."""
        if ids is None:
            raise InputError(
                "input_ids",
                expected="the prompt's ids, which tell the visual tokens",
                found="none",
                fix="Pass input_ids, not inputs_embeds.",
            )
        return torch.isin(ids, self._visual_ids.to(ids.device)).sum(dim=1)

    def _compiled_for(self, numbers: _Numbers) -> Callable[..., Any]:
        """The compiled model for prompts with at most so many visual tokens.

        Shares become counts when a graph is made; counts fit any number. Where samples
        lose numbers of their own, a graph by which nearly as many leave will do.
        """
        recipe: Recipe | None = self._options["recipe"]
        counted = recipe is not None and recipe.of is None
        key = _TEXT if counted or numbers.visual == 0 else numbers
        if key.own:
            enough = range(int(_NEARLY * key.visual), key.visual + 1)
            made = [k for k in self._compiled if k.own and k.visual in enough]
            key = max(made, default=key, key=lambda k: k.visual)
        if key not in self._compiled:
            options: Any = self._options
            if numbers.visual:
                visual = key.visual or numbers.visual
                told = {"visual_tokens": visual, "per_sample": key.own}
                options = options | told
            self._compiled[key] = torch.compile(  # type: ignore[call-overload] # missing
                self._whole,
                backend=vtprune_backend,
                options=options,
                fullgraph=True,
                # Graphs for other numbers do not count as recompilations of this one.
                isolate_recompiles=True,
                recompile_limit=_GRAPHS,
            )
        return self._compiled[key]

    def _run_step(self, named: dict[str, Any]) -> Any:
        cache: Cache = named[self._cache]
        new = _first_given(named, "input_ids", "inputs_embeds").shape[1]
        mask = ragged.attention_mask(cache, new)
        mark_dynamic(3, mask)
        if new > 1:
            mark_dynamic(2, mask)
        positions = own_positions(self._owner(), named)
        if positions is not None:
            named["position_ids"] = positions
        _mark_prompt(named | {"attention_mask": None})
        layers: list[Any] = cache.layers
        for layer in layers:
            if isinstance(layer, ragged.RaggedLayer):
                mark_dynamic(2, layer.keys, layer.values)
        step = self._compiled_for(_TEXT) if self._decode else self._whole
        return step(**named | {"attention_mask": mask})


def visual_ids(model: PreTrainedModel) -> list[int]:
    """Ids of the placeholders of images and videos."""
    found = list(visual_token_ids(model.config))
    if not found:
        logger.warning(
            "%s has no visual tokens: it is compiled, not pruned.", type(model).__name__
        )
    return found


def _known_arguments(model: PreTrainedModel) -> frozenset[str]:
    """What a model's ``forward`` takes, or hands on to its parts by ``**kwargs``."""
    decoder: Any = model.get_decoder()
    functions = (model.forward, model.base_model.forward, decoder.forward)
    names = {name for f in functions for name in inspect.signature(f).parameters}
    # Decorators of transformers take these off before ``forward`` sees them.
    decorators = ("return_dict", "use_cache")
    options = TransformersKwargs.__annotations__
    return frozenset({*names, *CACHE_NAMES, *decorators, *options})


def _refuse(named: Mapping[str, Any]) -> None:
    """Refuse what a pruned model cannot give."""
    refused = (
        ("output_attentions", True, "Fused attention keeps no probabilities."),
        ("use_cache", False, "A prompt grown by an answer is another prompt."),
    )
    for option, value, why in refused:
        if named.get(option) is value:
            raise InputError(
                option,
                expected=str(not value),
                found=f"{value}, which a pruned model cannot generate with",
                fix=f"{why} Leave the option out, or call vtprune_fx.undo(model).",
            )


def _without(signature: inspect.Signature, name: str) -> inspect.Signature:
    """A signature that lacks a parameter.

    ``generate`` reads it to learn whether it should encode images by itself.
    """
    parameters = signature.parameters.values()
    return signature.replace(parameters=[p for p in parameters if p.name != name])


def _refuse_mixed_up(ids: Tensor, pixels: Tensor) -> None:
    """Refuse prompts that ``generate`` repeated, with several images each.

    It repeats every image by itself, so that they no longer stand in the prompts'
    order.

    Args:
        ids: [B, S].
        pixels: [I, ...].
    """
    twice = (ids[1:] == ids[:-1]).all(dim=1).any()
    seen_twice = (pixels[1:] == pixels[:-1]).flatten(1).all(dim=1).any()
    if len(pixels) > len(ids) and bool(twice & seen_twice):
        raise InputError(
            "prompts",
            expected="one image in each, to be repeated for beams or sequences by a "
            "recipe that looks at the vision tower",
            found=f"{len(pixels)} images in {len(ids)} prompts",
            fix="Generate greedily, or use another recipe.",
        )


def _first_given(named: Mapping[str, Any], *names: str) -> Any:
    return next(named[name] for name in names if named.get(name) is not None)


def _mark_prompt(named: dict[str, Any]) -> None:
    """Let a prompt's length and its features' number vary; one token is a step's."""
    prompt = _first_given(named, "input_ids", "inputs_embeds").shape[:2]
    for value in named.values():
        axis = token_axis(value, prompt)
        if axis is not None and prompt[1] > 1:
            mark_dynamic(axis, value)
    for features in pytree.tree_leaves(named.get(FEATURES) or {}):
        torch._dynamo.maybe_mark_dynamic(features, 0)


def _without_room(named: dict[str, Any]) -> Tensor | None:
    """[B, S]: a prompt's mask, of which ``generate`` made one for a whole static cache.

    That is causal, so its last row has all the padding: [B, 1, S, M] with M > S.
    """
    mask: Tensor | None = named.get("attention_mask")
    if mask is None or mask.dim() == 2:
        return mask
    return mask[:, 0, -1, : mask.shape[2]].long()
