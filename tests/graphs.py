"""Graphs of one or two dozen nodes, made by hand: a decoder in miniature.

No model is traced. What the analysis reads is there, and little else: features placed
by a mask, the token axis as a symbol, attention in a module of a numbered layer::

    embeds [B, S, 8]    is_image [B, S]    features [V, 8]    mask [B, 1, S, S]
    entered = masked_scatter(embeds, is_image, features)
    q0, k0, v0 = matmul(entered, weights)               # [B, 2, S, 4]
    attended0 = scaled_dot_product_attention(q0, k0, v0, mask)
    added0 = entered + linear(joined heads)
    out0 = added0 + relu(linear(added0))                # and so on in layer 1

``plain_run`` computes the same on tensors, sample by sample, with loops over heads.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import math
import operator
import re
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch._dispatch.python import enable_python_dispatcher
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv

from vtprune_fx.graph.stamps import ALL_CUTS, STAMP, Stamp

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

aten = torch.ops.aten

SAMPLES, TOKENS, IMAGE = 2, 12, 6
"""Sizes of the example that a graph is made with; an image has 6 visual tokens."""

WIDTH, HEADS, HEAD = 8, 2, 4

Inputs = dict[str, Tensor]


class Builder:
    """Makes a graph node by node; every value is a fake tensor."""

    def __init__(self) -> None:
        self.graph = Graph()
        self.shapes = ShapeEnv()
        self.mode = FakeTensorMode(shape_env=self.shapes)
        self.mode.allow_scalar_outputs = True
        self._path: dict[str, tuple[str, str]] = {}

    def size(self, name: str, example: int) -> torch.SymInt:
        """A size that is a symbol."""
        source = ConstantSource(name)
        symbol = self.shapes.create_symbol(
            example, source, dynamic_dim=DimDynamic.DYNAMIC, constraint_dim=None
        )
        size = self.shapes.create_symintnode(symbol, hint=example, source=source)
        assert isinstance(size, torch.SymInt)
        return size

    def input(
        self, name: str, *shape: int | torch.SymInt, dtype: torch.dtype = torch.float32
    ) -> Node:
        """A placeholder."""
        node = self.graph.placeholder(name)
        with self.mode:
            node.meta["val"] = torch.empty(shape, dtype=dtype)
        return node

    def call(self, op: Any, *args: Any, name: str | None = None, **kwargs: Any) -> Node:
        """An operator; its value is what it gives on fake tensors."""
        node = self.graph.create_node("call_function", op, args, kwargs, name=name)
        values = torch.fx.map_arg((args, kwargs), lambda n: n.meta["val"])
        with self.mode, enable_python_dispatcher():
            node.meta["val"] = op(*values[0], **values[1])
        node.meta["nn_module_stack"] = dict(self._path)
        return node

    @contextlib.contextmanager
    def inside(self, path: str) -> Iterator[None]:
        """Nodes made meanwhile come from the module at ``path``."""
        self._path[path] = (path, "Module")
        try:
            yield
        finally:
            del self._path[path]

    def module(self, *outputs: Node) -> GraphModule:
        """The finished graph."""
        self.graph.output(outputs)
        return GraphModule(torch.nn.Module(), self.graph)


@dataclass(frozen=True)
class Spec:
    """What a graph has.

    Attributes:
        layers: Decoder layers.
        attention: One operator, or matmul, softmax and matmul.
        kv_heads: Heads of keys and values, 2 or 1.
        mask: What the attention gets; None is plainly causal.
        rotary: Whether queries and keys are rotated.
        one_view: Whether all layers read one view of each rotary table.
        video: Whether there are features of a second kind.
        flat: Whether MLPs get the tokens of all samples in one row, as many as a size
            that is computed once says: layers of experts do.
        checked: Whether the model checks that there is an image, by a number read back.
        last_row: Whether only the last row comes out, after a linear head.
        cached: Whether keys and values come out.
        dtype: Of all that is computed.
    """

    layers: int = 1
    attention: Literal["fused", "eager"] = "fused"
    kv_heads: int = HEADS
    mask: Literal["bool", "float"] | None = "bool"
    rotary: bool = False
    one_view: bool = False
    video: bool = False
    flat: bool = False
    checked: bool = False
    last_row: bool = False
    cached: bool = True
    dtype: torch.dtype = torch.float32


def decoder(spec: Spec = Spec()) -> GraphModule:
    """The graph of a decoder with an image placed into its prompt.

    Each is made once and then copied; copies share their symbols.
    """
    return copy.deepcopy(_made(spec))


@functools.cache
def _made(spec: Spec) -> GraphModule:
    b = Builder()
    samples, tokens = b.size("B", SAMPLES), b.size("S", TOKENS)
    rows = b.size("V", SAMPLES * IMAGE)
    stream = _inputs(b, spec, samples, tokens, rows)
    named = {node.name: node for node in b.graph.nodes}
    if spec.checked:
        _check(b, named["is_image"])
    for kind in ("image", "video") if spec.video else ("image",):
        where = b.call(aten.unsqueeze.default, named[f"is_{kind}"], -1)
        features = named["features" if kind == "image" else "video_features"]
        stream = b.call(
            aten.masked_scatter.default, stream, where, features, name=f"{kind}_placed"
        )
    length = b.call(aten.sym_size.int, stream, 1, name="length")
    if spec.flat:
        count = b.call(aten.sym_size.int, stream, 0)
        named["all_tokens"] = b.call(operator.mul, count, length, name="all_tokens")
    cached: list[Node] = []
    for index in range(spec.layers):
        layer = _Layer(b, spec, index, named)
        stream = layer.run(stream, length)
        cached += [layer.key, layer.value]
    if spec.last_row:
        last = b.call(aten.slice.Tensor, stream, 1, -1, sys.maxsize, name="last")
        stream = b.call(aten.linear.default, last, named["w_head"], name="logits")
    return b.module(stream, *(cached if spec.cached else ()))


def _inputs(
    b: Builder,
    spec: Spec,
    samples: torch.SymInt,
    tokens: torch.SymInt,
    rows: torch.SymInt,
) -> Node:
    embeds = b.input("embeds", samples, tokens, WIDTH, dtype=spec.dtype)
    b.input("is_image", samples, tokens, dtype=torch.bool)
    b.input("features", rows, WIDTH, dtype=spec.dtype)
    if spec.video:
        b.input("is_video", samples, tokens, dtype=torch.bool)
        more = b.size("W", SAMPLES * IMAGE)
        b.input("video_features", more, WIDTH, dtype=spec.dtype)
    if spec.mask:
        kind = torch.bool if spec.mask == "bool" else spec.dtype
        b.input("mask", samples, 1, tokens, tokens, dtype=kind)
    if spec.rotary:
        b.input("cos", 1, tokens, HEAD, dtype=spec.dtype)
        b.input("sin", 1, tokens, HEAD, dtype=spec.dtype)
    for name, shape in weight_shapes(spec).items():
        b.input(name, *shape, dtype=spec.dtype)
    return embeds


def weight_shapes(spec: Spec) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the weights, which are inputs too."""
    shapes: dict[str, tuple[int, ...]] = {}
    for index in range(spec.layers):
        shapes[f"w_q{index}"] = (HEADS, WIDTH, HEAD)
        shapes[f"w_k{index}"] = shapes[f"w_v{index}"] = (spec.kv_heads, WIDTH, HEAD)
        shapes[f"w_o{index}"] = shapes[f"w_m{index}"] = (WIDTH, WIDTH)
    if spec.last_row:
        shapes["w_head"] = (5, WIDTH)
    return shapes


