"""The oracle: a slow, plain eager pruner that every pruned graph is checked against.

Written for reading. It takes one sample at a time, so it has no batches, no padding
and no attention mask except the causal one, or the model's mask where images attend to
later tokens. It shares no code with the passes and runs on an unmodified transformers
vision-language model: embeddings, features and positions are those that the model
passes to its first decoder layer, and the model's layers run one by one (``decoder``).
Attention, scoring and the cut are written out.

At a cut of ``c`` tokens the visual tokens present are rated (``scores``) and the
``c`` with the lowest score are dropped, of equals the earlier:

* ``after_attention``: the attention output and the residual, before the output
  projection and the MLP (FitPrune, Ye et al., arXiv:2409.10197). Both work token by
  token, so here they run on all tokens and the cut comes after them;
* ``after_layer``: what the layer gives the next (FastV, SparseVLM);
* ``before_layer``: what the layer gets, rated by the queries and keys that it would
  have had (PyramidDrop).

A layer's keys and values are of the tokens that entered its attention. Kept tokens keep
their rotary positions, or with compacted positions they take the first ones; keys that
are cached already do not change. Where a recipe recycles, some of the dropped tokens
become new ones (``recycling``).

Letters in shapes: ``n`` tokens of the sample, ``m`` of them present in a layer, ``v``
visual tokens, ``h`` hidden size, ``H`` query heads, ``K`` key/value heads, ``d`` head
size, ``L`` layers. Positions are [n], or [axes, n] where a model counts along several.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vtprune_fx.errors import InputError, PlanError
from vtprune_fx.models.placeholders import is_visual
from vtprune_fx.oracle.cut import Rated, Row, cut_row
from vtprune_fx.oracle.decoder import Decoder, Heads
from vtprune_fx.oracle.sample import Sample, check_features
from vtprune_fx.oracle.scores import Seen, raters

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from transformers import PreTrainedModel

    from vtprune_fx.recipes.schema import Cut, Recipe


@dataclass(eq=False)
class Prefill:
    """Results of a prefill, and the state that decoding continues from.

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
        staying: For each layer with a cut, which tokens of the sample are kept, where
            another pruner decided; scores are still computed. Not for a recipe that
            makes new tokens, which have no index in the sample.

    Raises:
        PlanError: The recipe drops more visual tokens than a layer has left, or
            names a layer that the model lacks.
        InputError: The sample has more or fewer features than placeholders, or it
            lacks the patches that the recipe reads.
    """
    decoder = Decoder(model)
    visual = is_visual(sample.input_ids, model.config)
    cuts = _cuts(recipe, int(visual.sum()), len(decoder.layers))
    row = _first_row(model, recipe, sample, bool(cuts))
    kept, keys, values, scores, ranks = [], [], [], {}, {}
    with decoder.running():
        for index in range(len(decoder.layers)):
            cut = cuts.get(index)
            keep = None if staying is None or cut is None else staying[index]
            row, heads, rated = _run_layer(decoder, index, row, recipe, cut, keep)
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
) -> Row:
    """The complete sample, before the first layer."""
    visual = is_visual(sample.input_ids, model.config)
    hidden = _embed(model, sample)
    present = torch.arange(len(hidden), device=hidden.device)
    rating = raters(recipe, hidden, visual, _after_last(visual)) if pruned else visual
    patches = _patches(recipe, sample, visual) if pruned else hidden[:, :0]
    tokens = (hidden, present, visual, rating, sample.positions, patches)
    return Row(*tokens, sample.mask)


def _with_later(row: Row, features: Tensor, visual: Tensor) -> Row:
    """Features added to the visual tokens that are present: [v, h]."""
    added = row.hidden.new_zeros(len(visual), features.shape[1])
    added[visual] = features.to(added)
    return replace(row, hidden=row.hidden + added[row.present])


def _next_positions(recipe: Recipe, sample: Sample, keys: list[Tensor]) -> list[int]:
    """The position after the last token that each layer holds."""
    if recipe.positions == "compacted":
        return [int(sample.positions[..., k.shape[1] - 1].max()) + 1 for k in keys]
    return [int(sample.positions.max()) + 1] * len(keys)


@torch.no_grad()
def step(model: PreTrainedModel, state: Prefill, token: int) -> Tensor:
    """Decode one token: append it to every layer's cache, whatever its length.

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


def _run_layer(
    decoder: Decoder,
    index: int,
    row: Row,
    recipe: Recipe,
    cut: Cut | None,
    staying: Tensor | None,
) -> tuple[Row, Heads, Rated | None]:
    """One layer, and its cut, which keeps those of ``staying`` if it is given.

    Returns:
        The kept tokens, the inputs of the layer's attention, and the cut's ratings.
    """
    rated = None
    site = None if cut is None else cut.site
    tables = decoder.tables(index, row.hidden, row.positions)
    heads = row.heads()
    after = decoder.run(index, row.hidden, tables, heads)
    seen = _seen(row, heads, tables)
    if cut is not None and site == "before_layer":
        row, _, rated = cut_row(recipe, cut, row, seen, staying)
        tables = decoder.tables(index, row.hidden, row.positions)
        heads = row.heads()
        after = decoder.run(index, row.hidden, tables, heads)
    if cut is not None and site == "after_attention":
        row, keep, rated = cut_row(recipe, cut, row, seen, staying)
        after = after[keep]
    row = replace(row, hidden=after)
    if cut is not None and site == "after_layer":
        seen = replace(seen, hidden=row.hidden)
        row, _, rated = cut_row(recipe, cut, row, seen, staying)
    return row, heads, rated


def _seen(row: Row, heads: Heads, tables: tuple[Tensor, Tensor]) -> Seen:
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


def _after_last(visual: Tensor) -> Tensor:
    """The tokens after the last visual token of the sample. [n] bool -> [n] bool.

    The unpruned prompt decides, so that the same text rates the visual tokens at
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


def _patches(recipe: Recipe, sample: Sample, visual: Tensor) -> Tensor:
    """The tower's values of each token's patch, for a recipe that reads them."""
    if not recipe.sees_tower:
        return torch.empty(len(visual), 0, device=visual.device)
    if sample.patches is None:
        raise InputError(
            f"recipe {recipe.name}",
            expected="a sample that was made of images, whose patches it reads",
            found="features alone, or a model whose tower does not show them",
            fix="Give split_batch the pixel_values of a LLaVA.",
        )
    found = sample.patches.new_zeros(len(visual), sample.patches.shape[1])
    found[visual] = sample.patches
    return found


def _embed(model: PreTrainedModel, sample: Sample) -> Tensor:
    """Embeddings with the features in the visual tokens' places. [n] -> [n, h]."""
    hidden = Decoder(model).embed(sample.input_ids)
    visual = is_visual(sample.input_ids, model.config)
    check_features(len(sample.features), int(visual.sum()))
    hidden[visual] = sample.features.to(hidden)
    return hidden
