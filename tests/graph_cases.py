"""For each pass the hand-built graphs that show what it does: the golden texts.

A golden text is the graph before and after the pass in one: lines that begin with ``-``
were there before, those with ``+`` are there after, all others both. Of a long stretch
that the pass leaves alone only both ends are shown. To write the texts anew, and to
read in the diff what changed::

    python -m tests.graph_cases
"""

from __future__ import annotations

import difflib
import itertools
from pathlib import Path
from typing import TYPE_CHECKING

from tests.graphs import Spec, as_text
from tests.hand_passes import ATEN, CUT_OP, PASSES, SCORE_OP, Case, earlier

if TYPE_CHECKING:
    from collections.abc import Iterator

_SHOWN = 6
"""Lines shown at each end of a long unchanged stretch."""

FOLDER = Path(__file__).parent / "golden_graphs"

_PLAIN = Case(drops={0: 2})
_ONE_OP = Case(drops={0: 2}, form=CUT_OP)
_RECYCLED = {"recycle": {"tau": 0.5, "theta": 0.5}}
_TWO = Case(Spec(layers=2), {0: 2, 1: 1}, form=CUT_OP)
_PER_SAMPLE = Case(drops={0: 3}, per_sample=True, fields={"of": 6})

CASES: dict[str, tuple[str, Case]] = {
    "async_checks": ("AsyncChecks", Case(Spec(checked=True), {0: 2})),
    "insert_scores": ("InsertScores", _PLAIN),
    "insert_scores_by_attention": (
        "InsertScores",
        Case(drops={0: 2}, score="last-token", form=ATEN),
    ),
    "insert_scores_received": (
        "InsertScores",
        Case(drops={0: 2}, score="fitprune", form=SCORE_OP),
    ),
    "insert_scores_one_operator": (
        "InsertScores",
        Case(drops={0: 2}, score="fitprune", form=CUT_OP),
    ),
    "insert_scores_before_layer": (
        "InsertScores",
        Case(
            Spec(layers=2), {1: 2}, score="fitprune", site="before_layer", form=CUT_OP
        ),
    ),
    "insert_scores_per_sample": ("InsertScores", _PER_SAMPLE),
    "insert_scores_scheduled": ("InsertScores", Case(drops={0: 2}, scheduled=True)),
    "insert_scores_scheduled_one_operator": (
        "InsertScores",
        Case(drops={0: 2}, score="fitprune", scheduled=True, form=CUT_OP),
    ),
    "gather_tokens_flat": (
        "GatherTokens",
        Case(Spec(layers=2, flat=True), {0: 2}),
    ),
    "insert_scores_recycled": (
        "InsertScores",
        Case(Spec(last_row=True), {0: 4}, site="after_layer", fields=_RECYCLED),
    ),
    "insert_scores_by_rank": (
        "InsertScores",
        Case(
            Spec(last_row=True),
            rules={0: {"rule": "keep", "scale": 1.0}},
            site="after_layer",
        ),
    ),
    "check_tokens": ("CheckTokens", _ONE_OP),
    "check_tokens_shares": (
        "CheckTokens",
        Case(drops={0: 3}, form=CUT_OP, fields={"of": 6}),
    ),
    "check_tokens_per_sample": ("CheckTokens", _PER_SAMPLE),
    "gather_tokens": ("GatherTokens", _PLAIN),
    "gather_tokens_one_operator": ("GatherTokens", _TWO),
    "gather_tokens_two_cuts": ("GatherTokens", Case(Spec(layers=2), {0: 2, 1: 1})),
    "gather_tokens_after_layer": (
        "GatherTokens",
        Case(Spec(layers=2), {0: 2}, site="after_layer", form=CUT_OP),
    ),
    "gather_tokens_compacted": (
        "GatherTokens",
        Case(
            Spec(layers=2, rotary=True),
            {0: 2},
            form=CUT_OP,
            fields={"positions": "compacted"},
        ),
    ),
    "gather_tokens_recycled": (
        "GatherTokens",
        Case(Spec(layers=2), {0: 4}, site="after_layer", fields=_RECYCLED),
    ),
    "gather_tokens_per_sample": (
        "GatherTokens",
        Case(Spec(layers=2), {0: 3}, per_sample=True, fields={"of": 6}),
    ),
    "shift_keys": (
        "ShiftKeys",
        Case(
            Spec(layers=2, rotary=True),
            {0: 2},
            form=CUT_OP,
            fields={"positions": "compacted"},
        ),
    ),
    "read_rows": ("ReadRows", Case(Spec(last_row=True), {0: 2}, form=CUT_OP)),
    "share_attention": (
        "ShareAttention",
        Case(drops={0: 2}, score="fitprune", form=CUT_OP),
    ),
    "own_lengths": ("OwnLengths", _ONE_OP),
    "refresh_values": ("RefreshValues", _ONE_OP),
}
"""By the name of the golden text: the pass, and what it is run on."""


def before_and_after(name: str) -> tuple[str, str]:
    """The graph before a case's pass, and the one after it."""
    pass_name, case = CASES[name]
    module, plan = case.run(*earlier(pass_name))
    before = as_text(module)
    PASSES[pass_name](plan, case.form)(module)
    return before, as_text(module)


def golden(name: str) -> str:
    """The golden text that a case gives now."""
    before, after = before_and_after(name)
    lines = difflib.ndiff(before.splitlines(), after.splitlines())
    shown = [line for line in lines if line[0] != "?"]
    return "\n".join(_short(shown)) + "\n"


def _short(lines: list[str]) -> Iterator[str]:
    """The lines, with the middle of long unchanged stretches left out."""
    for same, group in itertools.groupby(lines, lambda line: line[0] == " "):
        stretch = list(group)
        if same and len(stretch) > 4 * _SHOWN:
            left_out = len(stretch) - 2 * _SHOWN
            yield from stretch[:_SHOWN]
            yield f"  ... {left_out} lines"
            yield from stretch[-_SHOWN:]
        else:
            yield from stretch


def path_of(name: str) -> Path:
    """Where a golden text is."""
    return FOLDER / f"{name}.txt"


def write() -> None:
    """Write all golden texts."""
    FOLDER.mkdir(exist_ok=True)
    for name in CASES:
        path_of(name).write_text(golden(name), encoding="utf-8")


if __name__ == "__main__":
    write()