def _check(b: Builder, is_image: Node) -> None:
    """``assert is_image.any().item()``."""
    found = b.call(aten.any.default, is_image, name="any_image")
    item = b.call(aten.item.default, found, name="item")
    item.meta["stack_trace"] = 'File "model.py", line 7\n    check(is_image.any())'
    said = (item, "no image")
    node = b.graph.call_function(aten._assert_scalar.default, said)
    node.meta["val"] = None


class _Layer:
    """One decoder layer."""

    def __init__(
        self,
        b: Builder,
        spec: Spec,
        index: int,
        named: dict[str, Node],
    ) -> None:
        self._b, self._spec, self._index = b, spec, index
        self._named = named
        self.key: Node
        self.value: Node

    def run(self, stream: Node, length: Node) -> Node:
        """The residual stream that comes out."""
        b, i = self._b, self._index
        with b.inside(f"model.layers.{i}"):
            with b.inside(f"model.layers.{i}.self_attn"):
                attended = self._attend(stream)
                turned = b.call(aten.transpose.int, attended, 1, 2)
                joined = b.call(aten.reshape.default, turned, [-1, length, WIDTH])
                projected = b.call(aten.linear.default, joined, self._named[f"w_o{i}"])
            added = b.call(aten.add.Tensor, stream, projected, name=f"added{i}")
            with b.inside(f"model.layers.{i}.mlp"):
                made = self._mlp(added, length)
            return b.call(aten.add.Tensor, added, made, name=f"out{i}")

    def _mlp(self, stream: Node, length: Node) -> Node:
        b, weight = self._b, self._named[f"w_m{self._index}"]
        if not self._spec.flat:
            return b.call(
                aten.relu.default, b.call(aten.linear.default, stream, weight)
            )
        row = b.call(aten.view.default, stream, [self._named["all_tokens"], WIDTH])
        wide = b.call(aten.linear.default, row, weight)
        made = b.call(aten.relu.default, wide)
        return b.call(aten.view.default, made, [-1, length, WIDTH])

    def _attend(self, stream: Node) -> Node:
        b, i = self._b, self._index
        heads = b.call(aten.unsqueeze.default, stream, 1)
        query, key, value = (
            b.call(aten.matmul.default, heads, self._named[f"w_{n}{i}"], name=f"{n}{i}")
            for n in ("q", "k", "v")
        )
        if self._spec.rotary:
            tables = [self._view_of(table) for table in ("cos", "sin")]
            query = self._rotate(query, tables, "q")
            key = self._rotate(key, tables, "k")
        self.key, self.value = key, value
        if self._spec.attention == "eager":
            return self._written_out(query, key, value)
        op, mask = aten.scaled_dot_product_attention.default, self._named.get("mask")
        grouped = {"enable_gqa": True} if self._spec.kv_heads != HEADS else {}
        args = (mask,) if mask is not None else (None, 0.0, True)
        return b.call(op, query, key, value, *args, name=f"attended{i}", **grouped)

    def _view_of(self, table: str) -> Node:
        """[B, 1, S, D] of a rotary table: the layer's, or one for all."""
        name = f"{table}_view" if self._spec.one_view else f"{table}{self._index}"
        if name not in self._named:
            unsqueeze = aten.unsqueeze.default
            self._named[name] = self._b.call(
                unsqueeze, self._named[table], 1, name=name
            )
        return self._named[name]

    def _rotate(self, value: Node, tables: Sequence[Node], name: str) -> Node:
        """``value * cos + rotate_half(value) * sin``."""
        b = self._b
        cos, sin = tables
        straight = b.call(aten.mul.Tensor, value, cos)
        first = b.call(aten.slice.Tensor, value, 3, 0, HEAD // 2)
        second = b.call(aten.slice.Tensor, value, 3, HEAD // 2, HEAD)
        turned = b.call(aten.cat.default, [b.call(aten.neg.default, second), first], 3)
        crossed = b.call(aten.mul.Tensor, turned, sin)
        name = f"{name}{self._index}_rotated"
        return b.call(aten.add.Tensor, straight, crossed, name=name)

    def _written_out(self, query: Node, key: Node, value: Node) -> Node:
        b, mask = self._b, self._named.get("mask")
        if self._spec.kv_heads != HEADS:
            each = [-1, HEADS, -1, -1]
            key = b.call(aten.expand.default, key, each)
            value = b.call(aten.expand.default, value, each)
        turned = b.call(aten.transpose.int, key, 2, 3)
        logits = b.call(aten.matmul.default, query, turned)
        logits = b.call(aten.mul.Tensor, logits, HEAD**-0.5)
        if mask is not None:
            logits = b.call(aten.add.Tensor, logits, mask)
        shares = b.call(aten.softmax.int, logits, -1)
        name = f"attended{self._index}"
        return b.call(aten.matmul.default, shares, value, name=name)


# ----------------------------------------------------------------- a graph as text


def as_text(module: GraphModule) -> str:
    """One line a node: name, value, operator and arguments; B, S, V for symbols.

    A value that lacks tokens is written with what it lacks: ``[B, S, 8] - 3 tokens``.
    Unlike ``print_readable`` it is the same in all releases of torch.
    """
    names: dict[str, str] = {}
    letters = iter("BSVW")
    for node in module.graph.find_nodes(op="placeholder"):
        for size in getattr(node.meta["val"], "shape", ()):
            if isinstance(size, torch.SymInt) and str(size) not in names:
                names[str(size)] = next(letters)
    lines = [_line(node, names) for node in module.graph.nodes]
    return _counted_from_zero("\n".join(lines) + "\n")


def _counted_from_zero(text: str) -> str:
    """Symbols of sizes that are read from the data: u0, u1, ... in their order."""
    found = dict.fromkeys(re.findall(r"\bu\d+\b", text))
    numbers = {symbol: f"u{number}" for number, symbol in enumerate(found)}
    return re.sub(r"\bu\d+\b", lambda match: numbers[match[0]], text)


def _line(node: Node, names: Mapping[str, str]) -> str:
    if node.op == "output":
        return f"return {_argument(node.args[0])}"
    value = _value_text(node, names)
    if node.op == "placeholder":
        return f"{node.name}: {value}"
    given = [_argument(arg) for arg in node.args]
    given += [f"{name}={_argument(arg)}" for name, arg in node.kwargs.items()]
    target = str(node.target) if not callable(node.target) else _target(node.target)
    stamp = node.meta.get(STAMP)
    mark = f"    # {_stamp_text(stamp)}" if stamp else ""
    return f"{node.name}: {value} = {target}({', '.join(given)}){mark}"


def _stamp_text(stamp: Stamp) -> str:
    """First and last field: what a node is, and the layer of its cut."""
    kind, layer = stamp.kind.value, stamp.layer
    return kind if layer == ALL_CUTS else f"{kind} {layer}"


def _target(target: Any) -> str:
    if isinstance(target, torch._ops.OpOverload):
        return str(target).removesuffix(".default")
    return str(target.__name__)


def _argument(arg: Any) -> str:
    if isinstance(arg, (list, tuple)):
        return "[" + ", ".join(map(_argument, arg)) + "]"
    if isinstance(arg, Node):
        return arg.name
    return "END" if arg == sys.maxsize else repr(arg)


def _value_text(node: Node, names: Mapping[str, str]) -> str:
    shorter = node.meta.get("vtprune_shorter")
    if shorter is None:
        return _shape_text(node.meta.get("val"), names)
    gone = "?" if shorter.dropped is None else shorter.dropped
    return f"{_shape_text(shorter.full, names)} - {gone} tokens"


def _shape_text(value: Any, names: Mapping[str, str]) -> str:
    if isinstance(value, Tensor):
        sizes = ", ".join(_size_text(size, names) for size in value.shape)
        return f"{_DTYPES[value.dtype]}[{sizes}]"
    if isinstance(value, (tuple, list)):
        return "(" + ", ".join(_shape_text(item, names) for item in value) + ")"
    return _size_text(value, names)


def _size_text(size: Any, names: Mapping[str, str]) -> str:
    text = str(size)
    for symbol, name in names.items():
        text = text.replace(symbol, name)
    return text


_DTYPES = {
    torch.float32: "f32",
    torch.float64: "f64",
    torch.float16: "f16",
    torch.int64: "i64",
    torch.bool: "b8",
}


# ------------------------------------------------------- inputs, and the same by hand


def inputs_for(
    spec: Spec,
    images: Sequence[int] = (IMAGE, IMAGE, IMAGE),
    tokens: int = TOKENS + 3,
    padding: int = 0,
) -> Inputs:
    """Random inputs: text, visual tokens, text; the last sample padded in front.

    Sizes need not be those that the graph was made with.

    Args:
        spec: Of the graph.
        images: For each sample, how many visual tokens it has.
        tokens: Length of the prompts.
        padding: Of the last sample.
    """
    samples = len(images)
    generator = torch.Generator().manual_seed(7)

    def random(*shape: int) -> Tensor:
        drawn = torch.randn(*shape, generator=generator, dtype=torch.float64)
        return drawn.to(spec.dtype)

    given: Inputs = {"embeds": random(samples, tokens, WIDTH)}
    is_image = torch.zeros(samples, tokens, dtype=torch.bool)
    for sample, count in enumerate(images):
        start = 1 + sample % 2 + (padding if sample == samples - 1 else 0)
        is_image[sample, start : start + count] = True
    given["is_image"] = is_image
    given["features"] = random(sum(images), WIDTH)
    if spec.video:
        given["is_video"] = torch.zeros_like(is_image)
        given["is_video"][:, -2] = True
        given["video_features"] = random(samples * IMAGE, WIDTH)
    if spec.mask:
        attends = torch.ones(samples, 1, tokens, tokens, dtype=torch.bool).tril()
        attends[-1, :, :, :padding] = False
        never = torch.finfo(spec.dtype).min
        added = torch.zeros(attends.shape, dtype=spec.dtype)
        added = added.masked_fill(~attends, never)
        given["mask"] = attends if spec.mask == "bool" else added
    if spec.rotary:
        angles = torch.arange(tokens)[:, None] * torch.tensor([1.0, 0.1, 1.0, 0.1])
        given["cos"] = angles.cos()[None].to(spec.dtype)
        given["sin"] = angles.sin()[None].to(spec.dtype)
    for name, shape in weight_shapes(spec).items():
        given[name] = random(*shape) / math.sqrt(WIDTH)
    return given


@dataclass
class Sample:
    """One sample in ``plain_run``, as it is at a cut.

    Attributes:
        layer: The layer of the cut.
        stream: [n, E], the residual stream before the layer.
        roles: [n], 0 text, 1 visual, 2 text after the image, 3 padding.
        places: [n], where the tokens stood in the prompt.
        shares: [H, n, n], the layer's attention probabilities.
        new: [C, E], new tokens made at the cut, which a keep set calls -C to -1.
    """

    layer: int
    stream: Tensor
    roles: Tensor
    places: Tensor
    shares: Tensor
    new: Tensor | None = None


Keep = dict[int, "Callable[[Sample], list[int]]"]
"""For each layer with a cut, which tokens stay: numbers among those that are there."""


@dataclass
class Ran:
    """What ``plain_run`` gives for one sample.

    Attributes:
        out: [n, E] the residual stream, or [1, 5] what the head made of its last row.
        keys: For each layer [G, n, D].
        values: As ``keys``.
        places: [n], where the tokens left stood in the prompt.
    """

    out: Tensor
    keys: list[Tensor]
    values: list[Tensor]
    places: Tensor


def plain_run(
    spec: Spec, given: Inputs, keep: Keep, sample: int, site: str = "after_attention"
) -> Ran:
    """What the graph computes for one sample, with tokens left out: no fx, no batch."""
    stream, roles = _entered(spec, given, sample)
    at = Sample(0, stream, roles, torch.arange(len(stream)), torch.empty(0))
    keys: list[Tensor] = []
    values: list[Tensor] = []
    for layer in range(spec.layers):
        attend = _Plain(spec, given, sample, layer)
        at.layer, at.shares = layer, attend(at.stream, at.places).shares
        if site == "before_layer" and layer in keep:
            at = _after_cut(at, at.stream, keep[layer](at))
        found = attend(at.stream, at.places)
        keys.append(found.key)
        values.append(found.value)
        attended = found.attended
        if site == "after_attention" and layer in keep:
            stays = keep[layer](at)
            at, attended = _after_cut(at, at.stream, stays), attended[stays]
        stream = at.stream + attended @ given[f"w_o{layer}"].T
        stream = stream + (stream @ given[f"w_m{layer}"].T).clamp(min=0)
        if site == "after_layer" and layer in keep:
            at.stream = stream
            at = _after_cut(at, stream, keep[layer](at))
        else:
            at.stream = stream
    out = at.stream[-1:] @ given["w_head"].T if spec.last_row else at.stream
    return Ran(out, keys, values, at.places)


def _after_cut(at: Sample, stream: Tensor, stays: list[int]) -> Sample:
    """What is left; a new token passes for the token in front of it."""
    longer = stream if at.new is None else torch.cat((stream, at.new))
    stand_in: list[int] = []
    for number in stays:
        stand_in.append(number if number >= 0 else stand_in[-1])
    return Sample(
        at.layer, longer[stays], at.roles[stand_in], at.places[stand_in], at.shares
    )


def _entered(spec: Spec, given: Inputs, sample: int) -> tuple[Tensor, Tensor]:
    """Embeddings with features in the places of visual tokens, and roles."""
    stream, roles = given["embeds"][sample].clone(), []
    used = int(given["is_image"][:sample].sum())
    for place, visual in enumerate(given["is_image"][sample].tolist()):
        if visual:
            stream[place] = given["features"][used]
            used += 1
    last = max(given["is_image"][sample].nonzero().flatten().tolist(), default=-1)
    attended = _pairs(spec, given, sample).any(dim=0)
    for place in range(len(stream)):
        if given["is_image"][sample, place]:
            roles.append(1)
        elif not attended[place]:
            roles.append(3)
        else:
            roles.append(2 if place > last else 0)
    return stream, torch.tensor(roles)


def _pairs(spec: Spec, given: Inputs, sample: int) -> Tensor:
    """[S, S] bool: which token attends to which."""
    if spec.mask is None:
        tokens = given["embeds"].shape[1]
        return torch.ones(tokens, tokens, dtype=torch.bool).tril()
    mask = given["mask"][sample, 0]
    return mask if spec.mask == "bool" else mask == 0


@dataclass
class _Attended:
    """Of one sample: [n, H * D], probabilities [H, n, n], keys and values [G, n, D]."""

    attended: Tensor
    shares: Tensor
    key: Tensor
    value: Tensor


class _Plain:
    """The attention of one layer, head by head."""

    def __init__(self, spec: Spec, given: Inputs, sample: int, layer: int) -> None:
        self._spec, self._given, self._layer = spec, given, layer
        self._pairs = _pairs(spec, given, sample)

    def __call__(self, stream: Tensor, places: Tensor) -> _Attended:
        groups = HEADS // self._spec.kv_heads
        query = torch.stack([stream @ w for w in self._given[f"w_q{self._layer}"]])
        key = torch.stack([stream @ w for w in self._given[f"w_k{self._layer}"]])
        value = torch.stack([stream @ w for w in self._given[f"w_v{self._layer}"]])
        if self._spec.rotary:
            query, key = self._rotated(query, places), self._rotated(key, places)
        order = torch.arange(len(places))
        # New tokens share a place: among them the order in the row decides.
        pairs = self._pairs[places][:, places] & (order[:, None] >= order)
        heads, shares = [], []
        for head in range(HEADS):
            logits = query[head] @ key[head // groups].T / math.sqrt(HEAD)
            logits = logits.masked_fill(~pairs, -math.inf)
            # A row that attends to nothing is padding; what it holds is not compared.
            shares.append(logits.softmax(dim=1).nan_to_num(0.0))
            heads.append(shares[-1] @ value[head // groups])
        return _Attended(torch.cat(heads, dim=1), torch.stack(shares), key, value)

    def _rotated(self, value: Tensor, places: Tensor) -> Tensor:
        """Pairs of numbers turned by their token's angles."""
        half = HEAD // 2
        turned = value.clone()
        for row, place in enumerate(places.tolist()):
            cos = self._given["cos"][0, place, :half]
            sin = self._given["sin"][0, place, :half]
            first, second = value[:, row, :half], value[:, row, half:]
            turned[:, row, :half] = first * cos - second * sin
            turned[:, row, half:] = second * cos + first * sin
        return turned
