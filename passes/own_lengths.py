"""Give the prompt after each cut a length that is a new symbol.

After the cuts of a recipe the lengths are S - 36, S - 92, ...: to a compiler each is
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

from torch.fx import GraphModule

from vtprune_fx.graph.stamps import cut_nodes
from vtprune_fx.graph.values import dropped_tokens, set_value, value_at_full_length
from vtprune_fx.ops.lengths import own_length
from vtprune_fx.passes.base import Pass
from vtprune_fx.planning.plan import PrunePlan


class OwnLengths(Pass):
    """Hide from the compiler how the lengths after cuts are related.

    1. A cut whose number of tokens is known: the length of what it keeps is a symbol.
    2. Counts that follow the rank: their lengths are symbols already.
    3. Lengths that are symbols by this pass, no cuts: unchanged.

    Recorded values are what they were: they say what the lengths are.
    """

    requires = frozenset({"InsertScores"})
    runs_after = frozenset({"GatherTokens", "ShareAttention"})

    def __init__(self, plan: PrunePlan) -> None:
        self._plan = plan

    def edit(self, module: GraphModule) -> bool:
        """Insert one operator a cut."""
        inserted = cut_nodes(module.graph)
        modified = False
        for cut in self._plan.cuts:
            nodes = inserted[cut.attention.layer]
            keys = nodes.keys or nodes.keep
            if cut.rule is not None or keys.target == own_length:
                continue
            readers = list(keys.users)
            with module.graph.inserting_after(keys):
                copied = module.graph.call_function(own_length, (keys,))
            for reader in readers:
                reader.replace_input_with(keys, copied)
            # The stamp too: from here on the copy is the keep set, or the keys of it.
            copied.meta = dict(keys.meta)
            set_value(copied, value_at_full_length(keys), dropped_tokens(keys))
            modified = True
        return modified
