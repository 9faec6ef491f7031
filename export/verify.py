"""``vtprune verify``: an export on ONNX Runtime against the oracle.

Prompts are drawn at random, and at the limits of what the export takes. On each the
prefill is compared layer by layer (keys, values, tokens kept at a cut), then the logits
of every position kept, then those of a few tokens that follow on the cache. One batch
is answered with ``generate``, whose tokens have to be the oracle's.

The oracle runs in float32 on the weights that the export is supposed to have: the
original model's, in the export's precision, rounded as it rounds them. The tokens kept
are judged first, by the oracle's scores; then the oracle goes on with the tokens that
the export kept, so that swapping two tokens with almost equal scores does not end the
comparison.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.table import Table
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration, PreTrainedModel

from vtprune_fx import oracle
from vtprune_fx.errors import ExportError, InputError, first_sentence
from vtprune_fx.export.graph_model import GraphModel
from vtprune_fx.export.manifest import Manifest, read
from vtprune_fx.export.opening import load
from vtprune_fx.export.quantize import rounded
from vtprune_fx.export.target import target_of
from vtprune_fx.export.to_onnx import TOLERANCES
from vtprune_fx.export.trust import held
from vtprune_fx.export.verify_cases import Case, draw_cases
from vtprune_fx.models.arguments import cache_of
from vtprune_fx.models.encoding import counted_positions
from vtprune_fx.models.loading import load_model
from vtprune_fx.recipes.schema import Recipe

ANSWER = "answer"
"""Where differences of tokens are that ``generate`` chose."""


@dataclass(frozen=True)
class Difference:
    """How far one value of an export is from the oracle's.

    Attributes:
        where: ``layer 3, keys``, ``logits``, ...
        found: The largest deviation as a share of the largest value, infinite where
            sizes differ; for a cut, how much better a dropped token's score was
            than a kept one's, as a share of the largest score.
        note: What differs, where it is not a number.
    """

    where: str
    found: float
    note: str = ""


@dataclass(frozen=True)
class CaseResult:
    """The result of one case.

    Attributes:
        case: Its name.
        differences: Of all samples, in the order in which a model computes them.
        tolerance: What they may be.
    """

    case: str
    differences: tuple[Difference, ...]
    tolerance: float

    @property
    def first(self) -> Difference | None:
        """The first value that is too far off, if any is."""
        wrong = (d for d in self.differences if not d.found <= self.tolerance)
        return next(wrong, None)

    def worst(self, *kinds: str) -> float:
        """The largest deviation of some kinds of value."""
        found = [d.found for d in self.differences if d.where.endswith(kinds)]
        return max(found, default=0.0)


@dataclass(frozen=True)
class Verification:
    """The results of all cases.

    Attributes:
        folder: The export.
        precision: Its precision, and what its matrices are rounded to.
        outcomes: One a case.
    """

    folder: Path
    precision: str
    outcomes: tuple[CaseResult, ...]

    @property
    def passed(self) -> bool:
        """Whether the export does what the oracle does."""
        return all(outcome.first is None for outcome in self.outcomes)

    def table(self) -> Table:
        """A line for each case."""
        tolerance = self.outcomes[0].tolerance
        table = Table(
            box=SIMPLE_HEAD,
            title=f"{self.folder.name}, {self.precision}, against the oracle",
            caption=f"Largest deviations as shares of the largest value, {tolerance:g} "
            "at most. Cuts: of the best score, by which a dropped token was better "
            "than one that was kept. Answer: of the largest logit, by which a token "
            "was worse than the oracle's.",
        )
        table.add_column("prompts", no_wrap=True)
        for title in ("cache", "cuts", "logits", "next tokens", "answer"):
            table.add_column(title, justify="right", min_width=7)
        table.add_column("first difference", overflow="fold")
        for outcome in self.outcomes:
            worst = (f"{outcome.worst(*kind):.1e}" for kind in _KINDS)
            table.add_row(outcome.case, *worst, _say(outcome.first))
        return table


_KINDS = (("keys", "values"), ("cut",), ("logits",), ("next tokens",), (ANSWER,))
"""What a column is the worst of: ends of ``Difference.where``."""


def _say(first: Difference | None) -> str:
    if first is None:
        return "[green]none[/green]"
    return f"[red]{first.where}[/red]{': ' if first.note else ''}{first.note}"


def verify(folder: Path, model: str | None = None, seed: int = 0) -> Verification:
    """Compare an export with the oracle.

    Args:
        folder: What ``vtprune export onnx`` wrote.
        model: The model that was exported, a checkpoint folder or a hub id; by default
            the one that the manifest names.
        seed: Of prompts and images.

    Raises:
        ExportError: The folder is no complete export, or has no keep sets to look at.
        InputError: There is no such model, or the oracle does not know it.
    """
    target = target_of(folder, read(folder))
    if not target.shows_keep_sets:
        raise ExportError(
            f"export {folder}",
            expected="graphs that show which tokens they keep, as ONNX exports do",
            found=f"target {target.name!r}, whose graphs do not",
            fix="Export the same model with `vtprune export onnx`, and verify that.",
        )
    with held(folder):
        exported = load(folder)
        contents = exported.manifest
        exported.show_keep_sets(folder)
    original = _original(contents, model)
    # Not what the folder says: it does not judge itself.
    tolerance = TOLERANCES[contents.precision]
    outcomes = tuple(
        CaseResult(case.name, tuple(_compared(exported, original, case)), tolerance)
        for case in draw_cases(original, contents, seed)
    )
    precision = " ".join(filter(None, (contents.precision, contents.quantize)))
    return Verification(folder, precision, outcomes)


def _original(contents: Manifest, model: str | None) -> LlavaForConditionalGeneration:
    """The exported model in float32, with the weights that the export should have."""
    source = model or contents.source
    if not source:
        raise InputError(
            "--model",
            expected="the model that was exported, which the manifest does not name",
            found="nothing",
            fix="Name its checkpoint folder or hub id.",
        )
    loaded: PreTrainedModel = load_model(source, getattr(torch, contents.precision))
    if not isinstance(loaded, LlavaForConditionalGeneration):
        raise InputError(
            f"model {source!r}",
            expected="a LLaVA",
            found=f"a {type(loaded).__name__}",
            fix="Compare this export with the model's unpruned forward.",
        )
    if contents.quantize is not None:
        for module in loaded.modules():
            if isinstance(module, nn.Linear):
                module.weight = nn.Parameter(rounded(module.weight, contents.quantize))
    loaded.float()
    return loaded


# ------------------------------------------------------------------- the comparison


def _compared(
    exported: GraphModel, original: LlavaForConditionalGeneration, case: Case
) -> Iterator[Difference]:
    """All differences on one batch; what cannot run differs from the start."""
    try:
        outputs = exported(**case.inputs)
        states = []
        for row, sample in enumerate(_samples(original, case.inputs)):
            found = _Found(exported, outputs, case, row)
            states.append(found.run(original, sample))
            yield from found.differences(states[-1], sample)
        yield from _followed(exported, original, case, outputs, states)
        if case.new_tokens:
            yield from _generated(exported, original, case)
    except Exception as error:
        yield Difference("it does not run", math.inf, first_sentence(error))


def _samples(
    original: LlavaForConditionalGeneration, inputs: dict[str, Tensor]
) -> list[oracle.Sample]:
    positions = counted_positions(inputs["attention_mask"])
    return oracle.split_batch(original, **inputs, position_ids=positions)


class _Found:
    """One sample in what an export returned."""

    def __init__(
        self, exported: GraphModel, outputs: Any, case: Case, row: int
    ) -> None:
        self._contents = exported.manifest
        self._logits: Tensor = outputs.logits[row]
        self._layers = [
            {"keys": layer.keys[row], "values": layer.values[row]}
            for layer in cache_of(outputs).layers
        ]
        self._padding = _padding(case, row)
        self._kept = _kept(exported, case, row)

    def run(
        self, original: LlavaForConditionalGeneration, sample: oracle.Sample
    ) -> oracle.Prefill:
        """The oracle's run, with the tokens that the export kept."""
        return _prefill(original, self._contents.recipe, sample, self._kept)

    def differences(
        self, run: oracle.Prefill, sample: oracle.Sample
    ) -> Iterator[Difference]:
        """Layer by layer, then the logits."""
        for index, layer in enumerate(self._layers):
            expected = {"keys": run.keys[index], "values": run.values[index]}
            for kind, value in layer.items():
                where = f"layer {index}, {kind}"
                yield _difference(where, value, expected[kind], self._padding)
            if index in run.scores:
                found, note = self._excess(index, run, sample)
                yield Difference(f"layer {index}, cut", found, note)
        # As [1, tokens, vocabulary]: tokens are on the second axis, as in a cache.
        yield _difference("logits", self._logits[None], run.logits[None], self._padding)

    def _excess(
        self, index: int, run: oracle.Prefill, sample: oracle.Sample
    ) -> tuple[float, str]:
        """By how much a dropped token was better than a kept one, and a reason."""
        kept, recipe = self._kept[index], self._contents.recipe
        if recipe.recycle is not None:
            expected = run.kept[index][run.kept[index] >= 0]
            same = torch.equal(kept, expected)
            return (0.0, "") if same else (math.inf, "other tokens kept")
        before = run.kept[index - 1] if index else torch.arange(len(sample.input_ids))
        still = torch.isin(before, kept)
        visual = sample.input_ids[before] == self._contents.image_token_id
        dropped = int((~still).sum())
        drop = recipe.drops(len(sample.features))[index]
        if dropped != drop:
            return math.inf, f"{dropped} dropped, not {drop}"
        if not bool(still[~visual].all()):
            return math.inf, "text dropped"
        scores, still_visual = run.scores[index], still[visual]
        if bool(still_visual.all()) or not bool(still_visual.any()):
            return 0.0, ""
        excess = scores[~still_visual].max() - scores[still_visual].min()
        return float(excess.clamp(min=0) / scores.abs().max()), ""


