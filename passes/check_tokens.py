"""Refuse, at run time, a sample with fewer visual tokens than the cuts take.

How many tokens leave is fixed when the graph is made, so that shapes stay static. A
sample that holds fewer would lose text instead; it must fail rather than answer wrong::

    visual: "b8[B, S]"

gains::

    count: "i64[B]" = aten.sum.dim_IntList(visual, [1])
    ge: "b8[B]" = aten.ge.Scalar(count, 449);  all_1: "b8[]" = aten.all(ge)
    aten._assert_async.msg(all_1, "recipe ... drops 449 visual tokens ...")
"""

from __future__ import annotations

import torch
from torch.fx import GraphModule

from vtprune_fx.graph import Inserter, Stamp
from vtprune_fx.passes.base import Pass
from vtprune_fx.plan import PrunePlan
from vtprune_fx.scoring import enough_visual_tokens


class CheckTokens(Pass):
    """Assert once, behind the mask of visual tokens, that every sample has enough.

    1. Count recipes: a sample holds at least what all cuts drop.
    2. Share recipes (``of``): a sample holds exactly what the shares were taken of.
    3. No cuts: nothing to assert.
    """

    def __init__(self, plan: PrunePlan) -> None:
        self._plan = plan

    def edit(self, module: GraphModule) -> bool:
        """Insert the assertion."""
        plan, graph = self._plan, module.graph
        if not plan.cuts:
            return False
        [visual] = [n for n in graph.nodes if n.name == plan.visual]
        exact = plan.recipe.of is not None
        needed = plan.visual_tokens if exact else plan.dropped
        stamp = Stamp("check", -1)
        inserter = Inserter(graph)
        anchor = visual.next
        enough = inserter.trace(
            anchor, stamp, enough_visual_tokens, visual, needed, exact
        )
        message = self._message(needed, exact)
        inserter.call(anchor, stamp, torch.ops.aten._assert_async.msg, enough, message)
        return True

    def _message(self, needed: int, exact: bool) -> str:
        few = "exactly" if exact else "at least"
        return (
            f"recipe {self._plan.recipe.name}: every sample of a batch must hold {few} "
            f"{needed} visual tokens; run samples that do not by themselves"
        )
