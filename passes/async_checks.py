"""Keep runtime checks of tensors on the device.

A model that checks its input (LLaVA compares the number of image placeholders with the
number of image features) traces to a scalar that is read back from the device. Reading
it stops the device and makes a data-dependent number in the graph::

    ok: "b8[]" = aten._is_all_true(eq)
    item: "Sym(u0)" = aten.item(ok)
    sym_ite = torch.sym_ite(item, 1, 0);  ge = sym_ite >= 1
    aten._assert_scalar(ge, "Runtime assertion failed ...")
    aten._assert_scalar(item, ...)

becomes an assertion on the tensor itself::

    ok: "b8[]" = aten._is_all_true(eq)
    aten._assert_async.msg(ok, "runtime check failed: torch_compilable_check( ...")
"""

from __future__ import annotations

import operator
from collections.abc import Iterator

import torch
from torch.fx import GraphModule, Node

from vtprune_fx.graph import STAMP, Stamp
from vtprune_fx.passes.base import Pass

aten = torch.ops.aten

_ASSERT = aten._assert_scalar.default
_ARITHMETIC: frozenset[object] = frozenset(
    # What tracing derives from a scalar to assert its range: nothing but truth values
    # of the same check, so the assertion on the tensor implies every one of them.
    {torch.sym_ite, torch.sym_not, operator.ge, operator.le, operator.eq}
)


class AsyncChecks(Pass):
    """Turn scalar assertions on a boolean tensor into one assertion on the tensor.

    1. ``item`` of a bool tensor, read by nothing but assertions: rewritten.
    2. ``item`` read by anything else: left alone.
    """

    def edit(self, module: GraphModule) -> bool:
        """Rewrite every check of the first kind."""
        graph = module.graph
        modified = False
        for item in graph.find_nodes(op="call_function", target=aten.item.default):
            readers = list(_readers(item))
            if any(n.target not in _ARITHMETIC | {_ASSERT} for n in readers):
                continue
            checked = item.args[0]
            with graph.inserting_before(item):
                check = graph.call_function(
                    aten._assert_async.msg,
                    (checked, f"runtime check failed: {_source(item)}"),
                )
            check.meta = {**item.meta, "val": None, STAMP: Stamp("check", -1)}
            check.meta.pop("unbacked_bindings", None)
            for node in reversed(readers):
                graph.erase_node(node)
            graph.erase_node(item)
            modified = True
        return modified


def _readers(item: Node) -> Iterator[Node]:
    """All that depends on ``item``, each after what it reads."""
    dependent = {item}
    node = item.next
    while node.op != "root":
        if dependent & set(node.all_input_nodes):
            dependent.add(node)
            yield node
        node = node.next


def _source(item: Node) -> str:
    """The model's own line that asked for the check."""
    trace = str(item.meta.get("stack_trace") or "").strip().splitlines()
    lines = [
        line.strip()
        for line in trace
        if not line.strip().startswith(("File", "^", "~"))
    ]
    return lines[-1] if lines else item.name