def _padding(case: Case, row: int) -> int:
    """Padding of a sample: it comes first, and no image lets it be dropped."""
    return int((case.inputs["attention_mask"][row] == 0).sum())


def _kept(exported: GraphModel, case: Case, row: int) -> dict[int, Tensor]:
    """What the last prompt kept of a sample at each cut, as indices into it."""
    kept: dict[int, Tensor] = {}
    if case.has_images:
        for layer, positions in exported.keep_sets.items():
            of_sample = positions[row] - _padding(case, row)
            kept[layer] = of_sample[of_sample >= 0].sort().values
    return kept


def _prefill(
    original: LlavaForConditionalGeneration,
    recipe: Recipe,
    sample: oracle.Sample,
    kept: dict[int, Tensor],
) -> oracle.Prefill:
    """The oracle's run, with the export's choice of what is kept."""
    return oracle.prefill(
        original, recipe, sample, None if recipe.recycle is not None else kept
    )


def _difference(
    where: str, found: Tensor, expected: Tensor, padding: int
) -> Difference:
    """Of values [K, padding + n, D] from [K, n, D], in that order."""
    heads, tokens, width = expected.shape
    if found.shape != (heads, padding + tokens, width):
        sizes = f"{found.shape[1] - padding} tokens, not {tokens}"
        return Difference(where, math.inf, sizes)
    compared = found[:, padding:].float()
    share = float((compared - expected).abs().max() / expected.abs().max())
    return Difference(where, math.inf if math.isnan(share) else share)


