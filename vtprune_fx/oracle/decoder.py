"""The oracle's run of a model: the model's layers, one sample, one layer at a time.

The code relies only on what transformers' decoders share: a list of layers, rotary
tables, a norm. A layer runs unmodified, with an attention that is written out here and
records its inputs: transformers has a registry for that.

Letters in shapes are those of ``oracle``.
"""

from __future__ import annotations

import contextlib
import inspect
from contextlib import AbstractContextManager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import sdpa_mask

from vtprune_fx.errors import PlanError
from vtprune_fx.models.ragged_attention import (
    attention_implementation,
    can_set_attention,
    check_decoder,
)

ATTENTION = "vtprune_oracle"
"""Name of the attention implementation in transformers' registries."""


@dataclass(eq=False)
class Heads:
    """Inputs of the attention of one layer, and its probabilities.

    Attributes:
        allowed: Which keys each query may attend to. [q, m] bool
        before: Keys and values that the layer has cached, two of [K, m - q, d].
        query: Rotated. [H, q, d]
        key: Rotated, the cached ones first. [K, m, d]
        value: As ``key``.
        scale: The factor of the logits.
        probabilities: The attention, float32 whatever the model's precision. [H, q, m]
    """

    allowed: Tensor
    before: tuple[Tensor, Tensor] | None = None
    query: Tensor = field(init=False)
    key: Tensor = field(init=False)
    value: Tensor = field(init=False)
    scale: float = field(init=False)
    probabilities: Tensor = field(init=False)


_heads: ContextVar[Heads] = ContextVar("vtprune_oracle_heads")


def _attend(
    _: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *__: object,
    scaling: float | None = None,
    **___: object,
) -> tuple[Tensor, None]:
    """Attention of one sample, written out: [1, q, H, d]."""
    heads = _heads.get()
    heads.query, heads.key, heads.value = query[0], key[0], value[0]
    if heads.before is not None:
        heads.key = torch.cat((heads.before[0], heads.key), dim=1)
        heads.value = torch.cat((heads.before[1], heads.value), dim=1)
    heads.scale = scaling or query.shape[-1] ** -0.5
    group = len(heads.query) // len(heads.key)
    # Each key head serves H/K query heads in a row.
    keys, values = (
        part.repeat_interleave(group, dim=0) for part in (heads.key, heads.value)
    )
    logits = heads.query @ keys.transpose(1, 2) * heads.scale
    logits = logits.masked_fill(~heads.allowed, float("-inf"))
    heads.probabilities = logits.softmax(dim=-1, dtype=torch.float32)
    mixed = heads.probabilities.to(values.dtype) @ values
    return mixed.transpose(0, 1)[None], None


AttentionInterface.register(ATTENTION, _attend)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)


class _Parts(Protocol):
    """Parts that transformers' decoders share."""

    config: _Config
    layers: nn.ModuleList
    rotary_emb: nn.Module
    norm: nn.Module
    embed_tokens: nn.Module


class _Config(Protocol):
    """The part of a decoder's configuration that is read."""

    layer_types: list[str]


