"""FitPrune's search as published: attention recomputed on the pruned sequence.

A trial of one tolerance runs the decoder layer by layer. Tokens are dropped at the end
of a layer; the method drops them from the attention output and residual, and nothing
reads what the layer computes of them afterwards. Samples of a batch lose different
tokens; the batch becomes as short as its longest sample, the others padded on the left.

No tolerance changes anything before the first cut: every trial starts from the output
of the first layer, recorded when statistics were taken of the unpruned model.

Shapes: B samples of a batch, S tokens, L layers, N samples.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict, cast

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from vtprune_fx.fitting.attention_statistics import lightest, ranked
from vtprune_fx.fitting.observe import (
    Watch,
    current_watch,
    decoder_layers,
    unobservable,
    watching,
)
from vtprune_fx.models.placeholders import is_visual
from vtprune_fx.scorers.roles import PADDING, VISUAL, token_roles

ROOM = 2**29
"""Bytes of batches kept in memory after the first layer, and as many after the layer
that a trial has reached; further ones are kept in files."""

State = dict[str, Tensor]
"""A batch between two layers.

``hidden`` [B, S, d], ``mask`` [B, 1, S, S] bool, ``roles`` [B, S], the decoder's tables
``cos``, ``sin`` [..., B, S, D] and ``positions`` [..., B, S], and the attention that
tokens received in the layer that ran: ``cross`` and ``own`` [B, S].
"""


@dataclass(frozen=True)
class Step:
    """Token counts of N samples in one layer, all [N].

    Attributes:
        present: Visual tokens that entered it.
        by_cross: How many may be dropped by their attention from the instruction.
        by_own: The same by their attention from visual tokens.
        dropped: How many are in both sets, and are dropped.
    """

    present: Tensor
    by_cross: Tensor
    by_own: Tensor
    dropped: Tensor


class Trials:
    """Trials of tolerances on one model and its calibration prompts.

    Everything runs inside ``observe.observed``.

    Args:
        model: An unmodified transformers model.
        folder: A scratch folder.
    """

    def __init__(self, model: PreTrainedModel, folder: Path) -> None:
        self.model, self.layers = model, decoder_layers(model)
        self._start, self._now = _Shelf(folder / "start"), _Shelf(folder / "now")
        self._started = set[int]()
        self._totals: dict[int, tuple[Tensor, Tensor]] = {}

    @contextlib.contextmanager
    def starting(self, batch: int) -> Iterator[None]:
        """Keep the first layer's output for prompts that are observed in the block.

        Args:
            batch: A number for the prompts.
        """

        def keep(
            _: nn.Module,
            args: tuple[Tensor, ...],
            kwargs: dict[str, object],
            left: Tensor,
        ) -> None:
            options = cast("_Options", kwargs)
            entered = args[0] if args else options["hidden_states"]
            watch = current_watch()
            state = _state(entered, options, watch.visual)
            self._start.put(batch, _after(state, left, watch))
            self._started.add(batch)

        hook = self.layers[0].register_forward_hook(keep, with_kwargs=True)
        try:
            yield
        finally:
            hook.remove()

    @torch.no_grad()
    def add(
        self,
        batch: int,
        inputs: Callable[[], Mapping[str, Tensor]],
        cross: Tensor,
        own: Tensor,
    ) -> None:
        """Add prompts to the trials, run through the first layer if they were not.

        Args:
            batch: A number for the prompts.
            inputs: Returns the processor's batch, padded on either side.
            cross: [B, L], the attention that all visual tokens together receive from
                the instruction in the unpruned model.
            own: [B, L], the same from visual tokens.

        Raises:
            InputError: The decoder's layers do not run as transformers' do.
        """
        if batch not in self._started:
            entered = _entered(self.model, self.layers[0], inputs())
            self._start.put(batch, self._ran(0, entered))
        self._totals[batch] = (cross, own)

    def __call__(self, tolerance: float) -> Iterator[Tensor]:
        """Drop tokens, layer by layer.

        Args:
            tolerance: Share of the attention that a layer may lose, alpha.

        Yields:
            [N] for each layer, how many tokens each sample loses, batch after batch.
        """
        return (step.dropped for step in self.steps(tolerance))

    @torch.no_grad()
    def steps(self, tolerance: float) -> Iterator[Step]:
        """Drop tokens, and count those that each condition allows to drop.

        Args:
            tolerance: Share of the attention that a layer may lose, alpha.

        Yields:
            The counts of each layer.
        """
        for layer in range(len(self.layers)):
            batches = [torch.zeros(4, 0, dtype=torch.int64)]
            for index, totals in self._totals.items():
                state = (self._now if layer else self._start).take(index)
                if layer:
                    state = self._ran(layer, state)
                visual = state["roles"] == VISUAL
                cross, own = (
                    _may_drop(state[what], visual, total[:, layer] * (1 - tolerance))
                    for what, total in zip(("cross", "own"), totals, strict=True)
                )
                sets = (visual, cross, own, cross & own)
                batches.append(torch.stack([s.sum(dim=1) for s in sets]).cpu())
                if layer + 1 < len(self.layers):
                    self._now.put(index, _without(state, cross & own))
            yield Step(*torch.cat(batches, dim=1))

    def _ran(self, index: int, state: State) -> State:
        """The batch after a layer."""
        watch = Watch(state["roles"] == VISUAL, state["roles"])
        with watching(watch):
            hidden = self.layers[index](
                state["hidden"],
                attention_mask=state["mask"],
                position_ids=state["positions"],
                position_embeddings=(state["cos"], state["sin"]),
            )
        if not watch.received:
            raise unobservable(self.model, "attention outside the registry")
        return _after(state, hidden, watch)


def _after(state: State, hidden: Tensor, watch: Watch) -> State:
    """The batch after the layer that ran last."""
    received = watch.received[-1]
    return state | {"hidden": hidden, "cross": received.cross, "own": received.own}


def _may_drop(received: Tensor, visual: Tensor, least: Tensor) -> Tensor:
    return lightest(*ranked(received, visual), visual, least.to(visual.device))


def _without(state: State, drop: Tensor) -> State:
    """The batch without some tokens: [B, S] bool."""
    keep = ~drop & (state["roles"] != PADDING)
    width = int(keep.sum(dim=1).max())
    order = keep.long().argsort(dim=1, stable=True)[:, -width:]
    gone = ~keep.gather(1, order)
    rows = torch.arange(len(order), device=order.device)[:, None]
    mask = state["mask"][rows[:, None], 0, order[:, :, None], order[:, None, :]]
    return {
        "hidden": state["hidden"][rows, order],
        "mask": (mask & ~gone[:, None, :])[:, None],
        "roles": state["roles"][rows, order].masked_fill(gone, PADDING),
        "cos": state["cos"][..., rows, order, :],
        "sin": state["sin"][..., rows, order, :],
        "positions": state["positions"][..., rows, order],
    }


class _Options(TypedDict):
    """Keyword arguments that a decoder hands to its layers."""

    hidden_states: Tensor
    attention_mask: Tensor | None
    position_embeddings: tuple[Tensor, Tensor]
    position_ids: Tensor


class _Entered(Exception):  # noqa: N818 - a way out of the model, not an error
    """Carries the arguments that the decoder passes to its first layer."""

    def __init__(self, hidden: Tensor, options: _Options) -> None:
        super().__init__()
        self.hidden, self.options = hidden, options


def _enter(_: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, object]) -> None:
    options = cast("_Options", kwargs)
    raise _Entered(args[0] if args else options["hidden_states"], options)


def _entered(
    model: PreTrainedModel, first: nn.Module, inputs: Mapping[str, Tensor]
) -> State:
    """A batch before the first layer."""
    hook = first.register_forward_pre_hook(_enter, with_kwargs=True)
    try:
        model.base_model(**inputs, use_cache=False)
    except _Entered as entered:
        visual = is_visual(inputs["input_ids"], model.config)
        return _state(entered.hidden, entered.options, visual)
    finally:
        hook.remove()
    raise unobservable(model, "a first layer that never ran")


def _state(hidden: Tensor, options: _Options, visual: Tensor) -> State:
    """A batch before the first layer, from the decoder's arguments for that layer."""
    mask = options["attention_mask"]
    if mask is None:
        length = hidden.shape[1]
        mask = torch.ones(length, length, dtype=torch.bool, device=hidden.device).tril()
        mask = mask[None, None]
    tables, batch = options["position_embeddings"], len(hidden)
    cos, sin = (t.expand(*t.shape[:-3], batch, *t.shape[-2:]) for t in tables)
    positions = options["position_ids"]
    return {
        "hidden": hidden,
        "mask": mask.expand(batch, *mask.shape[1:]),
        "roles": token_roles(visual, mask),
        "cos": cos,
        "sin": sin,
        "positions": positions.expand(*positions.shape[:-2], batch, hidden.shape[1]),
    }


class _Shelf:
    """Stored batches: in memory up to ``ROOM``, in files beyond it."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._kept = folder, dict[int, State]()
        self._device = torch.device("cpu")
        folder.mkdir(parents=True)

    def put(self, index: int, state: State) -> None:
        self._kept.pop(index, None)
        sizes = (t.nbytes for kept in self._kept.values() for t in kept.values())
        if sum(sizes) + sum(t.nbytes for t in state.values()) <= ROOM:
            self._kept[index] = state
            return
        self._device = state["hidden"].device
        parts = {name: value.contiguous() for name, value in state.items()}
        save_file(parts, self._file(index))

    def take(self, index: int) -> State:
        if index in self._kept:
            return self._kept[index]
        return load_file(self._file(index), device=str(self._device))

    def _file(self, index: int) -> Path:
        return self._folder / f"{index}.safetensors"
