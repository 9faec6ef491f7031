"""A model's ``forward`` that prunes its prompts and steps on ragged caches."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.exc import Unsupported
from transformers import (
    Cache,
    DynamicCache,
    PreTrainedModel,
    StaticCache,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

from vtprune_fx.backend import vtprune_backend
from vtprune_fx.capture.aten import images_as_one_sequence
from vtprune_fx.errors import InputError
from vtprune_fx.generation import checks, failures
from vtprune_fx.generation.arguments import (
    Arguments,
    first_given,
    mark_prompt,
    mark_step,
    parted,
    refuse_mixed_up,
    visual_ids,
    without,
    without_room,
)
from vtprune_fx.generation.counts import PromptCounts, places_of
from vtprune_fx.generation.positions import check_one_sequence, kept_logits
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
    gives_images,
    gives_pixels,
)
from vtprune_fx.models.ragged_attention import (
    set_attention,
    use_ragged_attention,
)
from vtprune_fx.planning.place import with_counts
from vtprune_fx.planning.report import PruneReport
from vtprune_fx.pruning import say_default
from vtprune_fx.recipes.default import default_recipe
from vtprune_fx.recipes.schema import Recipe

Forward = Callable[..., CausalLMOutputWithPast]
"""The ``forward`` of a model, compiled or not."""


@dataclass(frozen=True)
class _MadeFor:
    """What a graph is made for.

    Attributes:
        visual: Visual tokens that shares are taken of; 0 where they are no part of it.
        per_sample: Whether each sample drops its share.
    """

    visual: int
    per_sample: bool


_ANY = _MadeFor(0, per_sample=False)


_GRAPHS = 64
"""Prompts and steps, of one sample and of several, with every kind of mask and cache,
are graphs of one function: more than the 8 after which Dynamo makes no other."""


_NEARLY = 0.9
"""A graph made before is used if it drops this share of what could be dropped."""


class PrunedForward:
    """Stands for a model's ``forward``: prompts pruned, steps on ragged caches.

    Its ``generate`` stands for the model's, and says where the prompt ends when
    candidates for the answer come with it. A copy of the model has a copy of this
    object, with other graphs.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        recipe: Recipe | None,
        options: Mapping[str, object],
        decode: bool,
    ) -> None:
        self._model = model
        self._text = model.config.get_text_config()
        self._attention = self._text._attn_implementation
        self._visual_ids = torch.tensor(visual_ids(model))
        self._recipe = recipe
        self._layers = self._text.num_hidden_layers
        # A mode may ask for CUDA graphs: their lengths must be numbers.
        fixed = options["mode"] is not None
        self._places = None if fixed else places_of(self._recipe_for(1))
        self._options = {**options, "recipe": self._places or recipe}
        self._asked: Recipe | None = None
        self._counts: PromptCounts | None = None
        self.report: PruneReport | None = None
        self._compiled: dict[_MadeFor, Forward] = {}
        self._decode = decode
        self._encodes_first = False
        self._prompt: int | None = None
        self._must_prune = False
        self._calls = 0
        functools.update_wrapper(self, self._dense)
        self._signature = inspect.signature(self._dense)
        self._cache = cache_argument(self._dense) or PAST
        self._known = checks.known_arguments(model)
        self._sees_tower = recipe is not None and recipe.sees_tower
        if self._sees_tower:
            self.__signature__ = without(self._signature, FEATURES)

    @property
    def _dense(self) -> Forward:
        """The forward of the model's class."""
        return functools.partial(type(self._model).forward, self._model)

    @property
    def _dense_generate(self) -> Callable[..., object]:
        """The generate of the model's class."""
        kind: Any = type(self._model)
        return functools.partial(kind.generate, self._model)

    def attach(self) -> None:
        """Set this object on the model."""
        vars(self._model).update(forward=self, generate=self.generate)
        use_ragged_attention(self._model)

    def detach(self) -> None:
        """Make the model what it was."""
        set_attention(self._model, self._attention)
        del self._model.forward, self._model.generate

    def __getstate__(self) -> dict[str, object]:
        """Without graphs: they hold the weights of the model that they are made of."""
        return vars(self) | {"_compiled": {}}

    def _note(self, report: PruneReport) -> None:
        counts, plan = self._counts, report.plan
        assert counts is not None
        if plan.schedule is None:
            plan = dataclasses.replace(plan, visual_tokens=counts.visual)
        else:
            plan = with_counts(plan, counts.recipe, counts.visual)
        self.report = dataclasses.replace(report, plan=plan)

    def _note_dense(self) -> None:
        """Called where a graph is not pruned."""
        if self._must_prune:
            raise failures.not_pruned(self._model, "a graph that places no image")

    def __call__(self, *args: object, **kwargs: object) -> CausalLMOutputWithPast:
        """Run a prompt, or what follows on a filled cache."""
        checks.check_not_traced()
        checks.check_model(self._model)
        self._calls += 1
        named = self._named(*args, **kwargs)
        checks.check_arguments(named)
        with failures.errors_of_ours():
            if ragged.length_of(named.get(self._cache)):
                return self._run_step(named)
            return self._run_first(named)

    def generate(self, *args: object, **kwargs: object) -> object:
        """Transformers' ``generate``, of which only the prompt is pruned.

        Its keyword ``schedule`` is as ``scheduled`` takes it.

        Raises:
            InputError: It is asked for what a pruned prompt cannot serve, or its model
                did not run the prompt by its ``forward``.
        """
        given = kwargs.get("generation_config")
        config = given if given is not None else self._model.generation_config
        checks.check_generation(config, kwargs)
        asked: Any = kwargs.pop("schedule", None)
        with contextlib.nullcontext() if asked is None else self.scheduled(asked):
            return self._generate(*args, **kwargs)

    @contextlib.contextmanager
    def scheduled(self, asked: Recipe | str | float) -> Iterator[Recipe]:
        """Let prompts drop other numbers of tokens for a while.

        Args:
            asked: A recipe, as ``load_recipe`` takes it, or a budget, as
                ``recipes.scaling.scaled`` takes it.

        Raises:
            InputError: The graphs have no such cuts, or their numbers are fixed.
            RecipeError: The recipe cannot be loaded.
        """
        now = checks.schedule_for(self._model, self._places, asked)
        before, self._asked = self._asked, now
        try:
            yield self._asked
        finally:
            self._asked = before

    def _generate(self, *args: object, **kwargs: object) -> object:
        """Generate, and see to it that the prompt ran by this object."""
        before, calls = self._prompt, self._calls
        ids = kwargs.get("input_ids", kwargs.get("inputs", args[0] if args else None))
        self._prompt = (
            ids.shape[1] if isinstance(ids, Tensor) and ids.dim() == 2 else None
        )
        try:
            answer = self._dense_generate(*args, **kwargs)
        finally:
            self._prompt = before
        if self._calls == calls and gives_images(kwargs):
            raise failures.not_pruned(
                self._model, "a generate that runs past its forward"
            )
        return answer

    def _named(self, *args: object, **kwargs: object) -> Arguments:
        """Arguments by the names that the model has for them."""
        if args and args[0] is self._model:
            args = args[1:]  # bound to the model, as accelerate binds what it unwraps
        given = self._signature.bind_partial(*args, **kwargs)
        named = given.arguments | given.arguments.pop("kwargs", {})
        refuse_unknown(named, self._known)
        cache = given_cache(named)
        named = {n: value for n, value in named.items() if n not in CACHE_NAMES}
        return named if cache is None else named | {self._cache: cache}

    def _run_first(self, named: Arguments) -> CausalLMOutputWithPast:
        """Run a prompt, and candidates for its answer that come with it."""
        prompt, ids = self._prompt, named.get("input_ids")
        if prompt is None or ids is None or ids.shape[1] <= prompt:
            return self._run_prompt(named)
        checks.check_states(named)
        first, candidates = parted(named, prompt, self._cache)
        outputs = self._run_prompt(first | {"logits_to_keep": 1})
        step = self._run_step(candidates | {self._cache: cache_of(outputs)})
        parts = [part.logits for part in (outputs, step) if part.logits is not None]
        step.logits = torch.cat(parts, dim=1)
        return step

    def _run_prompt(self, named: Arguments) -> CausalLMOutputWithPast:
        given: Cache | None = named.get(self._cache)
        ragged.check_can_be_ragged(given)
        static = given if isinstance(given, StaticCache) else None
        if static is not None:
            # Its layers are allocated once it is known how long they become.
            named[self._cache] = DynamicCache(config=self._text)
            named["attention_mask"] = without_room(named)
        places = self._visual(named.get("input_ids"))
        prompt = ragged.Prompt.of(places, named.get("attention_mask"))
        self._check_prompt(named, prompt)
        counts = self._counts_of(prompt, named)
        self._counts = counts
        self._must_prune = gives_images(named) and self._drops(counts)
        outputs = self._run_encoded(named, self._graph_for(counts))
        filled: Cache | None = cache_of(outputs)
        if filled is not None:
            room = None if static is None else static.get_max_length()
            lost = None
            if counts.per_sample:
                lost = counts.dropped_before(prompt.visual, self._layers)
            ragged.make_ragged(filled, prompt, room, lost)
        if static is not None and filled is not None:
            static.layers = filled.layers
            setattr(outputs, self._cache, static)
        return outputs

    def _check_prompt(self, named: Arguments, prompt: ragged.Prompt) -> None:
        """Refuse a prompt of which something would be lost; map what can be mapped."""
        check_one_sequence(named.get("position_ids"), named.get("attention_mask"))
        if prompt.images is None:
            if gives_images(named):
                raise failures.mismatch("images, and no placeholder")
            return
        checks.check_labels(named)
        if (asked := named.get("logits_to_keep")) is not None:
            span, came = prompt.images, prompt.came
            named["logits_to_keep"] = kept_logits(asked, span, came)

    def _counts_of(self, prompt: ragged.Prompt, named: Arguments) -> PromptCounts:
        """How many tokens a batch drops, refused if it cannot."""
        most = int(prompt.visual.max())
        recipe = self._asked or self._recipe_for(most)
        if self._recipe is None and most and self.report is None:
            say_default(recipe)
        made = any(graph.per_sample for graph in self._compiled)
        per_sample = self._places is not None and made and len(prompt.visual) > 1
        counts = PromptCounts.of(recipe, prompt, per_sample=per_sample)
        if counts.per_sample and named.get("attention_mask") is None:
            named["attention_mask"] = torch.ones_like(named["input_ids"])
        return counts

    def _recipe_for(self, visual: int) -> Recipe:
        return self._recipe or default_recipe(self._layers, max(visual, 1))

    def _drops(self, counts: PromptCounts) -> bool:
        """Whether the graph of a prompt with images has cuts."""
        recipe = counts.recipe
        if self._places is not None or recipe.adaptive:
            return bool((self._places or recipe).cuts)
        return bool(recipe.drops(max(counts.visual, 1)))

    def _run_encoded(self, named: Arguments, graph: _MadeFor) -> CausalLMOutputWithPast:
        """Run a prompt in one graph, after encoders that Dynamo cannot trace."""
        named = encoded(self._model, named, anyway=self._encodes_first)
        mark_prompt(named, fixed=self._options["mode"] is not None)
        try:
            with self._encoding_images(named), self._forgetting_failures():
                return self._compiled_for(graph)(**named)
        except Unsupported:
            if self._encodes_first or not gives_pixels(named):
                raise
        self._encodes_first = True
        return self._run_encoded(named, graph)

    @contextlib.contextmanager
    def _forgetting_failures(self) -> Iterator[None]:
        """Drop what was made for a prompt that fails: it fits no other prompt."""
        before = dict(self._compiled)
        try:
            yield
        except Exception:
            self._compiled = before
            raise

    def _encoding_images(
        self, named: Arguments
    ) -> contextlib.AbstractContextManager[None]:
        """Let one graph encode images, any number of them."""
        pixels = named.get("pixel_values")
        if not self._sees_tower or pixels is None:
            return contextlib.nullcontext()
        refuse_mixed_up(named["input_ids"], pixels)
        if named.get("return_dict") is self._model.config.return_dict:
            # Dynamo reads no signature, as encoding does, once that is taken off.
            del named["return_dict"]
        return images_as_one_sequence(self._model)

    def _visual(self, ids: Tensor | None) -> Tensor:
        """[B, S] bool: which tokens are visual."""
        if ids is None:
            raise InputError(
                "input_ids",
                expected="the prompt's ids, of which some are visual tokens",
                found="none",
                fix="Pass input_ids, not inputs_embeds.",
            )
        return torch.isin(ids, self._visual_ids.to(ids.device))

    def _graph_for(self, counts: PromptCounts) -> _MadeFor:
        """What a batch needs a graph for.

        Numbers come with each run, if they can. Else shares become counts when a graph
        is made; where samples then drop different numbers, a graph that drops nearly as
        many will do.
        """
        if counts.visual == 0:
            return _ANY
        if self._places is not None:
            return _MadeFor(0, counts.per_sample)
        if self._recipe is not None and self._recipe.of is None:
            return _ANY
        if counts.per_sample:
            enough = range(int(_NEARLY * counts.visual), counts.visual + 1)
            made = [k for k in self._compiled if k.per_sample and k.visual in enough]
            if made:
                return max(made, key=lambda graph: graph.visual)
        return _MadeFor(counts.visual, counts.per_sample)

    def _compiled_for(self, graph: _MadeFor) -> Forward:
        """The compiled model for some prompts, or for steps."""
        if graph not in self._compiled:
            options = self._options | {
                "on_report": self._note,
                "on_dense": self._note_dense,
                "per_sample": graph.per_sample,
                "visual_tokens": self._visual_now,
            }
            if self._places is not None:
                options["schedule"] = self._schedule
            self._compiled[graph] = torch.compile(  # type: ignore[call-overload] # missing
                self._dense,
                backend=vtprune_backend,
                options=options,
                fullgraph=True,
                # Graphs for other numbers do not count as recompilations of this one.
                isolate_recompiles=True,
                recompile_limit=_GRAPHS,
            )
        return self._compiled[graph]

    def _visual_now(self) -> int:
        """Visual tokens that shares of the prompt that runs are taken of."""
        assert self._counts is not None
        return self._counts.visual

    def _schedule(self) -> Tensor:
        """The numbers of the prompt that runs, as ``PrunePlan.schedule``."""
        assert self._places is not None
        assert self._counts is not None
        return self._counts.schedule([cut.layer for cut in self._places.cuts])

    def _run_step(self, named: Arguments) -> CausalLMOutputWithPast:
        self._must_prune = False
        cache: Cache = named[self._cache]
        samples, new = first_given(named, "input_ids", "inputs_embeds").shape[:2]
        if samples > 1 and new > 1:
            ragged.check_padding(named.get("attention_mask"))
        mask = ragged.attention_mask(cache, new)
        if gives_images(named):
            checks.check_later_images(self._model, named)
        # Later images are not pruned, so no graph needs to have their encoders.
        named = encoded(self._model, named, anyway=True)
        if named.get(FEATURES):
            checks.check_features(self._model, named[FEATURES], named.get("input_ids"))
        mark_prompt(named | {"attention_mask": None})
        mark_step(cache, mask)
        step = self._compiled_for(_ANY) if self._decode else self._dense
        return step(**named | {"attention_mask": mask})
