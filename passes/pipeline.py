"""The order of the passes, and running them."""

from __future__ import annotations

import logging
import time

import sympy
from torch.fx import GraphModule

from vtprune_fx.passes.async_checks import AsyncChecks
from vtprune_fx.passes.base import Form, Pass
from vtprune_fx.passes.check_tokens import CheckTokens
from vtprune_fx.passes.gather_tokens import GatherTokens
from vtprune_fx.passes.insert_scores import InsertScores
from vtprune_fx.passes.read_rows import ReadRows
from vtprune_fx.passes.share_attention import ShareAttention
from vtprune_fx.passes.shift_keys import ShiftKeys
from vtprune_fx.passes.verify import Verifier
from vtprune_fx.planning.plan import PrunePlan
from vtprune_fx.planning.report import PassRecord

logger = logging.getLogger(__name__)


def default_pipeline(plan: PrunePlan, form: Form = "plain") -> Pipeline:
    """The passes that carry out a plan.

    Scores stand ahead of gathers, since a gather reads the keep set of its cut.

    Args:
        plan: The plan.
        form: How cuts are written.
    """
    passes = (
        AsyncChecks(),
        InsertScores(plan, form),
        CheckTokens(plan),
        GatherTokens(plan, form),
        ShiftKeys(plan),
        ReadRows(plan),
    )
    if form == "whole":
        return Pipeline(plan, *passes, ShareAttention(plan))
    return Pipeline(plan, *passes)


class Pipeline:
    """Runs passes in order and verifies the graph after each that changed it.

    Args:
        plan: What the passes carry out.
        passes: The passes.
    """

    def __init__(self, plan: PrunePlan, *passes: Pass) -> None:
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
    # Not the pass itself: that would write the module's code anew after each.
    modified = pass_.edit(module)
    passed = time.perf_counter()
    if modified:
        verifier.check(module, pass_.name)
    verified = time.perf_counter()
    record = PassRecord(pass_.name, modified, passed - start, verified - passed)
    logger.debug("%s", record)
    return record
