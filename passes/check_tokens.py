"""Refuse, at run time, a sample with fewer visual tokens than the cuts take.

How many tokens are dropped is fixed when the graph is made, so that shapes are static.
A sample that holds fewer would lose text instead; it fails rather than answer wrong::

    vtprune_roles: "i64[B, S]"

gains::

    eq: "b8[B, S]" = aten.eq.Scalar(vtprune_roles, 1)        # visual
    count: "i64[B]" = aten.sum.dim_IntList(eq, [1])
    ge: "b8[B]" = aten.ge.Scalar(count, 449)
    ...                                                      # or padding instead
    aten._assert_async.msg(all_1, "recipe ... must hold at least 449 visual tokens ...")
"""

from __future__ import annotations

from functools import partial

import torch
from torch.fx import GraphModule

from vtprune_fx.graph.insert import Inserter
from vtprune_fx.graph.stamps import ALL_CUTS, Stamp, StampKind, stamped
from vtprune_fx.passes.base import Pass
from vtprune_fx.planning.plan import PrunePlan
from vtprune_fx.selection.order import enough_to_drop
from vtprune_fx.selection.per_sample import enough_padding


class CheckTokens(Pass):
    """Assert once, after the tokens' roles, that every sample has enough.

    1. Count recipes: a sample holds at least what all cuts drop.
    2. Share recipes (``of``): a sample holds exactly what the shares were taken of.
    3. A sample of text alone, beside others with images: padding is dropped instead.
    4. Samples that drop different numbers: each holds the padding that makes up for
       those it drops fewer than others.
    5. No cuts, counts that follow the rank, or that come with each run and are checked
       before it: nothing to assert.
    """

    requires = frozenset({"InsertScores"})

    def __init__(self, plan: PrunePlan) -> None:
        self._plan = plan

    def edit(self, module: GraphModule) -> bool:
        """Insert the assertion."""
        plan, graph = self._plan, module.graph
        if not plan.cuts or plan.recipe.adaptive or plan.schedule is not None:
            return False
        roles = stamped(graph, StampKind.ROLES)[ALL_CUTS]
        exactly = plan.visual_tokens if plan.recipe.of is not None else None
        stamp = Stamp(StampKind.CHECK)
        inserter = Inserter(graph)
        anchor = roles.next
        check = partial(inserter.trace, anchor, stamp)
        if plan.of is None:
            enough = check(enough_to_drop, roles, plan.needed, exactly)
        else:
            drops = tuple(cut.drop for cut in plan.cuts)
            shares = tuple(cut.share for cut in plan.cuts)
            enough = check(enough_padding, roles, drops, shares, plan.of)
        message = self._message(exactly)
        inserter.call(anchor, stamp, torch.ops.aten._assert_async.msg, enough, message)
        return True

    def _message(self, exactly: int | None) -> str:
        needed = self._plan.needed
        if self._plan.of is not None:
            return (
                f"recipe {self._plan.recipe.name}: every sample of a batch must hold "
                f"visual tokens and padding, {needed} to drop; run samples that do not "
                "by themselves"
            )
        held = f"at least {needed}" if exactly is None else f"exactly {exactly}"
        return (
            f"recipe {self._plan.recipe.name}: every sample of a batch must hold "
            f"{held} visual tokens, or none and {needed} tokens of padding; run "
            "samples that do not by themselves"
        )
