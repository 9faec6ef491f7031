"""The order of the passes, and running them."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import Literal, TypeAlias

import sympy
from torch.fx import GraphModule

from vtprune_fx.errors import InputError
from vtprune_fx.passes.async_checks import AsyncChecks
from vtprune_fx.passes.base import Form, Pass
from vtprune_fx.passes.check_tokens import CheckTokens
from vtprune_fx.passes.gather_tokens import GatherTokens
from vtprune_fx.passes.insert_scores import InsertScores
from vtprune_fx.passes.own_lengths import OwnLengths
from vtprune_fx.passes.read_rows import ReadRows
from vtprune_fx.passes.refresh_values import RefreshValues
from vtprune_fx.passes.share_attention import ShareAttention
from vtprune_fx.passes.shift_keys import ShiftKeys
from vtprune_fx.passes.verify import Verifier
from vtprune_fx.planning.plan import PrunePlan
from vtprune_fx.planning.report import PassRecord

logger = logging.getLogger(__name__)

Target: TypeAlias = Literal["trace", "compile", "export"]
"""What happens to a pruned graph.

* ``trace``: a compiler traces it once more, with the lengths after cuts as they are.
* ``compile``: the same, and each length after a cut becomes a new symbol.
* ``export``: it is part of an ``ExportedProgram``, which needs plain fake tensors.
"""


ExtraPass: TypeAlias = Pass | Callable[[PrunePlan], Pass]
"""A pass from outside, or what makes one of the plan, such as its class."""


def default_pipeline(
    plan: PrunePlan,
    form: Form = "aten",
    target: Target = "trace",
    extra: Sequence[ExtraPass] = (),
) -> Pipeline:
    """The passes that carry out a plan.

    Args:
        plan: The plan.
        form: How cuts are written.
        target: What happens to the graph.
        extra: Further passes, in order. They run after all that prune, and before those
            that prepare the graph for the target, unless they name one of these in
            ``requires`` or ``runs_after``.

    Raises:
        InputError: A further pass requires one that is not there.
    """
    passes: list[Pass] = [
        AsyncChecks(),
        InsertScores(plan, form),
        CheckTokens(plan),
        GatherTokens(plan, form),
        ShiftKeys(plan),
        ReadRows(plan),
    ]
    if form == "cut_op":
        passes.append(ShareAttention(plan))
    finishing = _finishing(plan, target)
    made = [p if isinstance(p, Pass) else p(plan) for p in extra]
    finished = {pass_.name for pass_ in finishing}
    late = [p for p in made if finished & (p.requires | p.runs_after)]
    early = [p for p in made if p not in late]
    return Pipeline(plan, *passes, *early, *finishing, *late)


def _finishing(plan: PrunePlan, target: Target) -> list[Pass]:
    """Passes that prepare a pruned graph for what happens to it."""
    if target == "compile":
        return [OwnLengths(plan)]
    return [RefreshValues()] if target == "export" else []


class Pipeline:
    """Runs passes in order and verifies the graph after each that changed it.

    Args:
        plan: What the passes carry out.
        passes: The passes.

    Raises:
        InputError: A pass comes before one that it requires or has to follow.
    """

    def __init__(self, plan: PrunePlan, *passes: Pass) -> None:
        _check_order(passes)
        self._plan = plan
        self.passes = passes

    def run(self, module: GraphModule) -> tuple[PassRecord, ...]:
        """Run all passes on ``module``, in place.

        Raises:
            VerifyError: A pass wrote a wrong graph.
        """
        plan, counts = self._plan, _numbers(self._plan)
        most = plan.needed + sum(counts.values())
        verifier = Verifier(module, plan.tokens, most, counts)
        records = tuple(_run_one(pass_, module, verifier) for pass_ in self.passes)
        if any(record.modified for record in records):
            module.recompile()
        return records


def _check_order(passes: Sequence[Pass]) -> None:
    names = [pass_.name for pass_ in passes]
    for place, pass_ in enumerate(passes):
        before, after = set(names[:place]), set(names[place + 1 :])
        missing = pass_.requires - before
        late = (pass_.runs_after & after) - before
        for wanted in sorted(missing | late):
            raise InputError(
                f"pass {pass_.name}",
                expected=f"{wanted} before it",
                found=f"{wanted} after it" if wanted in after else f"no {wanted}",
                fix=f"Put {wanted} before {pass_.name} in the pipeline.",
            )


def _numbers(plan: PrunePlan) -> dict[sympy.Symbol, int]:
    """Numbers to verify with, for counts that follow the rank."""
    counts: dict[sympy.Symbol, int] = {}
    for cut in plan.cuts:
        drop, chosen, new = 101, 53, 7 if cut.new else 0
        numbers = {cut.drop: drop, cut.clustered: chosen, cut.new: new}
        numbers[cut.gone] = drop - new
        counts |= {c: n for c, n in numbers.items() if isinstance(c, sympy.Symbol)}
    return counts


def _run_one(pass_: Pass, module: GraphModule, verifier: Verifier) -> PassRecord:
    start = time.perf_counter()
    modified = pass_(module, recompile=False).modified
    passed = time.perf_counter()
    if modified:
        verifier.check(module, pass_.name)
    verified = time.perf_counter()
    record = PassRecord(pass_.name, modified, passed - start, verified - passed)
    logger.debug("%s", record)
    return record
