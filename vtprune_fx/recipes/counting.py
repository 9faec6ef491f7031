"""What a recipe saves, counted exactly: MACs, FLOPs and bytes of KV cache.

The unit of arithmetic is the MAC (one multiplication and one addition). A decoder layer
with ``n`` tokens, hidden size ``d``, MLP width ``m``, ``h`` query heads and ``g``
key/value heads of width ``w`` takes, per sample:

* before an ``after_attention`` cut: ``n d h w`` (queries), ``2 n d g w`` (keys and
  values), ``2 n^2 h w`` (scores, and the weighted sum of the values);
* after it, with the ``n'`` tokens that are left: ``n' h w d`` (output projection) and
  ``3 n' d m`` (the three matrices of a gated MLP).

With a cut ``after_layer`` all of the layer runs on ``n`` tokens, with one
``before_layer`` on ``n'``.

With ``h w = g w = d`` that is ``3nd^2 + 2n^2d`` and ``n'd^2 + 3n'dm``, the count of
FitPrune (arXiv:2409.10197). Attention is counted in full, without halving it for the
causal mask or cropping it to a sliding window. Left out: the vision tower, projector
and language-model head, which pruning does not change, and norms, softmax, rotary
embedding and biases, which are linear in ``n`` and small.

The scorer's arithmetic is not in the pruned MACs; ``Work.scorer_macs`` has it.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self, TypeVar

from vtprune_fx.errors import InputError, PlanError
from vtprune_fx.scorers import registry

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedConfig

    from vtprune_fx.recipes.schema import Recipe, Site

Tokens = TypeVar("Tokens", int, "Tensor")
"""A number of tokens, or several."""


@dataclass(frozen=True)
class Geometry:
    """The sizes of a decoder that its cost depends on.

    Attributes:
        layers: Decoder layers.
        hidden: Width of the residual stream.
        intermediate: Width of the gated MLP.
        heads: Query heads.
        kv_heads: Key/value heads; fewer than ``heads`` with grouped-query attention.
        head_dim: Width of a head.
        kv_bytes: Bytes of one number in the KV cache; 2 for float16 and bfloat16.
    """

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    kv_bytes: int = 2

    @classmethod
    def from_config(cls, config: PreTrainedConfig) -> Self:
        """Read the sizes from a transformers config, its nested text config included.

        A config without a dtype is taken to run in 16 bits.

        Raises:
            InputError: The config lacks a size, or its layers mix experts.
        """
        text = config.get_text_config(decoder=True)
        _refuse_experts(text)
        hidden, heads = _size(text, "hidden_size"), _size(text, "num_attention_heads")
        kv_heads, head_dim = key_value_sizes(text)
        dtype = getattr(text, "dtype", None) or getattr(config, "dtype", None)
        return cls(
            layers=_size(text, "num_hidden_layers"),
            hidden=hidden,
            intermediate=_size(text, "intermediate_size"),
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            kv_bytes=getattr(dtype, "itemsize", 2),
        )

    def macs_before_cut(self, tokens: Tokens) -> Tokens:
        """MACs of one layer's query, key, value projections and attention."""
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return tokens * self.hidden * (queries + 2 * keys) + 2 * tokens**2 * queries

    def macs_after_cut(self, tokens: Tokens) -> Tokens:
        """MACs of one layer's output projection and MLP."""
        return (
            tokens * self.hidden * (self.heads * self.head_dim + 3 * self.intermediate)
        )

    def scorer_macs(self, tokens: int, rows: int | None) -> int:
        """MACs of a scorer at one cut: some rows of the product of Q and K once more.

        An upper bound: all columns, of which it reads the visual ones.

        Args:
            tokens: Tokens before the cut.
            rows: Query rows, None for all.
        """
        return (tokens if rows is None else rows) * tokens * self.heads * self.head_dim

    def look_ahead_macs(self, tokens: int) -> int:
        """MACs of the queries and keys that a cut ``before_layer`` is rated by."""
        return tokens * self.hidden * (self.heads + self.kv_heads) * self.head_dim

    def cache_bytes(self, tokens: int) -> int:
        """Bytes of one layer's keys and values."""
        return 2 * tokens * self.kv_heads * self.head_dim * self.kv_bytes


def key_value_sizes(text: PreTrainedConfig) -> tuple[int, int]:
    """Key/value heads of a decoder, and the width of a head.

    Args:
        text: The decoder's configuration.

    Raises:
        InputError: It lacks a size.
    """
    heads = _size(text, "num_attention_heads")
    groups = getattr(text, "num_key_value_heads", None) or heads
    given = getattr(text, "head_dim", None)
    return groups, given or _size(text, "hidden_size") // heads


LLAVA_1_5_7B = Geometry(
    layers=32, hidden=4096, intermediate=11008, heads=32, kv_heads=32, head_dim=128
)
"""Decoder of LLaVA-1.5-7B (Vicuna-7B, 16 bits); LLaVA-HR and -NeXT share it."""


