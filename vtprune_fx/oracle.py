"""The oracle: a slow, plain eager pruner that every pruned graph is checked against.

Written for reading. It takes one sample at a time, so it has no batches, no padding
and no attention mask but the causal triangle. It shares no code with the passes and
runs on an unmodified ``LlavaForConditionalGeneration`` whose decoder is a Llama or one
built like it (``DECODERS``). It calls that decoder's own linear layers, norms and
rotary tables; rotary application, attention, scoring and the cut are written out.

At a cut of ``c`` tokens the visual tokens present are rated (``oracle_scores``) and the
``c`` with the lowest score leave, of equals the earlier:

* ``after_attention``: the attention output and the residual, before the output
  projection and the MLP (FitPrune, Ye et al., arXiv:2409.10197);
* ``after_layer``: what the layer gives the next (FastV, SparseVLM);
* ``before_layer``: what the layer gets, rated by the queries and keys that it would
  have had (PyramidDrop).

A layer's keys and values are of what entered its attention. Whoever stays keeps its
rotary position, or with compacted positions those left take the first ones; keys that
are cached already stay as they are. Where a recipe recycles, some of the dropped tokens
become new ones (``oracle_recycling``).

Letters in shapes: ``n`` tokens of the sample, ``m`` of them present in a layer, ``v``
visual tokens, ``h`` hidden size, ``H`` query heads, ``K`` key/value heads, ``d`` head
size, ``L`` layers.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from transformers import GemmaModel, LlamaModel, MistralModel, Qwen2Model

from vtprune_fx import oracle_tower
from vtprune_fx.errors import InputError, PlanError
from vtprune_fx.oracle_recycling import merge
from vtprune_fx.oracle_scores import (
    Seen,
    attention_logits,
    attention_rank,
    causal_attention,
    rate,
    raters,
    softmax,
)

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from transformers import LlavaForConditionalGeneration
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    from vtprune_fx.recipe import Cut, Recipe, Recycle

DECODERS = (LlamaModel, MistralModel, Qwen2Model, GemmaModel)
"""Decoders with the same steps; norms, biases and scales are in their own modules."""

_FROM_ZERO = torch.empty(0, dtype=torch.long)
"""Stands for ``arange(n)`` where a sample is made without positions."""


@dataclass(frozen=True, eq=False)
class Sample:
    """One prompt without padding.

    Attributes:
        input_ids: Token ids, the model's image token where a visual token stands. [n]
        features: The projector's outputs, all images of the sample in order. [v, h]
        positions: Rotary positions; 0, 1, 2, ... where none are given. [n]
        patches: What the vision tower made of each image token's patch, as
            ``oracle_tower.encode`` tells it, where that is known. [v, 1 + w]
    """

    input_ids: Tensor
    features: Tensor
    positions: Tensor = _FROM_ZERO
    patches: Tensor | None = None

    def __post_init__(self) -> None:
        """Fill in the default positions."""
        if self.positions is _FROM_ZERO:
            counted = torch.arange(len(self.input_ids), device=self.input_ids.device)
            object.__setattr__(self, "positions", counted)


@dataclass(eq=False)
class Prefill:
    """What a prefill computed, and the state that decoding goes on from.

    Attributes:
        logits: Of the tokens that survived every cut. [n_final, vocab]
        hidden: The same tokens' hidden states after the final norm. [n_final, h]
        kept: For each layer, which tokens of the sample are present after its cut:
            indices into the sample, ascending, and -1 for new tokens. L of [m after the
            cut]
        keys: Each layer's key cache, rotated. L of [K, m before the cut, d]
        values: Each layer's value cache. L of [K, m before the cut, d]
        next_positions: Rotary position of the next token in each layer: the same in
            all, or with compacted positions less in layers that hold fewer tokens.
        scores: For each layer with a cut, the recipe's scores of the visual tokens
            that were present before it, in order. [v present]
        ranks: For each layer whose count follows it, the rank of the attention.
    """

    logits: Tensor
    hidden: Tensor
    kept: list[Tensor]
    keys: list[Tensor]
    values: list[Tensor]
    next_positions: list[int]
    scores: dict[int, Tensor] = field(default_factory=dict)
    ranks: dict[int, int] = field(default_factory=dict)


@torch.no_grad()
def split_batch(
    model: LlavaForConditionalGeneration,
    input_ids: Tensor,
    attention_mask: Tensor,
    *,
    pixel_values: Tensor | None = None,
    features: Tensor | None = None,
    position_ids: Tensor | None = None,
) -> list[Sample]:
    """Take a padded batch apart into samples.

    Args:
        model: Encodes the images where ``pixel_values`` are given.
        input_ids: Token ids, padded on either side. [B, S]
        attention_mask: 1 where a token stands, 0 where padding does. [B, S]
        pixel_values: The images of the batch in order. [images, 3, height, width]
        features: The projector's outputs for the batch, instead of its images. [v, h]
        position_ids: Rotary positions. [B, S] or [1, S]. Without them positions count
            from the start of the padded row, as in Hugging Face's plain forward: a
            left-padded sample starts at the number of its pads.

    Returns:
        One sample a row. Features go to image tokens in the order of the rows.

    Raises:
        InputError: There are more or fewer features than image tokens.
    """
    if position_ids is None:
        position_ids = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
    position_ids = position_ids.expand_as(input_ids)
    attended = attention_mask.bool()
    visual = (input_ids == model.config.image_token_id) & attended
    counts: list[int] = visual.sum(dim=1).tolist()
    rows, patches = _features(model, pixel_values, features)
    _check_features(len(rows), sum(counts))
    nothing: list[Tensor | None] = [None] * len(counts)
    looked = nothing if patches is None else torch.split(patches, counts)
    features_of = torch.split(rows, counts)
    return [
        Sample(ids[real], own, positions[real], seen)
        for ids, real, own, positions, seen in zip(
            input_ids, attended, features_of, position_ids, looked, strict=True
        )
    ]


@torch.no_grad()
def prefill(
    model: LlavaForConditionalGeneration,
    recipe: Recipe,
    sample: Sample,
    staying: Mapping[int, Tensor] | None = None,
) -> Prefill:
    """Run the prompt through the model and prune it on the way.

    A sample without visual tokens is not pruned.

    Args:
        model: The model.
        recipe: What is pruned.
        sample: The prompt.
        staying: For each layer with a cut, which tokens of the sample stay, where
            another pruner decided; scores are still computed. Not where a recipe makes
            new tokens, which are nobody's in the sample.

    Raises:
        PlanError: The recipe drops more visual tokens than a layer has left, names a
            layer that the model lacks.
        InputError: The sample has more or fewer features than image tokens, or it does
            not tell the patches that the recipe looks at.
    """
    decoder, layers = _decoder(model)
    visual = sample.input_ids == model.config.image_token_id
    cuts = _cuts(recipe, int(visual.sum()), len(layers))
    hidden = _embed(model, sample)
    present = torch.arange(len(hidden), device=hidden.device)
    rating = raters(recipe, hidden, visual, _after_last(visual)) if cuts else visual
    patches = _patches(recipe, sample, visual) if cuts else hidden[:, :0]
    row = _Row(hidden, present, visual, rating, sample.positions, patches)
    kept, keys, values, scores, ranks = [], [], [], {}, {}
    for index, layer in enumerate(layers):
        cut = cuts.get(index)
        stay = None if staying is None or cut is None else staying[index]
        row, key, value, rated = _run_layer(decoder, layer, row, recipe, cut, stay)
        kept.append(row.present)
        keys.append(key)
        values.append(value)
        if rated is not None:
            scores[index] = rated.scores
            if rated.rank is not None:
                ranks[index] = rated.rank
    hidden = _call(decoder.norm, row.hidden)
    logits = _call(model.lm_head, hidden)
    ends = _next_positions(recipe, sample, keys)
    return Prefill(logits, hidden, kept, keys, values, ends, scores, ranks)


def _next_positions(recipe: Recipe, sample: Sample, keys: list[Tensor]) -> list[int]:
    """The position behind the last token that each layer holds."""
    compacted = recipe.positions == "compacted"
    lengths = [key.shape[1] if compacted else len(sample.positions) for key in keys]
    return [int(sample.positions[length - 1]) + 1 for length in lengths]


@torch.no_grad()
def step(model: LlavaForConditionalGeneration, state: Prefill, token: int) -> Tensor:
    """Decode one token: append it to every layer's cache, each of its own length.

    Args:
        model: The model that made the state.
        state: Its caches and next positions are moved on in place.
        token: Id of the token to feed.

    Returns:
        The logits of what comes next. [vocab]
    """
    decoder, layers = _decoder(model)
    device = state.hidden.device
    hidden = _call(decoder.embed_tokens, torch.tensor([token], device=device))
    for index, layer in enumerate(layers):
        position = torch.tensor([state.next_positions[index]], device=device)
        cos, sin = _rotary(decoder, hidden, position)
        query, key, value = _project(layer, hidden, cos, sin)
        state.keys[index] = torch.cat((state.keys[index], key), dim=1)
        state.values[index] = torch.cat((state.values[index], value), dim=1)
        logits = attention_logits(query, state.keys[index], layer.self_attn.scaling)
        attended = _mix(softmax(logits), state.values[index])
        hidden = _finish(layer, attended, hidden)
    state.next_positions = [position + 1 for position in state.next_positions]
    return _call(model.lm_head, _call(decoder.norm, hidden))[0]


def generate(
    model: LlavaForConditionalGeneration,
    recipe: Recipe,
    sample: Sample,
    max_new_tokens: int,
    eos: Collection[int] = (),
) -> list[int]:
    """Prefill, then decode greedily.

    Args:
        model: The model.
        recipe: What is pruned in the prefill.
        sample: The prompt.
        max_new_tokens: How many tokens to make at most.
        eos: Ids that end the text; the one that does is part of the result.

    Returns:
        The new tokens' ids.
    """
    state = prefill(model, recipe, sample)
    logits = state.logits[-1]
    tokens: list[int] = []
    while len(tokens) < max_new_tokens:
        tokens.append(int(logits.argmax()))
        if tokens[-1] in eos or len(tokens) == max_new_tokens:
            break
        logits = step(model, state, tokens[-1])
    return tokens


@dataclass(frozen=True, eq=False)
class _Row:
    """The tokens of one sample that are present.

    Attributes:
        hidden: The residual stream. [m, h]
        present: Which tokens of the sample they are. [m]
        visual: Which of them are visual. [m] bool
        instruction: Which of them are the text that rates those. [m] bool
        positions: Their rotary positions. [m]
        patches: What the tower made of them, zeros for text. [m, 1 + w], or [m, 0]
            where the recipe does not look at it.
    """

    hidden: Tensor
    present: Tensor
    visual: Tensor
    instruction: Tensor
    positions: Tensor
    patches: Tensor


@dataclass(frozen=True, eq=False)
class _Rated:
    """What a cut went by.

    Attributes:
        scores: Of the visual tokens. [v present]
        rank: Of the attention, where the count follows it.
    """

    scores: Tensor
    rank: int | None


def _run_layer(
    decoder: Any,
    layer: LlamaDecoderLayer,
    row: _Row,
    recipe: Recipe,
    cut: Cut | None,
    staying: Tensor | None,
) -> tuple[_Row, Tensor, Tensor, _Rated | None]:
    """One layer, and its cut, at which those of ``staying`` stay, if it is given.

    Returns:
        The tokens left, the layer's rotated keys and its values [K, m, d], and what its
        cut went by.
    """
    site = None if cut is None else cut.site
    scale = layer.self_attn.scaling
    cos, sin = _rotary(decoder, row.hidden, row.positions)
    query, key, value = _project(layer, row.hidden, cos, sin)
    tokens = (row.visual, row.instruction, row.patches)
    seen = Seen(query, key, scale, row.hidden, cos, sin, *tokens)
    rated = None
    if cut is not None and site == "before_layer":
        row, _, rated = _cut(recipe, cut, row, seen, staying)
        cos, sin = _rotary(decoder, row.hidden, row.positions)
        query, key, value = _project(layer, row.hidden, cos, sin)
    attended = _mix(causal_attention(query, key, scale), value)
    if cut is not None and site == "after_attention":
        row, stay, rated = _cut(recipe, cut, row, seen, staying)
        attended = attended[stay]
    row = replace(row, hidden=_finish(layer, attended, row.hidden))
    if cut is not None and site == "after_layer":
        seen = replace(seen, hidden=row.hidden)
        row, _, rated = _cut(recipe, cut, row, seen, staying)
    return row, key, value, rated


def _cut(
    recipe: Recipe, cut: Cut, row: _Row, seen: Seen, staying: Tensor | None
) -> tuple[_Row, Tensor, _Rated]:
    """Let the lowest rated visual tokens leave.

    Returns:
        Who is left, which of the tokens those are [m] bool, and what that went by.
    """
    scores, rank = rate(recipe, seen), None
    if cut.by_rank is not None:
        rank = attention_rank(seen)
        drop = cut.by_rank.drop(rank, seen.count)
        cut = cut.model_copy(update={"drop": drop})
    if staying is None:
        stay = _stay(scores, row.visual, cut.drop)
    else:
        stay = torch.isin(row.present, staying)
    left = _Row(
        row.hidden[stay],
        row.present[stay],
        row.visual[stay],
        row.instruction[stay],
        row.positions[stay],
        row.patches[stay],
    )
    if recipe.recycle is not None and cut.drop:
        left = _recycled(recipe.recycle, cut, row, left, scores)
    if recipe.positions == "compacted":
        left = replace(left, positions=row.positions[: len(left.positions)])
    return left, stay, _Rated(scores, rank)


def _recycled(
    recycle: Recycle, cut: Cut, before: _Row, left: _Row, scores: Tensor
) -> _Row:
    """The tokens left, and new ones made of dropped ones behind the last visual token.

    A new token has the position of the visual token that stood last ahead of the cut,
    and that one's patch.
    """
    chosen, clusters = recycle.counts(cut.drop)
    places = before.visual.nonzero()[:, 0]
    dropped = torch.argsort(scores, stable=True)[: cut.drop]
    best_first = places[dropped.flip(0)[:chosen]]
    if recycle.form == "contextual":
        merged = best_first.sort().values
        keys = before.patches[merged, 1:]
        new = oracle_tower.merge(before.hidden[merged], keys, clusters)
    else:
        new = merge(before.hidden[best_first], clusters, paper=recycle.form == "paper")
    last = int(places[-1])
    # Where the new tokens go: behind all of those left that stood up to there.
    stood = torch.arange(len(before.visual), device=places.device)
    gone = torch.zeros_like(before.visual)
    gone[places[dropped]] = True
    at = int((stood[~gone] <= last).sum())
    own = torch.full((clusters,), -1, device=places.device)
    yes = torch.ones(clusters, dtype=torch.bool, device=places.device)
    position = before.positions[last].expand(clusters)
    patch = before.patches[last].expand(clusters, -1)
    return _Row(
        _insert(left.hidden, at, new),
        _insert(left.present, at, own),
        _insert(left.visual, at, yes),
        _insert(left.instruction, at, ~yes),
        _insert(left.positions, at, position),
        _insert(left.patches, at, patch),
    )


def _insert(values: Tensor, at: int, new: Tensor) -> Tensor:
    return torch.cat((values[:at], new, values[at:]))


def _stay(scores: Tensor, visual: Tensor, drop: int) -> Tensor:
    """Who stays when the ``drop`` lowest leave; of equals the earlier leaves first.

    Shapes: scores [v present], visual [m] bool -> [m] bool
    """
    lowest = torch.argsort(scores, stable=True)[:drop]
    leaving = visual.nonzero()[:, 0][lowest]
    stay = torch.ones_like(visual)
    stay[leaving] = False
    return stay


def _after_last(visual: Tensor) -> Tensor:
    """The tokens after the last visual token of the whole sample. [n] bool -> [n] bool.

    The prompt as it came decides, so that the same text rates the visual tokens at
    every cut, even after the last image has lost all of its tokens.
    """
    seen = visual.long().cumsum(dim=0)
    return (seen == seen[-1]) & ~visual


def _cuts(recipe: Recipe, visual_tokens: int, layers: int) -> dict[int, Cut]:
    """The recipe's cuts of this sample by layer, checked: plain counts, or rules."""
    if visual_tokens == 0:
        return {}
    bound = recipe if recipe.adaptive else recipe.bound(visual_tokens)
    cuts, left = bound.cuts, visual_tokens
    for cut in cuts:
        _check_cut(recipe, cut.layer, layers, cut.drop, left)
        left -= cut.drop - recipe.new_tokens(cut.drop)
    return {cut.layer: cut for cut in cuts}


