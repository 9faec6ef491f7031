"""Statistics of an unpruned model for FitPrune's recipe search.

Shapes: N samples, L layers, V visual tokens (of the sample that has most).
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedModel

from vtprune_fx.errors import InputError, first_sentence
from vtprune_fx.files import replace_file
from vtprune_fx.fitting.observe import Watch, unobservable, watching
from vtprune_fx.models.placeholders import is_visual
from vtprune_fx.scorers.roles import PADDING, VISUAL


@dataclass(frozen=True)
class Statistics:
    """Attention that visual tokens receive in an unpruned model.

    Visual tokens are in prompt order, followed by zeros in a sample that has fewer than
    V of them. ``observe.Received`` defines the attention.

    Attributes:
        cross: [N, L, V] float32, from the instruction.
        own: [N, L, V] float32, from visual tokens.
        cross_share: [N, L, V] float32, mean over heads, from the instruction.
        own_share: [N, L, V] float32, mean over heads, from visual tokens.
        visual: [N] int64, visual tokens of each sample.
        text: [N] int64, its other tokens.
    """

    cross: Tensor
    own: Tensor
    cross_share: Tensor
    own_share: Tensor
    visual: Tensor
    text: Tensor

    @property
    def present(self) -> Tensor:
        """[N, V] bool: where a visual token is."""
        return torch.arange(self.cross.shape[2]) < self.visual[:, None]

    def rows(self, samples: Tensor) -> Statistics:
        """Statistics of some samples, by their [N'] numbers, in that order."""
        fields = (f.name for f in dataclasses.fields(self))
        return Statistics(**{name: getattr(self, name)[samples] for name in fields})


_PER_TOKEN = ("cross", "own", "cross_share", "own_share")


def observe(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> Statistics:
    """Run a model on a batch, inside ``observe.observed``, and return its statistics.

    Args:
        model: An unmodified transformers model.
        inputs: What its processor returns, padded on either side.

    Raises:
        InputError: A sample has no visual token, or the attention was not observed.
    """
    visual = is_visual(inputs["input_ids"], model.config)
    if not visual.any(dim=1).all():
        raise InputError(
            "calibration prompts",
            expected="an image in each",
            found="a prompt without a visual token",
            fix="Take it out, or give it an image.",
        )
    watch = Watch(visual)
    with torch.no_grad(), watching(watch):
        model.base_model(**inputs, use_cache=False)  # no logits
    layers: int = model.config.get_text_config().num_hidden_layers
    if len(watch.received) != layers or watch.roles is None:
        found = f"{len(watch.received)} of {layers} layers that called it"
        raise unobservable(model, found)
    counts = (watch.roles == VISUAL).sum(dim=1)
    values = {
        name: torch.stack(
            [_visual_first(getattr(r, name), watch.roles) for r in watch.received], 1
        ).cpu()
        for name in _PER_TOKEN
    }
    text = ((watch.roles != VISUAL) & (watch.roles != PADDING)).sum(dim=1)
    return Statistics(**values, visual=counts.cpu(), text=text.cpu())


def _visual_first(received: Tensor, roles: Tensor) -> Tensor:
    """[B, V]: of [B, S] the visual tokens, in order, followed by zeros."""
    visual = roles == VISUAL
    width = int(visual.sum(dim=1).max())
    order = visual.long().argsort(dim=1, descending=True, stable=True)[:, :width]
    return received.masked_fill(~visual, 0).gather(1, order)


def merged(parts: Sequence[Statistics]) -> Statistics:
    """Statistics of the samples of all parts, in their order."""
    width = max(part.cross.shape[2] for part in parts)
    values = {
        name: torch.cat(
            [pad(v, (0, width - v.shape[2])) for v in _each(parts, name)], dim=0
        )
        for name in _PER_TOKEN
    }
    ends = {name: torch.cat(_each(parts, name)) for name in ("visual", "text")}
    return Statistics(**values, **ends)


def _each(parts: Sequence[Statistics], name: str) -> list[Tensor]:
    return [getattr(part, name) for part in parts]


def save_statistics(
    statistics: Statistics, file: Path, origin: Mapping[str, str]
) -> None:
    """Write a safetensors file.

    Args:
        statistics: Of some samples.
        file: Where to.
        origin: Fingerprints of their model and data.

    Raises:
        InputError: The file cannot be written.
    """
    tensors = {
        f.name: getattr(statistics, f.name) for f in dataclasses.fields(statistics)
    }
    metadata = {**origin, _CONTENTS: _checksum(tensors)}
    replace_file(file, save(tensors, metadata=metadata))


_CONTENTS = "contents"
"""Of a file's metadata: a checksum of the tensors that were written."""


def _checksum(tensors: Mapping[str, Tensor]) -> str:
    content = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        content.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        content.update(value.contiguous().numpy().tobytes())
    return content.hexdigest()[:16]


def load_statistics(file: Path, origin: Mapping[str, str]) -> Statistics:
    """Read what ``save_statistics`` wrote.

    Args:
        file: A safetensors file.
        origin: Fingerprints that it must have.

    Raises:
        InputError: It cannot be read, is of something else, or was changed.
    """
    try:
        with safe_open(file, framework="pt") as opened:
            found = opened.metadata() or {}
            names = [f.name for f in dataclasses.fields(Statistics)]
            values = {name: opened.get_tensor(name) for name in names}
    except (OSError, SafetensorError) as error:
        raise _broken(file, first_sentence(error)) from error
    _check_origin(file, found, origin)
    if found.get(_CONTENTS) != _checksum(values):
        raise _broken(file, "contents that do not match its checksum")
    return Statistics(**values)


def _broken(file: Path, found: str) -> InputError:
    return InputError(
        f"statistics {file}",
        expected="a safetensors file as `vtprune fit` wrote it",
        found=found,
        fix="Delete it, and `vtprune fit` will make it anew.",
    )


def _check_origin(
    file: Path, found: Mapping[str, str], expected: Mapping[str, str]
) -> None:
    for what, value in expected.items():
        if found.get(what) != value:
            raise InputError(
                f"statistics {file}",
                expected=f"those of {what} {value}",
                found=f"{what} {found.get(what, 'unknown')}",
                fix="Name the model and data it was made with, or another folder.",
            )


class Counts:
    """Drops of each layer at a tolerance, estimated from the statistics.

    A layer drops only tokens that are present, and these receive more once others are
    dropped: a row of attention sums to 1. The estimate is that every head and row
    gives the dropped tokens' average attention to all others.

    Args:
        statistics: Of the calibration prompts.
    """

    def __init__(self, statistics: Statistics) -> None:
        self._present = statistics.present
        self._layers = [
            [
                _Layer(received[:, layer], share[:, layer], self._present)
                for received, share in (
                    (statistics.cross, statistics.cross_share),
                    (statistics.own, statistics.own_share),
                )
            ]
            for layer in range(statistics.cross.shape[1])
        ]

    def __call__(self, tolerance: float) -> Iterator[Tensor]:
        """Drop tokens, layer by layer.

        Args:
            tolerance: Share of the attention that a layer may lose, alpha.

        Yields:
            [N] for each layer, how many tokens each sample loses.
        """
        left = self._present
        for cross, own in self._layers:
            drop = cross.may_drop(left, tolerance) & own.may_drop(left, tolerance)
            left = left & ~drop
            yield drop.sum(dim=1)


class _Layer:
    """One sum of one layer, its tokens in order. Shapes: [N, V]."""

    def __init__(self, received: Tensor, share: Tensor, present: Tensor) -> None:
        self.ranked, self.order = ranked(received, present)
        self.share, self.total = share.double(), received.double().sum(dim=1)

    def may_drop(self, left: Tensor, tolerance: float) -> Tensor:
        # Instead of raising the attention of present tokens, lower the bound.
        given_up = self.share.masked_fill(left, 0).sum(dim=1)
        least = self.total * (1 - tolerance) * (1 - given_up)
        return lightest(self.ranked, self.order, left, least)


def ranked(received: Tensor, present: Tensor) -> tuple[Tensor, Tensor]:
    """Values in float64 from the largest on, and their tokens' indices; [N, V] all.

    Absent tokens come first; of equals the later one does.
    """
    absent = received.double().masked_fill(~present, torch.inf)
    values, order = absent.sort(dim=1, stable=True)
    return values.flip(1), order.flip(1)


def lightest(ranked: Tensor, order: Tensor, left: Tensor, least: Tensor) -> Tensor:
    """The most tokens, smallest values first, whose removal keeps enough of the sum.

    All candidates at once, by prefix sums.

    Args:
        ranked: [N, V], values from the function of that name.
        order: [N, V], indices from it.
        left: [N, V] bool, the tokens that are present; others are ignored.
        least: [N], the least sum of the values of kept tokens.

    Returns:
        [N, V] bool.
    """
    present = left.gather(1, order)
    values = ranked.masked_fill(~present, 0)
    # What is larger; exactly nothing for the largest.
    remains = values.cumsum(dim=1) - values
    fits = present & (remains >= least[:, None])
    return torch.zeros_like(left).scatter(1, order, fits)
