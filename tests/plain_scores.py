"""What scorers and cuts do, for one sample and in loops: what graphs are compared with.

Nothing of the library is called. Scores are Python floats of float64 tensors.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.graphs import Inputs, Keep, Ran, Sample, Spec, plain_run

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

TEXT, VISUAL, INSTRUCTION, PADDING = range(4)


def uniform(at: Sample) -> list[float]:
    """The i-th visual token scores i * 40503 mod 65536."""
    scores: list[float] = []
    count = 0
    for role in at.roles.tolist():
        scores.append(count * 40503 % 65536 if role == VISUAL else 0)
        count += role == VISUAL
    return scores


def last_token(at: Sample) -> list[float]:
    """What a token gets from the last one that is no padding, mean over heads."""
    last = max(n for n, role in enumerate(at.roles.tolist()) if role != PADDING)
    heads = [head[last].double() for head in at.shares]
    return [float(sum(head[n] for head in heads) / len(heads)) for n in _all(at)]


def fitprune(at: Sample) -> list[float]:
    """What it gets from the instruction times what it gets from visual tokens."""
    strongest = at.shares.double().max(dim=0).values
    roles = at.roles.tolist()
    visual = [n for n in _all(at) if roles[n] == VISUAL]
    asking = [n for n in _all(at) if roles[n] == INSTRUCTION]
    scores = []
    for n in _all(at):
        from_text = sum(float(strongest[row, n]) for row in asking)
        from_visual = sum(float(strongest[row, n]) for row in visual)
        scores.append(from_text * from_visual / max(len(visual), 1))
    return scores


SCORES: dict[str, Callable[[Sample], list[float]]] = {
    "uniform": uniform,
    "last-token": last_token,
    "fitprune": fitprune,
}


def stays(at: Sample, scores: list[float], drop: int) -> list[int]:
    """Tokens that stay when the ``drop`` visual tokens with the lowest scores leave.

    In a sample of text alone as much padding leaves, the first of it first.
    """
    roles = at.roles.tolist()
    visual = [n for n in _all(at) if roles[n] == VISUAL]
    padding = [n for n in _all(at) if roles[n] == PADDING]
    gone = (sorted(visual, key=lambda n: (scores[n], n)) + padding)[:drop]
    return [n for n in _all(at) if n not in gone]


def expected(
    spec: Spec,
    given: Inputs,
    sample: int,
    score: str,
    drops: Mapping[int, int],
    site: str,
) -> tuple[Ran, dict[int, list[int]]]:
    """What a pruned graph computes for a sample, and what stays at each cut."""
    kept: dict[int, list[int]] = {}

    def cut(at: Sample) -> list[int]:
        kept[at.layer] = stays(at, SCORES[score](at), drops[at.layer])
        return kept[at.layer]

    keep: Keep = dict.fromkeys(drops, cut)
    return plain_run(spec, given, keep, sample, site), kept


def _all(at: Sample) -> range:
    return range(len(at.roles))
