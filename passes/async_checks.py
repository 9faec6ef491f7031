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
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch.fx import GraphModule, Node, map_arg

from vtprune_fx.graph.stamps import STAMP, Stamp, StampKind
from vtprune_fx.passes.base import Pass

aten = torch.ops.aten

_ASSERT = aten._assert_scalar.default
_ARITHMETIC: frozenset[object] = frozenset(
    # What tracing derives from a truth value to assert its range. Each is plain Python,
    # so what the assertions amount to is found by trying both truth values.
    {torch.sym_ite, operator.ge, operator.le, operator.eq}
)


class AsyncChecks(Pass):
    """Turn scalar assertions on a boolean tensor into one assertion on the tensor.

    1. ``item`` of a bool tensor, read by nothing but assertions which together hold if
       and only if it is true: rewritten.
    2. Any other ``item``: left alone.
    """

    def edit(self, module: GraphModule) -> bool:
        """Rewrite every check of the first kind."""
        modified = False
        for item in module.graph.find_nodes(
            op="call_function", target=aten.item.default
        ):
            readers = list(_readers(item))
            if _asserts_truth(item, readers):
                _rewrite(module, item, readers)
                modified = True
        return modified


def _asserts_truth(item: Node, readers: list[Node]) -> bool:
    checked = item.args[0]
    assert isinstance(checked, Node)
    if checked.meta["val"].dtype != torch.bool:
        return False
    if any(node.target not in _ARITHMETIC | {_ASSERT} for node in readers):
        return False
    return _hold(item, readers, truth=True) and not _hold(item, readers, truth=False)


def _hold(item: Node, readers: list[Node], *, truth: bool) -> bool:
    """Whether all assertions hold when ``item`` is ``truth``."""
    values: dict[Node, Any] = {item: truth}
    for node in readers:
        args = map_arg(node.args, values.__getitem__)
        if node.target is not _ASSERT:
            values[node] = cast("Callable[..., Any]", node.target)(*args)
        elif not args[0]:
            return False
    return True


def _rewrite(module: GraphModule, item: Node, readers: list[Node]) -> None:
    message = f"runtime check failed: {_source(item)}"
    with module.graph.inserting_before(item):
        check = module.graph.call_function(
            aten._assert_async.msg, (item.args[0], message)
        )
    check.meta = {**item.meta, "val": None, STAMP: Stamp(StampKind.CHECK)}
    check.meta.pop("unbacked_bindings", None)
    for node in (*reversed(readers), item):
        module.graph.erase_node(node)


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
    """The model's line that asked for the check."""
    trace = str(item.meta.get("stack_trace") or "").strip().splitlines()
    lines = [
        line.strip()
        for line in trace
        if not line.strip().startswith(("File", "^", "~"))
    ]
    return lines[-1] if lines else item.name