@dataclass(frozen=True)
class Work:
    """The prefill of one sample, dense and pruned.

    Attributes:
        dense_macs: MACs without pruning.
        pruned_macs: MACs with it, without the scorer's.
        scorer_macs: MACs of the scorer, over all layers with a cut.
        dense_cache_bytes: KV cache without pruning.
        pruned_cache_bytes: KV cache with it; a layer caches the tokens that enter it.
    """

    dense_macs: int
    pruned_macs: int
    scorer_macs: int
    dense_cache_bytes: int
    pruned_cache_bytes: int

    @property
    def dense_flops(self) -> int:
        """FLOPs without pruning: 2 x MACs."""
        return 2 * self.dense_macs

    @property
    def pruned_flops(self) -> int:
        """FLOPs with pruning: 2 x MACs."""
        return 2 * self.pruned_macs

    @property
    def ratio(self) -> float:
        """Pruned MACs over dense MACs; 1 where there is nothing to compute."""
        return self.pruned_macs / self.dense_macs if self.dense_macs else 1.0

    @property
    def saved(self) -> float:
        """Share of the dense MACs that pruning saves, 0 to 1."""
        return 1.0 - self.ratio

    @property
    def cache_ratio(self) -> float:
        """Pruned KV-cache bytes over dense ones; 1 where there are none."""
        if not self.dense_cache_bytes:
            return 1.0
        return self.pruned_cache_bytes / self.dense_cache_bytes


@dataclass(frozen=True)
class Cost:
    """What one sample costs under a recipe.

    Attributes:
        visual_tokens: Visual tokens of the sample.
        text_tokens: All its other tokens.
        entering: Visual tokens that enter each layer's attention.
        after: Visual tokens left after each layer's cut.
        visual: The count papers on FitPrune use: over the visual tokens alone.
        total: The count over visual and text tokens.
    """

    visual_tokens: int
    text_tokens: int
    entering: tuple[int, ...]
    after: tuple[int, ...]
    visual: Work
    total: Work


def cost(
    recipe: Recipe, geometry: Geometry, visual_tokens: int, text_tokens: int
) -> Cost:
    """Count what a sample costs, dense and under a recipe.

    Args:
        recipe: Where and how many visual tokens are dropped.
        geometry: Sizes of the decoder.
        visual_tokens: Visual tokens of the sample.
        text_tokens: All its other tokens.

    Raises:
        InputError: A number of tokens is negative.
        PlanError: The recipe cuts in a layer that the decoder does not have.
    """
    _check(recipe, geometry, visual_tokens, text_tokens)
    after = tuple(recipe.tokens_per_layer(visual_tokens, geometry.layers))
    sites = {cut.layer: cut.site for cut in recipe.cuts}
    entering = tuple(
        left if sites.get(layer) == "before_layer" else came
        for layer, (came, left) in enumerate(
            zip((visual_tokens, *after), after, strict=False)
        )
    )
    return Cost(
        visual_tokens=visual_tokens,
        text_tokens=text_tokens,
        entering=entering,
        after=after,
        visual=_work(recipe, geometry, (visual_tokens, *after), 0),
        total=_work(recipe, geometry, (visual_tokens, *after), text_tokens),
    )


def _work(
    recipe: Recipe, geometry: Geometry, visual: tuple[int, ...], text_tokens: int
) -> Work:
    """The work of all layers, by the visual tokens before and after each."""
    sites = {cut.layer: cut.site for cut in recipe.cuts}
    counts = [tokens + text_tokens for tokens in visual]
    dense = _Spent(geometry, recipe.score)
    pruned = _Spent(geometry, recipe.score)
    for layer, (came, left) in enumerate(itertools.pairwise(counts)):
        dense.add(counts[0], counts[0], None)
        pruned.add(came, left, sites.get(layer))
    return Work(
        dense_macs=dense.macs,
        pruned_macs=pruned.macs,
        scorer_macs=pruned.scorer_macs,
        dense_cache_bytes=dense.cache_bytes,
        pruned_cache_bytes=pruned.cache_bytes,
    )


class _Spent:
    """What layers cost, one after the other."""

    def __init__(self, geometry: Geometry, score: str) -> None:
        self._geometry, self._rows = geometry, registry.rows(score)
        self.macs = self.scorer_macs = self.cache_bytes = 0

    def add(self, came: int, left: int, site: Site | None) -> None:
        """Add a layer with ``came`` tokens before and ``left`` after it."""
        geometry = self._geometry
        attended = left if site == "before_layer" else came
        finished = came if site == "after_layer" else left
        self.macs += geometry.macs_before_cut(attended)
        self.macs += geometry.macs_after_cut(finished)
        self.cache_bytes += geometry.cache_bytes(attended)
        if left < came and self._rows != 0:
            self.scorer_macs += geometry.scorer_macs(came, self._rows)
            if site == "before_layer":
                self.scorer_macs += geometry.look_ahead_macs(came)


def _check(
    recipe: Recipe, geometry: Geometry, visual_tokens: int, text_tokens: int
) -> None:
    for what, count in (("visual", visual_tokens), ("text", text_tokens)):
        if count < 0:
            raise InputError(
                f"number of {what} tokens",
                expected="0 or more",
                found=str(count),
                fix="Pass the number of tokens in the prompt.",
            )
    last = max((cut.layer for cut in recipe.cuts), default=0)
    if last >= geometry.layers:
        raise PlanError(
            f"recipe {recipe.name}",
            expected=f"cuts in the {geometry.layers} layers of the decoder",
            found=f"a cut in layer {last}",
            fix=f"Use a recipe for {geometry.layers} layers.",
        )


def _size(config: PreTrainedConfig, field: str) -> int:
    value = getattr(config, field, None)
    if isinstance(value, int):
        return value
    raise _config_error(config, field, expected="an integer", found=repr(value))


def _refuse_experts(config: PreTrainedConfig) -> None:
    for field in ("num_experts", "num_local_experts", "n_routed_experts"):
        if value := getattr(config, field, None):
            raise _config_error(config, field, expected="none", found=repr(value))


def _config_error(
    config: PreTrainedConfig, field: str, *, expected: str, found: str
) -> InputError:
    return InputError(
        f"config {type(config).__name__}, field {field}",
        expected=expected,
        found=found,
        fix="Costs are counted for decoders of dense layers with gated MLPs.",
    )