class Decoder:
    """A model's decoder, to run layer by layer.

    Args:
        model: An unmodified vision-language model.

    Attributes:
        layers: Its layers.

    Raises:
        PlanError: It lacks a part that transformers' decoders share.
        InputError: ``ragged_attention.check_decoder`` refuses it.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._decoder: _Parts = model.get_decoder()
        check_decoder(model.config.get_text_config())
        parts = ("layers", "rotary_emb", "norm", "embed_tokens")
        missing = [part for part in parts if not hasattr(self._decoder, part)]
        if missing or not can_set_attention(model):
            raise PlanError(
                "oracle",
                expected="a decoder that is built as transformers' are",
                found=f"{type(self._decoder).__name__} without {', '.join(missing)}",
                fix="Check a graph of this model against the unpruned model.",
            )
        self.layers = list(self._decoder.layers)

    def running(self) -> AbstractContextManager[None]:
        """Run the layers with this module's attention inside the block."""
        return attention_implementation(self._model, ATTENTION)

    def embed(self, ids: Tensor) -> Tensor:
        """[n] -> [n, h]."""
        found: Tensor = self._decoder.embed_tokens(ids)
        return found

    def tables(
        self, index: int, hidden: Tensor, positions: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The layer's rotary tables at [m] or [axes, m] positions: two of [m, d]."""
        rotary = self._decoder.rotary_emb
        kinds = {}
        if "layer_type" in inspect.signature(rotary.forward).parameters:
            kinds = {"layer_type": self._decoder.config.layer_types[index]}
        tables = rotary(hidden[None], positions[..., None, :], **kinds)
        if isinstance(tables, Tensor):
            raise PlanError(
                "oracle, rotary positions",
                expected="two tables, of cosines and sines",
                found=f"one of {tables.dtype}".replace("torch.", ""),
                fix="Check a graph of this model against the unpruned model.",
            )
        cos, sin = tables
        return cos[0], sin[0]

    def run(
        self, index: int, hidden: Tensor, tables: tuple[Tensor, Tensor], heads: Heads
    ) -> Tensor:
        """One layer: [m, h] -> [m, h]. ``heads`` is filled in."""
        noting = _heads.set(heads)
        try:
            output = self.layers[index](
                hidden[None],
                attention_mask=None,
                position_embeddings=(tables[0][None], tables[1][None]),
            )
        finally:
            _heads.reset(noting)
        found: Tensor = (output if isinstance(output, Tensor) else output[0])[0]
        return found

    def finish(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Final norm, and logits: [m, h] and [m, vocab]."""
        normed: Tensor = self._decoder.norm(hidden)
        return normed, self._model.get_output_embeddings()(normed)


@dataclass(frozen=True, eq=False)
class Entered:
    """A padded batch before its first decoder layer.

    Attributes:
        hidden: Embeddings, features in their places. [B, S, h]
        positions: Those of the rotary tables. [B or 1, S] or [axes, B, S]
        mask: The mask of the layer's attention, or None. [B or 1, 1, S, S] bool
        later: Features added to visual tokens after the first layers, [v, h] each.
    """

    hidden: Tensor
    positions: Tensor
    mask: Tensor | None
    later: list[Tensor]


_Args = tuple[object, ...]
_Kwargs = dict[str, object]


class _Stop(Exception):  # noqa: N818 - a way out of the model, not an error
    """Ends a run at the first layer."""


def enter(model: PreTrainedModel, **inputs: object) -> Entered:
    """Run an unmodified model up to its first decoder layer."""
    decoder, noted = Decoder(model), dict[str, Any]()
    module: nn.Module = model.get_decoder()

    def called(_: nn.Module, args: _Args, kwargs: _Kwargs) -> None:
        noted["later"] = kwargs.get("deepstack_visual_embeds") or []

    def rotated(_: nn.Module, args: _Args, kwargs: _Kwargs) -> None:
        noted["positions"] = kwargs.get("position_ids", args[-1])
        if len(args) > 1:
            noted["positions"] = args[1]

    def first(_: nn.Module, args: _Args, kwargs: _Kwargs) -> None:
        noted["hidden"] = args[0] if args else kwargs["hidden_states"]
        noted["mask"] = kwargs["attention_mask"]
        raise _Stop

    hooks = [
        watched.register_forward_pre_hook(hook, with_kwargs=True)
        for watched, hook in (
            (module, called),
            (module.get_submodule("rotary_emb"), rotated),
            (decoder.layers[0], first),
        )
    ]
    with decoder.running(), contextlib.suppress(_Stop):
        try:
            model.base_model(**inputs, use_cache=False)
        finally:
            for hook in hooks:
                hook.remove()
    return Entered(**noted)
