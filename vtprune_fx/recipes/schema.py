"""Recipes: which visual tokens a decoder drops, where, and how many. Pure data.

A recipe is a JSON file. It names a method, the score that ranks visual tokens, and its
cuts: the decoder layer, the site in that layer, and the number of visual tokens that
every sample drops there. ``of`` decides what that number means:

* ``"of": null``: counts. The cut drops ``drop`` visual tokens, whatever came in.
* ``"of": 2880``: shares. A sample that came with ``v`` visual tokens drops
  ``floor(drop * v / 2880)`` (FitPrune's rule for any-resolution models).

Instead of ``drop`` all cuts may have a rule, ``by_rank``: the number then depends on
the sample (SparseVLM).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)
from pydantic_core import PydanticCustomError

from vtprune_fx.recipes.rank_rule import ByRank, not_counted
from vtprune_fx.scorers import registry

MOST = 2**31 - 1
"""The largest count: what graphs and random generators take as a number."""


Count = Annotated[int, Field(ge=0, le=MOST, strict=True)]


PositiveCount = Annotated[int, Field(ge=1, le=MOST, strict=True)]


MOST_LAYERS = 10_000
"""Decoder layers at most, so that a number of a file makes no endless work."""


Site = Literal["after_attention", "after_layer", "before_layer"]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Cut(_Strict):
    """One place in the decoder at which visual tokens are dropped.

    Attributes:
        layer: Index of the decoder layer, from 0.
        drop: Visual tokens that a sample loses here: a count, or a share of ``of``.
        site: Where in the layer. ``after_attention``: the attention output and the
            residual are cut, then the output projection and the MLP run on the rest.
            ``after_layer``: all of the layer runs first. ``before_layer``: what enters
            the layer is cut, rated by the queries and keys that the layer would have
            had.
        by_rank: The rule that decides instead of ``drop``, which is then left out.
    """

    layer: Count
    drop: Count = 0
    site: Site = "after_attention"
    by_rank: ByRank | None = None

    @model_validator(mode="after")
    def _check_counts_once(self) -> Self:
        by_rank = self.by_rank is not None
        if ("drop" in self.model_fields_set) == by_rank:
            found = "both" if by_rank else "neither"
            raise _wrong("drop", "a number 'drop' or a rule 'by_rank'", found)
        return self

    @model_serializer(mode="wrap")
    def _write_one(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        fields: dict[str, Any] = handler(self)
        del fields["drop" if self.by_rank else "by_rank"]
        return fields


class Recycle(_Strict):
    """Dropped tokens become a few new ones, as in SparseVLM and VisionZip.

    Of n dropped tokens the best scored m form C clusters.

    Attributes:
        tau: The share of the dropped tokens that is clustered.
        theta: Clusters, as a share of those.
        form: ``code``: m is ``int(tau n) + 1`` and C ``int(theta m) + 1``, clusters are
            density peaks of the hidden states, tokens join the centre nearest to them,
            and a new token is the mean of its cluster (SparseVLM's code). ``paper``: m
            is ``int(tau n)`` and C ``int(theta m)``, both at least 1, tokens join the
            centre most like them by cosine, and a new token is the sum (SparseVLM's
            paper). ``contextual``: as many as in ``paper``, and clusters go by the keys
            of the vision tower; the one cut is before layer 0 (VisionZip).
    """

    tau: Annotated[float, Field(ge=0, le=1)]
    theta: Annotated[float, Field(ge=0, le=1)]
    form: Literal["code", "paper", "contextual"] = "code"

    def counts(self, dropped: int) -> tuple[int, int]:
        """How many of the dropped tokens are clustered, and into how many new ones."""
        chosen = min(self._rounded(self.tau * dropped), dropped)
        return chosen, min(self._rounded(self.theta * chosen), chosen)

    def _rounded(self, share: float) -> int:
        return int(share) + 1 if self.form == "code" else max(int(share), 1)


_BEFORE_ALL = (0, "before_layer")
"""Layer and site of a cut before the decoder."""


class Provenance(_Strict):
    """Where a recipe comes from.

    Attributes:
        source: A paper, a command line, a person.
        model: The model whose statistics the recipe was fitted to.
        note: Anything a reader should know.
    """

    source: str
    model: str = ""
    note: str = ""


Method = Literal[
    "fitprune",
    "sparsevlm",
    "sparsevlm-plus",
    "fastv",
    "pyramiddrop",
    "vtw",
    "dart",
    "divprune",
    "visionzip",
    "baseline",
    "custom",
]


class Recipe(_Strict):
    """A validated recipe.

    Attributes:
        schema_version: Version of the file format.
        name: What the recipe is called: lower case letters, digits, ``.`` and ``-``.
        method: The pruning method; ``baseline`` is none, to compare methods with, and
            ``custom`` one of yours.
        score: The scorer that ranks visual tokens at each cut (``scorers.names()``).
        seed: Of the ``random`` score; others ignore it.
        options: Options of the scorer, by name.
        positions: ``kept``: a kept token keeps its rotary position;
            ``compacted``: after a cut the kept tokens take the first positions.
        recycle: How dropped tokens become new ones, or None. Every cut must then be
            ``after_layer``, or for contextual ones ``before_layer`` 0.
        layers: Decoder layers of the model the recipe was made for.
        visual_tokens: Visual tokens per sample of that model.
        of: Reference count of visual tokens, or None where ``drop`` is a plain count.
        cuts: The cuts, at most one a layer, in order.
        provenance: Where the numbers come from.
    """

    schema_version: Literal[1]
    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9.-]*$", max_length=100)]
    method: Method
    score: str
    seed: Count = 0
    options: dict[str, Annotated[int | float, Field(ge=-MOST, le=MOST)]] = {}
    positions: Literal["kept", "compacted"]
    recycle: Recycle | None = None
    layers: Annotated[PositiveCount, Field(le=MOST_LAYERS)]
    visual_tokens: PositiveCount
    of: PositiveCount | None = None
    cuts: tuple[Cut, ...]
    provenance: Provenance

    @model_validator(mode="after")
    def _check_score(self) -> Self:
        if self.score not in registry.names():
            raise _wrong("score", " or ".join(registry.names()), repr(self.score))
        # Only options need the scorer itself, and with it torch.
        known = registry.scorer(self.score).options() if self.options else {}
        known.pop("seed", None)
        for name in self.options:
            if name not in known:
                expected = f"an option of the score {self.score!r}: {_listed(known)}"
                raise _wrong("options", expected, repr(name))
        return self

    @model_validator(mode="after")
    def _check_cuts(self) -> Self:
        layers = [cut.layer for cut in self.cuts]
        for previous, cut in itertools.pairwise(self.cuts):
            if cut.layer <= previous.layer:
                raise _wrong(
                    "cuts",
                    "cuts in the order of their layers, at most one a layer",
                    f"layer {cut.layer} after layer {previous.layer}",
                )
            _check_apart(previous, cut)
        if layers and layers[-1] >= self.layers:
            raise _wrong(
                "cuts",
                f"cuts in layers 0 to {self.layers - 1} ('layers' is {self.layers})",
                f"a cut in layer {layers[-1]}",
            )
        return self

    @model_validator(mode="after")
    def _check_counts(self) -> Self:
        most = self.of or self.visual_tokens
        if self.adaptive:
            if self.of is not None or not all(cut.by_rank for cut in self.cuts):
                found = "both" if self.of is None else f"'of' is {self.of}"
                raise _wrong("cuts", "either counts or rules by rank", found)
        elif (total := self.needed(most)) > most:
            raise _wrong(
                "cuts",
                f"cuts that drop at most the {most} visual tokens there are",
                f"{total} dropped",
            )
        return self

    @model_validator(mode="after")
    def _check_recycled(self) -> Self:
        sites = {cut.site for cut in self.cuts}
        if self.recycle is None or not self.cuts:
            return self
        if self.recycle.form == "contextual":
            if [(cut.layer, cut.site) for cut in self.cuts] != [_BEFORE_ALL]:
                found = ", ".join(f"{cut.site} {cut.layer}" for cut in self.cuts)
                raise _wrong("cuts", "one cut before_layer 0, to recycle", found)
            if self.adaptive:
                raise _wrong("cuts", "counts, to recycle", "a rule by rank")
        elif sites != {"after_layer"}:
            raise _wrong("cuts", "cuts after_layer, to recycle", " and ".join(sites))
        return self

    def __hash__(self) -> int:
        return hash(self.to_json())

    def drops(self, visual_tokens: int) -> dict[int, int]:
        """Visual tokens that a sample with ``visual_tokens`` of them drops, by layer.

        Layers that drop none are left out. New tokens do not count.

        Raises:
            RecipeError: Counts follow the rank of each sample's attention.
        """
        if self.adaptive:
            raise not_counted(self.name)
        counts = {
            cut.layer: cut.drop
            if self.of is None
            else cut.drop * visual_tokens // self.of
            for cut in self.cuts
        }
        return {layer: count for layer, count in counts.items() if count > 0}

    def new_tokens(self, dropped: int) -> int:
        """How many new tokens a cut makes of those it drops."""
        return self.recycle.counts(dropped)[1] if self.recycle else 0

    def needed(self, visual_tokens: int) -> int:
        """Visual tokens that a sample must have for every cut to find what it drops.

        As many as are dropped in all, less the new ones that earlier cuts made.
        """
        gone = most = 0
        for drop in self.drops(visual_tokens).values():
            most = max(most, gone + drop)
            gone += drop - self.new_tokens(drop)
        return most

    def tokens_per_layer(self, visual_tokens: int, layers: int) -> list[int]:
        """Visual tokens left after each layer's cut, ``layers`` numbers.

        New tokens count. Never below 0: a sample with fewer visual tokens than the
        recipe drops loses those it has.
        """
        drops = self.drops(visual_tokens)
        counts = (drops.get(layer, 0) for layer in range(layers))
        gone = itertools.accumulate(c - self.new_tokens(c) if c else 0 for c in counts)
        return [max(0, visual_tokens - count) for count in gone]

    def bound(self, visual_tokens: int) -> Recipe:
        """The same for samples with this many visual tokens, as plain counts."""
        drops = self.drops(visual_tokens)
        cuts = tuple(
            cut.model_copy(update={"drop": drops[cut.layer]})
            for cut in self.cuts
            if cut.layer in drops
        )
        changes = {"of": None, "visual_tokens": visual_tokens, "cuts": cuts}
        return self.model_copy(update=changes)

    @property
    def adaptive(self) -> bool:
        """Whether counts follow the rank of each sample's attention.

        Whatever needs counts before all samples raises a RecipeError then.
        """
        return any(cut.by_rank is not None for cut in self.cuts)

    @property
    def cuts_before_all(self) -> bool:
        """Whether tokens are dropped before the first layer.

        That layer's cache then does not say how long the prompt was.
        """
        cuts = (cut for cut in self.cuts if cut.drop or cut.by_rank)
        return any((cut.layer, cut.site) == _BEFORE_ALL for cut in cuts)

    @property
    def sees_tower(self) -> bool:
        """Whether it needs a graph that has the vision tower in it."""
        merges = self.recycle is not None and self.recycle.form == "contextual"
        return merges or registry.sees_tower(self.score)

    def scorer_options(self) -> dict[str, object]:
        """The options that the scorer is called with."""
        options: dict[str, object] = dict(self.options)
        if "seed" in registry.scorer(self.score).options():
            options["seed"] = self.seed
        return options

    def baseline(self, score: Literal["inverted", "random", "uniform"]) -> Recipe:
        """The same cuts, with tokens chosen by a score that no method would use."""
        changes = {"name": f"{self.name}-{score}", "method": "baseline", "score": score}
        return self.model_copy(update=changes | {"options": {}})

    def baselines(self) -> list[Recipe]:
        """Every baseline with these cuts."""
        return [self.baseline(score) for score in ("random", "uniform", "inverted")]

    def keep_all(self) -> Recipe:
        """A recipe for the same model without cuts: what pruning is compared with."""
        return self.model_copy(update={"name": "dense", "cuts": ()})

    def to_json(self) -> str:
        """The recipe as the text of a recipe file."""
        # Only recipes that draw at random have to name a seed.
        unused: dict[str, Any] = {"seed": True} if self.score != "random" else {}
        unused |= {n: True for n in ("options", "recycle") if not getattr(self, n)}
        if self.recycle and self.recycle.form == "code":
            unused["recycle"] = {"form"}
        return self.model_dump_json(indent=2, exclude=unused) + "\n"


def _check_apart(previous: Cut, cut: Cut) -> None:
    """Refuse two cuts at one place."""
    touching = previous.site == "after_layer" and cut.site == "before_layer"
    if touching and previous.layer + 1 == cut.layer:
        raise _wrong(
            "cuts",
            "one cut at a place",
            f"one after layer {previous.layer} and one before layer {cut.layer}",
        )


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names)) or "it has none"


def _wrong(place: str, expected: str, found: str) -> PydanticCustomError:
    # Braces in a message are filled from the context, so the text goes in through it.
    context = {"place": place, "expected": expected, "found": found}
    return PydanticCustomError("vtprune", "{expected}", context)
