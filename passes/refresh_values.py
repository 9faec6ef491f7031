"""Give every node after a cut a plain ``val`` again.

Passes keep a value after a cut as "what it was, less n tokens", which costs nothing::

    add.meta: {"vtprune_shorter": Shorter(full="f32[B, S, E]", dropped=36)}

Serialising a program needs fake tensors instead::

    add.meta: {"val": "f32[B, S - 36, E]"}

A fake tensor with a new length costs milliseconds, so this runs for exported
programs and not on the way to a compiler, which traces the graph once more anyway.
"""

from __future__ import annotations

from torch._dispatch.python import enable_python_dispatcher
from torch.fx import GraphModule, map_arg

from vtprune_fx.graph.fakes import fake_mode_of, uncached_fakes
from vtprune_fx.graph.values import SHORTER
from vtprune_fx.passes.base import Pass


class RefreshValues(Pass):
    """Run what comes after a cut on fake tensors.

    1. A node without a plain ``val``: run.
    2. No such node: unchanged.
    """

    runs_after = frozenset(
        {"GatherTokens", "ShiftKeys", "ReadRows", "ShareAttention", "OwnLengths"}
    )

    def edit(self, module: GraphModule) -> bool:
        """Fill in the missing values."""
        short = [node for node in module.graph.nodes if SHORTER in node.meta]
        if not short:
            return False
        mode = fake_mode_of(module.graph)
        with mode, uncached_fakes(mode), enable_python_dispatcher():
            for node in short:
                args, kwargs = map_arg(
                    (node.args, node.kwargs), lambda n: n.meta["val"]
                )
                del node.meta[SHORTER]
                node.meta["val"] = node.target(*args, **kwargs)
        return True
