"""Hand out keys as if no token had moved.

With compacted positions the tokens after a cut stand at the first positions of their
row: less than before by a number s, the same for all that follow. A new token, in
decoding, would need another position in each layer. Rotary attention knows differences
alone, so moving the cached keys of such a layer up by s is the same, and then a new
token's position is that of the original prompt, everywhere and in every runtime::

    keys: "f32[B, G, S - 36, D]"        # read by the layer's attention, and handed out

becomes, for the output alone::

    first: "f32[B, G, S - 36, D]"       # read by the layer's attention
    shift_cos: "f32[B or 1, 1, 1, D]"   # from the tables' last rows, and shift_sin too
    keys: "f32[B, G, S - 36, D]" = first * shift_cos + rotate_half(first) * shift_sin

The shift is the difference of the last token's positions, so that a sample without
image, which keeps its positions, is shifted by nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from vtprune_fx.analysis.no_match import NoMatch
from vtprune_fx.analysis.residual import rotary
from vtprune_fx.errors import PlanError
from vtprune_fx.graph.insert import Inserter
from vtprune_fx.graph.stamps import Stamp, StampKind
from vtprune_fx.graph.values import dropped_tokens
from vtprune_fx.passes.base import Pass
from vtprune_fx.planning.plan import PrunePlan


class ShiftKeys(Pass):
    """Rotate the keys that the graph hands out.

    1. A layer whose attention comes after a cut, positions compacted: rotated.
    2. Layers before all cuts, positions kept, no keys handed out: unchanged.
    """

    requires = frozenset({"GatherTokens"})

    def __init__(self, plan: PrunePlan) -> None:
        self._plan = plan

    def edit(self, module: GraphModule) -> bool:
        """Rotate them."""
        if self._plan.recipe.positions != "compacted" or not self._plan.cuts:
            return False
        graph = module.graph
        named = {node.name: node for node in graph.nodes}
        inserter = Inserter(graph)
        for layer in self._plan.attentions:
            stream = layer.stream
            if stream.cached is None:
                continue
            keys, came = named[stream.cached], named[str(stream.cos)]
            found = rotary(named[layer.query])
            if isinstance(found, NoMatch):
                raise PlanError(
                    f"rotary positions of layer {layer.layer}",
                    expected="tables that this layer reads after the cut before it",
                    found=str(found),
                    fix="Use a recipe that keeps positions, or report the model.",
                )
            cos, sin = found
            if cos is came:
                continue
            stamp, gone = Stamp(StampKind.SHIFT, layer.layer), dropped_tokens(keys)
            assert gone is not None
            tables = (cos, sin, came, named[str(stream.sin)])
            first = _split(inserter, keys, stamp)
            moved = inserter.trace(
                keys, stamp, moved_back, first, *tables, dropped=gone
            )
            keys.target, keys.args, keys.kwargs = moved.target, moved.args, moved.kwargs
            graph.erase_node(moved)
        return True


def _split(inserter: Inserter, keys: Node, stamp: Stamp) -> Node:
    """The keys that the layer reads; the old node is then the output's alone.

    It is the one that goes on, since the graph's outputs are known by their names.
    """
    first = inserter.copy(keys, stamp, [keys])[keys]
    keys.replace_all_uses_with(first, delete_user_cb=lambda user: user.op != "output")
    return first


def moved_back(
    keys: Tensor, cos: Tensor, sin: Tensor, came_cos: Tensor, came_sin: Tensor
) -> Tensor:
    """Rotated keys at the positions that their tokens came with.

    With a the last token's original angle and b its angle now, by a - b::

        cos(a - b) = cos a cos b + sin a sin b
        sin(a - b) = sin a cos b - cos a sin b

    divided by the square of what tables are scaled by (long-context variants), which is
    cos^2 + sin^2.

    Args:
        keys: [B, G, K, D].
        cos: [B or 1, K, D], now.
        sin: As ``cos``.
        came_cos: [B or 1, S, D], as the prompt came.
        came_sin: As ``came_cos``.

    Returns:
        [B, G, K, D].
    """
    # One operator takes the last row: no value has more tokens than the keys.
    now_cos, now_sin, last_cos, last_sin = (
        table.select(1, -1).float().unsqueeze(1).unsqueeze(1)
        for table in (cos, sin, came_cos, came_sin)
    )
    scale = now_cos.square() + now_sin.square()
    shift_cos = (last_cos * now_cos + last_sin * now_sin) / scale
    shift_sin = (last_sin * now_cos - last_cos * now_sin) / scale
    exact = keys.float()
    first, second = exact.chunk(2, dim=3)
    turned = torch.cat((-second, first), dim=3)
    return (exact * shift_cos + turned * shift_sin).to(keys.dtype)
