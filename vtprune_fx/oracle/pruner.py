"""The oracle: a slow, plain eager pruner that every pruned graph is checked against.

Written for reading. It takes one sample at a time, so it has no batches, no padding
and no attention mask but the causal triangle, or what the model's own mask lets images
see beyond it. It shares no code with the passes and runs on an unmodified transformers
vision-language model: embeddings, features and positions are what the model's own code
hands to its first decoder layer, the layers are the model's own, one by one
(``oracle_decoder``). Attention, scoring and the cut are written out.

At a cut of ``c`` tokens the visual tokens present are rated (``oracle_scores``) and the
``c`` with the lowest score leave, of equals the earlier:

* ``after_attention``: the attention output and the residual, before the output
  projection and the MLP (FitPrune, Ye et al., arXiv:2409.10197). Both work token by
  token, so here they run on all and whoever leaves is dropped behind them;
* ``after_layer``: what the layer gives the next (FastV, SparseVLM);
* ``before_layer``: what the layer gets, rated by the queries and keys that it would
  have had (PyramidDrop).

A layer's keys and values are of what entered its attention. Whoever stays keeps its
rotary position, or with compacted positions those left take the first ones; keys that
are cached already stay as they are. Where a recipe recycles, some of the dropped tokens
become new ones (``oracle_recycling``).

Letters in shapes: ``n`` tokens of the sample, ``m`` of them present in a layer, ``v``
visual tokens, ``h`` hidden size, ``H`` query heads, ``K`` key/value heads, ``d`` head
size, ``L`` layers. Positions are [n], or [axes, n] where a model counts along several.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vtprune_fx.errors import InputError, PlanError
from vtprune_fx.models.encoding import FEATURES
from vtprune_fx.oracle import tower as oracle_tower
from vtprune_fx.oracle.decoder import Decoder, Entered, Heads, enter
from vtprune_fx.oracle.recycling import merge
from vtprune_fx.oracle.scores import Seen, attention_rank, rate, raters

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from transformers import PreTrainedModel

    from vtprune_fx.recipes.schema import Cut, Recipe, Recycle

_FROM_ZERO = torch.empty(0, dtype=torch.long)
"""Stands for ``arange(n)`` where a sample is made without positions."""


@dataclass(frozen=True, eq=False)
class Sample:
    """One prompt without padding.

    Attributes:
        input_ids: Token ids, a placeholder where a visual token stands. [n]
        features: What stands in the visual tokens' places, in their order. [v, h]
        positions: Rotary positions; 0, 1, 2, ... where none are given. [n]
        mask: Which tokens each may attend to, None for those ahead of it. [n, n] bool
        later: Features that the model adds behind its first layers. [v, h] each
        patches: What the vision tower made of each visual token's patch, as
            ``oracle_tower`` tells it, where that is known. [v, 1 + w]
    """

    input_ids: Tensor
    features: Tensor
    positions: Tensor = _FROM_ZERO
    mask: Tensor | None = None
    later: tuple[Tensor, ...] = ()
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
    model: PreTrainedModel,
    input_ids: Tensor,
    attention_mask: Tensor,
    *,
    features: Tensor | None = None,
    position_ids: Tensor | None = None,
    **inputs: Any,
) -> list[Sample]:
    """Take a padded batch apart into samples.

    Args:
        model: Encodes images and videos.
        input_ids: Token ids, padded on either side. [B, S]
        attention_mask: 1 where a token stands, 0 where padding does. [B, S]
        features: Of the whole batch, in the place of images. [v, h]
        position_ids: Rotary positions, [B, S], [1, S] or [axes, B, S]. Without them
            they are what the model's plain forward makes: most count from the start of
            the padded row.
        inputs: What else the processor returned: ``pixel_values``, ...

    Returns:
        One sample a row.

    Raises:
        InputError: There are more or fewer features than placeholders.
    """
    attended = attention_mask.bool()
    visual = _is_visual(model, input_ids) & attended
    counts: list[int] = visual.sum(dim=1).tolist()
    patches = None
    pictures = ("pixel_values", "pixel_values_videos", FEATURES)
    if any(inputs.get(name) is not None for name in pictures):
        given = {"input_ids": input_ids, "attention_mask": attention_mask} | inputs
        if position_ids is not None:
            given["position_ids"] = position_ids
        with oracle_tower.watched(model) as look:
            entered = enter(model, **given)
        features = entered.hidden[visual]
        patches = look(len(features))
    else:
        entered = _by_hand(input_ids, position_ids)
        if features is None:
            features = torch.empty(0, _width(model), device=model.device)
    _check_features(len(features), sum(counts))
    positions = entered.positions
    positions = positions.expand(*positions.shape[:-2], *input_ids.shape)
    own = torch.split(features, counts)
    later = [torch.split(rows, counts) for rows in entered.later]
    nothing: list[Tensor | None] = [None] * len(counts)
    looked = nothing if patches is None else torch.split(patches, counts)
    return [
        Sample(
            input_ids[row, real],
            own[row],
            positions[..., row, real],
            _own_mask(entered.mask, row, real),
            tuple(rows[row] for rows in later),
            looked[row],
        )
        for row, real in enumerate(attended)
    ]


def _by_hand(input_ids: Tensor, position_ids: Tensor | None) -> Entered:
    """Positions alone, for a batch whose features are given or that has none."""
    if position_ids is None:
        position_ids = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
    return Entered(torch.empty(0), position_ids, None, [])


def _own_mask(mask: Tensor | None, row: int, real: Tensor) -> Tensor | None:
    """A sample's part of a batch's mask, None where it is causal. [n, n] bool."""
    if mask is None:
        return None
    own = mask[min(row, len(mask) - 1), 0][real][:, real]
    return None if torch.equal(own, torch.ones_like(own).tril()) else own


@torch.no_grad()
def prefill(
    model: PreTrainedModel,
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
        InputError: The sample has more or fewer features than placeholders, or it does
            not tell the patches that the recipe looks at.
    """
    decoder = Decoder(model)
    visual = _is_visual(model, sample.input_ids)
    cuts = _cuts(recipe, int(visual.sum()), len(decoder.layers))
    row = _first_row(model, recipe, sample, bool(cuts))
    kept, keys, values, scores, ranks = [], [], [], {}, {}
    with decoder.running():
        for index in range(len(decoder.layers)):
            cut = cuts.get(index)
            stay = None if staying is None or cut is None else staying[index]
            row, heads, rated = _run_layer(decoder, index, row, recipe, cut, stay)
            kept.append(row.present)
            keys.append(heads.key)
            values.append(heads.value)
            if rated is not None:
                scores[index] = rated.scores
                if rated.rank is not None:
                    ranks[index] = rated.rank
            if index < len(sample.later):
                row = _with_later(row, sample.later[index], visual)
    hidden, logits = decoder.finish(row.hidden)
    ends = _next_positions(recipe, sample, keys)
    return Prefill(logits, hidden, kept, keys, values, ends, scores, ranks)


