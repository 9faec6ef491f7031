"""Give the prompt behind each cut a length that is a symbol of its own.

Behind the cuts of a recipe the lengths are S - 36, S - 92, ...: to a compiler each is
another shape, and it generates every layer's kernels anew. With a symbol in their place
the layers are alike, and their kernels are generated once::

    vtprune_keep_3: "i64[B, S - 36]" = vtprune.choose(vtprune_roles, 36, ...)
    length: "Sym(S - 36)" = aten.sym_size(vtprune_keep_3, 1)

becomes::

    vtprune_keep_3: "i64[B, S - 36]" = vtprune.choose(vtprune_roles, 36, ...)
    own_length: "i64[B, u0]" = vtprune.own_length(vtprune_keep_3)
    length: "Sym(u0)" = aten.sym_size(own_length, 1)
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import GraphModule

from vtprune_fx.graph.insert import STAMP, Stamp
from vtprune_fx.graph.values import dropped_tokens, set_value, value_at_full_length
from vtprune_fx.ops.register import operator
from vtprune_fx.passes.base import Pass
from vtprune_fx.passes.insert_scores import KEEP_PREFIX, KEYS_PREFIX
from vtprune_fx.planning.plan import PrunePlan


def _any_number(positions: Tensor) -> Tensor:
    # Two at least: a length of 1 would be a size that broadcasts.
    length = torch.library.get_ctx().new_dynamic_size(min=2)
    return positions.new_empty(positions.shape[0], length)


@operator("vtprune::own_length", _any_number)
def own_length(positions: Tensor) -> Tensor:
    """The same positions [B, K], of whose number a compiler knows nothing."""
    return positions.clone()


class OwnLengths(Pass):
    """Hide from the compiler what the lengths behind cuts have to do with each other.

    1. A cut whose number of tokens is known: what it keeps gets a length of its own.
    2. Counts that follow the rank: their lengths are symbols already.
    3. No cuts: unchanged.

    Recorded values stay what they were: they tell the lengths.
    """

    def __init__(self, plan: PrunePlan) -> None:
        self._plan = plan

    def edit(self, module: GraphModule) -> bool:
        """Insert one operator a cut."""
        named = {node.name: node for node in module.graph.nodes}
        known = [cut for cut in self._plan.cuts if cut.rule is None]
        for cut in known:
            layer = cut.attention.layer
            keep = named[f"{KEEP_PREFIX}{layer}"]
            keys = named.get(f"{KEYS_PREFIX}{layer}", keep)
            with module.graph.inserting_after(keys):
                own = module.graph.call_function(own_length, (keys,))
            keys.replace_all_uses_with(own, lambda user, own=own: user is not own)
            own.meta = keys.meta | {STAMP: Stamp("keep", layer)}
            set_value(own, value_at_full_length(keys), dropped_tokens(keys))
        return bool(known)