def _followed(
    exported: GraphModel,
    original: LlavaForConditionalGeneration,
    case: Case,
    outputs: Any,
    states: list[oracle.Prefill],
) -> Iterator[Difference]:
    """The logits of tokens that follow on the cache: several at once, then one."""
    # A cache does not say how long a prompt was that was cut before all layers.
    new = case.following.shape[1]
    sizes = [1] * new if exported.manifest.recipe.cuts_before_all else [new - 1, 1]
    mask = case.inputs["attention_mask"]
    for tokens in torch.split(case.following, sizes, dim=1):
        mask = torch.cat((mask, torch.ones_like(tokens)), dim=1)
        cache = cache_of(outputs)
        outputs = exported(input_ids=tokens, attention_mask=mask, past_key_values=cache)
        for row, state in enumerate(states):
            steps = [oracle.step(original, state, int(t)) for t in tokens[row]]
            found, expected = outputs.logits[row][None], torch.stack(steps)[None]
            yield _difference("next tokens", found, expected, 0)


def _generated(
    exported: GraphModel, original: LlavaForConditionalGeneration, case: Case
) -> Iterator[Difference]:
    """What ``generate`` answers; the oracle goes on from each of its tokens."""
    model: Any = exported
    ids = model.generate(
        **case.inputs,
        max_new_tokens=case.new_tokens,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    prompt, recipe = case.inputs["input_ids"].shape[1], exported.manifest.recipe
    for row, sample in enumerate(_samples(original, case.inputs)):
        state = _prefill(original, recipe, sample, _kept(exported, case, row))
        logits = state.logits[-1]
        for place, token in enumerate(ids[row, prompt:].tolist()):
            yield _choice(logits, token, f"sample {row}, token {place}")
            logits = oracle.step(original, state, token)


def _choice(logits: Tensor, token: int, which: str) -> Difference:
    """By how much a token that was chosen is worse than the best."""
    best = int(logits.argmax())
    worse = float((logits[best] - logits[token]) / logits.abs().max())
    note = "" if token == best else f"{which}: {token}, not {best}"
    return Difference(ANSWER, worse, note)