def _first_row(
    model: PreTrainedModel, recipe: Recipe, sample: Sample, pruned: bool
) -> _Row:
    """The whole sample, ahead of the first layer."""
    visual = _is_visual(model, sample.input_ids)
    hidden = _embed(model, sample)
    present = torch.arange(len(hidden), device=hidden.device)
    rating = raters(recipe, hidden, visual, _after_last(visual)) if pruned else visual
    patches = _patches(recipe, sample, visual) if pruned else hidden[:, :0]
    tokens = (hidden, present, visual, rating, sample.positions, patches)
    return _Row(*tokens, sample.mask)


def _with_later(row: _Row, features: Tensor, visual: Tensor) -> _Row:
    """Features added to those visual tokens that are left: [v, h]."""
    added = row.hidden.new_zeros(len(visual), features.shape[1])
    added[visual] = features.to(added)
    return replace(row, hidden=row.hidden + added[row.present])


def _next_positions(recipe: Recipe, sample: Sample, keys: list[Tensor]) -> list[int]:
    """The position behind the last token that each layer holds."""
    if recipe.positions == "compacted":
        return [int(sample.positions[..., k.shape[1] - 1].max()) + 1 for k in keys]
    return [int(sample.positions.max()) + 1] * len(keys)


@torch.no_grad()
def step(model: PreTrainedModel, state: Prefill, token: int) -> Tensor:
    """Decode one token: append it to every layer's cache, each of its own length.

    Args:
        model: The model that made the state.
        state: Its caches and next positions are moved on in place.
        token: Id of the token to feed.

    Returns:
        The logits of what comes next. [vocab]
    """
    decoder, device = Decoder(model), state.hidden.device
    hidden = decoder.embed(torch.tensor([token], device=device))
    with decoder.running():
        for index in range(len(decoder.layers)):
            position = torch.tensor([state.next_positions[index]], device=device)
            tables = decoder.tables(index, hidden, position)
            before = state.keys[index], state.values[index]
            allowed = torch.ones(1, before[0].shape[1] + 1, dtype=torch.bool)
            heads = Heads(allowed.to(device), before)
            hidden = decoder.run(index, hidden, tables, heads)
            state.keys[index], state.values[index] = heads.key, heads.value
    state.next_positions = [position + 1 for position in state.next_positions]
    return decoder.finish(hidden)[1][0]