def _check_cut(recipe: Recipe, layer: int, layers: int, drop: int, left: int) -> None:
    if layer >= layers:
        raise PlanError(
            f"recipe {recipe.name}, cut at layer {layer}",
            expected=f"a layer below {layers}",
            found=str(layer),
            fix="Use a recipe that was made for this decoder's number of layers.",
        )
    if drop > left:
        raise PlanError(
            f"recipe {recipe.name}, cut at layer {layer}",
            expected=f"at most {left} visual tokens to drop, as many as are left",
            found=str(drop),
            fix="Drop fewer, or use a recipe made for images of this size.",
        )


def _check_features(features: int, placeholders: int) -> None:
    if features != placeholders:
        raise InputError(
            "image features",
            expected=f"one for each of the {placeholders} image tokens",
            found=str(features),
            fix="Put one image token into the prompt for each feature of its images.",
        )


def _features(
    model: LlavaForConditionalGeneration,
    pixel_values: Tensor | None,
    features: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """The batch's visual embeddings, [v, h]: none, as given, or from the images.

    With images also what the tower made of their patches.
    """
    if features is not None:
        return features, None
    if pixel_values is None:
        return torch.empty(0, model.lm_head.in_features, device=model.device), None
    return oracle_tower.encode(model, pixel_values)


def _patches(recipe: Recipe, sample: Sample, visual: Tensor) -> Tensor:
    """What the tower made of each token's patch, for a recipe that looks at it."""
    if not recipe.sees_tower:
        return torch.empty(len(visual), 0, device=visual.device)
    if sample.patches is None:
        raise InputError(
            f"recipe {recipe.name}",
            expected="a sample that was made of images, whose patches it looks at",
            found="features alone",
            fix="Give split_batch the pixel_values.",
        )
    found = sample.patches.new_zeros(len(visual), sample.patches.shape[1])
    found[visual] = sample.patches
    return found


def _embed(model: LlavaForConditionalGeneration, sample: Sample) -> Tensor:
    """Embeddings with the features in the image tokens' places. [n] -> [n, h]."""
    decoder, _ = _decoder(model)
    hidden = _call(decoder.embed_tokens, sample.input_ids)
    visual = sample.input_ids == model.config.image_token_id
    _check_features(len(sample.features), int(visual.sum()))
    hidden[visual] = sample.features.to(hidden)
    return hidden


def _rotary(decoder: Any, hidden: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """The model's cosines and sines at these positions, two of [n, d]."""
    cos, sin = decoder.rotary_emb(hidden[None], positions[None])
    return cos[0], sin[0]


def _project(
    layer: LlamaDecoderLayer, hidden: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Rotated queries [H, m, d], rotated keys [K, m, d] and values [K, m, d]."""
    attention = layer.self_attn
    normed = _call(layer.input_layernorm, hidden)
    query = _heads(_call(attention.q_proj, normed), attention.head_dim)
    key = _heads(_call(attention.k_proj, normed), attention.head_dim)
    value = _heads(_call(attention.v_proj, normed), attention.head_dim)
    return _rotate(query, cos, sin), _rotate(key, cos, sin), value


def _heads(projected: Tensor, head_dim: int) -> Tensor:
    """Split heads off: [m, heads * d] -> [heads, m, d]."""
    return projected.view(len(projected), -1, head_dim).transpose(0, 1)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding (arXiv:2104.09864) in Hugging Face's layout.

    Component i is paired with component i + d/2. Shapes: x [heads, m, d]; cos and
    sin [m, d] -> [heads, m, d]
    """
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def _mix(probabilities: Tensor, value: Tensor) -> Tensor:
    """Average the values. [H, q, m] float32, [K, m, d] -> [q, H * d]."""
    value = value.repeat_interleave(len(probabilities) // len(value), dim=0)
    mixed = probabilities.to(value.dtype) @ value
    return mixed.transpose(0, 1).flatten(1)


def _finish(layer: LlamaDecoderLayer, attended: Tensor, residual: Tensor) -> Tensor:
    """Output projection, MLP, residuals. [m, H * d], [m, h] -> [m, h]."""
    hidden = residual + _call(layer.self_attn.o_proj, attended)
    normed = _call(layer.post_attention_layernorm, hidden)
    return hidden + _call(layer.mlp, normed)


def _decoder(
    model: LlavaForConditionalGeneration,
) -> tuple[Any, list[LlamaDecoderLayer]]:
    """The decoder in the model, and its layers."""
    decoder = model.model.language_model
    if not isinstance(decoder, DECODERS):
        raise PlanError(
            "oracle",
            expected="a decoder like " + ", ".join(d.__name__ for d in DECODERS),
            found=type(decoder).__name__,
            fix="Check a graph of this model against its own unpruned forward.",
        )
    return decoder, cast("list[LlamaDecoderLayer]", list(decoder.layers))


def _call(module: nn.Module, x: Tensor) -> Tensor:
    """Call a module of one tensor; for the type checker, which sees no result type."""
    result: Tensor = module(x)
    return result
