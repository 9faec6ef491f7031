"""The sizes that an engine is built for: smallest, most usual, largest.

An engine takes inputs of any size between the smallest and the largest and is tuned for
the most usual. A graph's symbolic sizes, given values at these three points,
determine the shape of each input and output there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, NamedTuple

from vtprune_fx.errors import ExportError, InputError

if TYPE_CHECKING:
    import onnx_ir

LONGEST_SORT = 3840
"""TopK takes no more values than this (TensorRT 10.15 operator table; RTX 1.7 too), and
a cut sorts the prompt."""

Point = dict[str, int]
"""A value for each symbolic size of a graph."""

_CACHE = "input.past_key_values."
_CACHE_LENGTH = 2


class Span(NamedTuple):
    """The smallest, most usual and largest value of one size."""

    smallest: int
    usual: int
    largest: int

    @classmethod
    def parse(cls, text: str, option: str) -> Span:
        """Read ``600:700:1024``, or ``1`` for a size that never varies.

        Raises:
            InputError: It is neither, or not in order.
        """
        parts = text.split(":")
        numbers = [int(part) if part.isdecimal() else 0 for part in parts]
        numbers = numbers * 3 if len(numbers) == 1 else numbers
        if len(numbers) != 3 or not 1 <= numbers[0] <= numbers[1] <= numbers[2]:
            raise InputError(
                option,
                expected="smallest:usual:largest, in order and from 1 on, as 1:1:4",
                found=text,
                fix="Name three sizes, or one that never varies.",
            )
        return cls(*numbers)


_ONE, _FEW = Span(1, 1, 1), Span(1, 1, 4)


@dataclass(frozen=True)
class EngineSizes:
    """The sizes that an engine takes.

    Attributes:
        batch: Prompts.
        prompt: Tokens of a prompt, visual ones included; None for a span that fits the
            visual tokens of the example.
        images: Images of a prompt.
        new_tokens: Tokens that are generated after a prompt at most.
    """

    batch: Span = _FEW
    prompt: Span | None = None
    images: Span = _ONE
    new_tokens: int = 512

    def __post_init__(self) -> None:
        """Refuse what no engine can be built for, before anything slow.

        Raises:
            InputError: Prompts are longer than a cut can sort.
        """
        if self.prompt is not None and self.prompt.largest > LONGEST_SORT:
            raise InputError(
                "--prompt",
                expected=f"at most {LONGEST_SORT} tokens, which TensorRT sorts at once",
                found=str(self.prompt.largest),
                fix="Name a smaller largest prompt.",
            )

    def for_prompts(self, visual_tokens: int, dropped: int) -> EngineSizes:
        """The same sizes with the prompt filled in.

        Args:
            visual_tokens: Of one prompt.
            dropped: Tokens of a prompt that are dropped in all.

        Raises:
            InputError: The smallest prompt has no token left, or the prompt that was
                left out is longer than a cut can sort.
        """
        prompt = self.prompt or Span(
            visual_tokens + 16, visual_tokens + 128, visual_tokens + 448
        )
        if prompt.smallest <= dropped:
            raise InputError(
                "--prompt",
                expected=f"more than {dropped} tokens, which are dropped",
                found=str(prompt.smallest),
                fix="Name a larger smallest prompt.",
            )
        return EngineSizes(self.batch, prompt, self.images, self.new_tokens)

    def fields(self) -> dict[str, object]:
        """As JSON has it."""
        return asdict(self)


def prefill_points(graph: onnx_ir.Graph, sizes: EngineSizes) -> list[Point]:
    """The three points of a prefill graph.

    Sizes of inputs are the batch's, the prompt's, or a number of images in all.
    """
    assert sizes.prompt is not None, "filled in by for_prompts"
    [ids] = [value for value in graph.inputs if value.name == "input_ids"]
    batch, prompt = _symbols(ids)
    images = {name for value in graph.inputs for name in _symbols(value)} - {
        batch,
        prompt,
    }
    return [
        {batch: samples, prompt: tokens} | dict.fromkeys(images, samples * each)
        for samples, tokens, each in zip(
            sizes.batch, sizes.prompt, sizes.images, strict=True
        )
    ]


def decode_points(
    graph: onnx_ir.Graph, sizes: EngineSizes, filled: Mapping[str, Sequence[int]]
) -> list[Point]:
    """The three points of a decode graph, with a separate cache length for each layer.

    The smallest cache is empty, for prompts of text alone.

    Args:
        graph: Takes new tokens, one or any number, the cache, and a mask as long as
            both.
        sizes: The prefill's sizes.
        filled: For each output of the prefill that is a cache, its length at the
            prefill's points.
    """
    assert sizes.prompt is not None, "filled in by for_prompts"
    _, usual, largest = sizes.prompt
    most = sizes.new_tokens - 1
    grown = (most // 2, most)
    points: list[Point] = [{}, {}, {}]
    for value in graph.inputs:
        name = str(value.name)
        if name.startswith(_CACHE):
            lengths = filled[name.removeprefix("input.")]
            ends = (0, lengths[1] + grown[0], lengths[2] + grown[1])
        elif name == "attention_mask":
            ends = (1, usual + grown[0] + 1, largest + grown[1] + 1)
        else:
            ends = (1, 1, largest)
        for point, samples, end in zip(points, sizes.batch, ends, strict=True):
            point |= dict(zip(_symbols(value), (samples, end), strict=False))
    return points


def cache_lengths(graph: onnx_ir.Graph, points: list[Point]) -> dict[str, list[int]]:
    """For each output of a prefill that is a cache, its length at each point."""
    return {
        str(value.name): [shape_at(value, point)[_CACHE_LENGTH] for point in points]
        for value in graph.outputs
        if str(value.name).startswith(_CACHE.removeprefix("input."))
    }


def shape_at(value: onnx_ir.Value, point: Point) -> tuple[int, ...]:
    """The shape of a graph's input or output at a point.

    Raises:
        ExportError: It depends on something else.
    """
    assert value.shape is not None
    shape = value.shape.evaluate(point)
    if not shape.is_static():
        raise ExportError(
            f"tensor {value.name}",
            expected=f"a shape that follows from {', '.join(point)}",
            found=str(value.shape),
            fix="Report the model: its graph has sizes that do not follow from inputs.",
        )
    return tuple(int(size) for size in shape.numpy())


def _symbols(value: onnx_ir.Value) -> list[str]:
    """The symbols among an input's sizes, in order."""
    assert value.shape is not None
    return [str(size.value) for size in value.shape if not isinstance(size, int)]