def generate(
    model: PreTrainedModel,
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
        mask: Which of them each may attend to, None for those ahead. [m, m] bool
    """

    hidden: Tensor
    present: Tensor
    visual: Tensor
    instruction: Tensor
    positions: Tensor
    patches: Tensor
    mask: Tensor | None

    def heads(self) -> Heads:
        """An attention to be filled in."""
        count = len(self.hidden)
        causal = torch.ones(count, count, dtype=torch.bool, device=self.hidden.device)
        return Heads(causal.tril() if self.mask is None else self.mask)

    def only(self, stay: Tensor) -> _Row:
        """Some of the tokens: [m] bool."""
        return _Row(
            self.hidden[stay],
            self.present[stay],
            self.visual[stay],
            self.instruction[stay],
            self.positions[..., stay],
            self.patches[stay],
            None if self.mask is None else self.mask[stay][:, stay],
        )


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
    decoder: Decoder,
    index: int,
    row: _Row,
    recipe: Recipe,
    cut: Cut | None,
    staying: Tensor | None,
) -> tuple[_Row, Heads, _Rated | None]:
    """One layer, and its cut, at which those of ``staying`` stay, if it is given.

    Returns:
        The tokens left, what the layer's attention was given, and what its cut went by.
    """
    rated = None
    site = None if cut is None else cut.site
    tables = decoder.tables(index, row.hidden, row.positions)
    heads = row.heads()
    after = decoder.run(index, row.hidden, tables, heads)
    seen = _seen(row, heads, tables)
    if cut is not None and site == "before_layer":
        row, _, rated = _cut(recipe, cut, row, seen, staying)
        tables = decoder.tables(index, row.hidden, row.positions)
        heads = row.heads()
        after = decoder.run(index, row.hidden, tables, heads)
    if cut is not None and site == "after_attention":
        row, stay, rated = _cut(recipe, cut, row, seen, staying)
        after = after[stay]
    row = replace(row, hidden=after)
    if cut is not None and site == "after_layer":
        seen = replace(seen, hidden=row.hidden)
        row, _, rated = _cut(recipe, cut, row, seen, staying)
    return row, heads, rated


def _seen(row: _Row, heads: Heads, tables: tuple[Tensor, Tensor]) -> Seen:
    return Seen(
        heads.query,
        heads.key,
        heads.scale,
        row.hidden,
        *tables,
        row.visual,
        row.instruction,
        row.patches,
        heads.allowed,
        heads.probabilities,
    )


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
    left = row.only(stay)
    if recipe.recycle is not None and cut.drop:
        left = _recycled(recipe.recycle, cut, row, left, scores)
    if recipe.positions == "compacted":
        positions = row.positions[..., : left.positions.shape[-1]]
        left = replace(left, positions=positions)
    return left, stay, _Rated(scores, rank)


def _recycled(
    recycle: Recycle, cut: Cut, before: _Row, left: _Row, scores: Tensor
) -> _Row:
    """The tokens left, and new ones made of dropped ones behind the last visual token.

    A new token has the position of the visual token that stood last ahead of the cut,
    and that one's patch.
    """
    if before.mask is not None:
        raise PlanError(
            "oracle",
            expected="tokens that attend to those ahead of them, to make new ones",
            found="images that attend to themselves both ways",
            fix="Use a recipe without the field 'recycle'.",
        )
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
    position = before.positions[..., last, None].expand(
        *before.positions.shape[:-1], clusters
    )
    return _Row(
        _insert(left.hidden, at, new),
        _insert(left.present, at, own),
        _insert(left.visual, at, yes),
        _insert(left.instruction, at, ~yes),
        torch.cat((left.positions[..., :at], position, left.positions[..., at:]), -1),
        _insert(left.patches, at, before.patches[last].expand(clusters, -1)),
        None,
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


def _patches(recipe: Recipe, sample: Sample, visual: Tensor) -> Tensor:
    """What the tower made of each token's patch, for a recipe that looks at it."""
    if not recipe.sees_tower:
        return torch.empty(len(visual), 0, device=visual.device)
    if sample.patches is None:
        raise InputError(
            f"recipe {recipe.name}",
            expected="a sample that was made of images, whose patches it looks at",
            found="features alone, or a model whose tower does not show them",
            fix="Give split_batch the pixel_values of a LLaVA.",
        )
    found = sample.patches.new_zeros(len(visual), sample.patches.shape[1])
    found[visual] = sample.patches
    return found


def _is_visual(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Which tokens are placeholders of an image or a video."""
    names = ("image_token_id", "video_token_id")
    found = [getattr(model.config, name, None) for name in names]
    placeholders = [token for token in found if token is not None]
    return torch.isin(ids, torch.tensor(placeholders, device=ids.device))


def _width(model: PreTrainedModel) -> int:
    embeddings: Any = model.get_input_embeddings()
    return int(embeddings.weight.shape[1])


def _embed(model: PreTrainedModel, sample: Sample) -> Tensor:
    """Embeddings with the features in the visual tokens' places. [n] -> [n, h]."""
    hidden = Decoder(model).embed(sample.input_ids)
    visual = _is_visual(model, sample.input_ids)
    _check_features(len(sample.features), int(visual.sum()))
    hidden[visual] = sample.features.to(hidden)
    return hidden
