"""Cluttered pictures: shapes and handwritten digits on photographs and textures.

A picture is a square of ``SIDE`` pixels. Its things differ in noun, colour, size and
place, never overlap, and are distinguished by one or a few patches; the rest of the
picture is background. Digits are scikit-learn's (1,797 scans of handwriting),
photographs those that come with scikit-image and scikit-learn. Splits share no scan:
what a digit looks like in the test split was never trained on.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vtprune_fx.optional import optional

SIDE = 240
"""Side of a picture in pixels: 12 patches of 20."""

COLOURS = {
    "red": (225, 35, 40),
    "green": (40, 175, 60),
    "blue": (45, 90, 235),
    "yellow": (245, 225, 40),
    "purple": (150, 50, 200),
    "orange": (250, 140, 25),
    "white": (248, 248, 248),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
DIGITS = tuple(str(digit) for digit in range(10))
SIZES = {"small": (10.0, 11.5), "large": (14.0, 16.5)}
"""Ranges of radii in pixels. A small thing is about as wide as a patch."""

_SCANS = np.random.default_rng(0).permutation(1797)
SPLITS = {"train": _SCANS[:1400], "validation": _SCANS[1400:1500]}
SPLITS["test"] = _SCANS[1500:]
"""Scans of digits that each split may draw. All splits have scans of every writer."""

_WHAT = "drawing the reference model's pictures"
_PHOTOGRAPHS = ("astronaut", "brick", "chelsea", "coffee", "grass", "gravel", "rocket")
_PLATE = 22.0
"""Grey value of the dark disc that a digit is drawn on."""

Pixels = NDArray[np.floating[Any]]


@dataclass(frozen=True)
class Thing:
    """One thing in a picture.

    Attributes:
        noun: One of ``SHAPES`` or ``DIGITS``.
        colour: One of ``COLOURS``.
        size: One of ``SIZES``.
        x: Centre, in pixels from the left.
        y: Centre, in pixels from the top.
        radius: Of the circle around it, in pixels.
    """

    noun: str
    colour: str
    size: str
    x: float
    y: float
    radius: float

    @property
    def is_digit(self) -> bool:
        """Whether it is a handwritten digit."""
        return self.noun in DIGITS


@dataclass(frozen=True, eq=False)
class Picture:
    """What is drawn, and the drawing.

    Attributes:
        things: In the order in which they were placed.
        pixels: [SIDE, SIDE, 3] uint8.
    """

    things: tuple[Thing, ...]
    pixels: NDArray[np.uint8]


def draw_picture(
    rng: np.random.Generator, split: str, fewest: int, most: int
) -> Picture:
    """Draw a picture with ``fewest`` to ``most`` things (fewer where no room is left).

    Args:
        rng: Decides everything.
        split: The split of the digits, a key of ``SPLITS``.
        fewest: Things at least.
        most: Things at most.
    """
    canvas = _background(rng)
    things = _place(rng, int(rng.integers(fewest, most + 1)))
    for thing in things:
        _paint(canvas, thing, rng, split)
    grain = rng.standard_normal((SIDE, SIDE, 1), np.float32)
    canvas += np.float32(rng.uniform(0, 5)) * grain
    return Picture(things, canvas.clip(0, 255).astype(np.uint8))


def _place(rng: np.random.Generator, count: int) -> tuple[Thing, ...]:
    """Draw things at places where they do not touch.

    Nouns and colours come from a few of each, so that things share them: a question
    that names one of the two is then rarely enough to find a thing.
    """
    shapes = rng.choice(SHAPES, 3, replace=False)
    colours = rng.choice(list(COLOURS), 4, replace=False)
    things: list[Thing] = []
    for _ in range(8 * count):
        size = str(rng.choice(list(SIZES)))
        radius = float(rng.uniform(*SIZES[size]))
        x, y = rng.uniform(radius + 2, SIDE - radius - 2, 2).tolist()
        if any(np.hypot(x - t.x, y - t.y) < radius + t.radius + 4 for t in things):
            continue
        noun = str(rng.choice(DIGITS) if rng.random() < 0.4 else rng.choice(shapes))
        things.append(Thing(noun, str(rng.choice(colours)), size, x, y, radius))
        if len(things) == count:
            break
    return tuple(things)


def _paint(canvas: Pixels, thing: Thing, rng: np.random.Generator, split: str) -> None:
    """Paint a thing over what is there, with a dark rim that sets it off."""
    reach = int(np.ceil(thing.radius)) + 3
    left, top = round(thing.x) - reach, round(thing.y) - reach
    rows = slice(max(top, 0), min(top + 2 * reach + 1, SIDE))
    columns = slice(max(left, 0), min(left + 2 * reach + 1, SIDE))
    y, x = np.mgrid[rows, columns].astype(np.float32)
    x, y = x - np.float32(thing.x), y - np.float32(thing.y)
    if thing.is_digit:
        rim = 0.85 * _inside(thing.radius + 1.5 - np.hypot(x, y))
        cover = _glyph(x, y, thing, rng, split)
    else:
        depth = _depth(thing, x, y, rng.uniform(-0.25, 0.25))
        rim, cover = 0.6 * _inside(depth + 2.0), _inside(depth)
    ink = np.array(COLOURS[thing.colour]) + rng.normal(0, 8, 3)
    window = canvas[rows, columns]
    window += rim[..., None] * (_PLATE - window)
    window += cover[..., None] * (ink.astype(np.float32) - window)


def _inside(depth: Pixels) -> Pixels:
    """Coverage of a pixel by a region that it is ``depth`` pixels inside of."""
    return np.asarray(np.clip(depth + 0.5, 0.0, 1.0))


def _depth(thing: Thing, x: Pixels, y: Pixels, turn: float) -> Pixels:
    """How far a point is inside of a shape, in pixels; negative outside.

    Args:
        thing: Says which shape, and its radius.
        x: Pixels right of the shape's centre.
        y: Pixels below it, of the same shape.
        turn: By how much the shape is turned, in radians.
    """
    r = thing.radius
    x, y = x * np.cos(turn) + y * np.sin(turn), y * np.cos(turn) - x * np.sin(turn)
    far, wide, high = np.hypot(x, y), np.abs(x), np.abs(y)
    depth: Pixels
    match thing.noun:
        case "circle":
            depth = 0.95 * r - far
        case "ring":
            depth = 0.24 * r - np.abs(far - 0.74 * r)
        case "square":
            depth = 0.8 * r - np.maximum(wide, high)
        case "cross":
            upright = np.minimum(0.3 * r - wide, r - high)
            depth = np.maximum(upright, np.minimum(0.3 * r - high, r - wide))
        case "triangle":
            sides = 0.866 * wide - 0.5 * y
            depth = 0.55 * r - np.maximum(sides, y)
        case _:
            depth = _star(x, y, far, r)
    return np.asarray(depth, np.float32)


def _star(x: Pixels, y: Pixels, far: Pixels, r: float) -> Pixels:
    """Depth inside a star of five points: every tenth of it is one slanted edge."""
    fifth = 2 * np.pi / 5
    angle = np.abs((np.arctan2(x, -y) + fifth / 2) % fifth - fifth / 2)
    inner = 0.45 * r * np.exp(0.5j * fifth)
    edge = inner - r
    across = (far * np.cos(angle) - r) * edge.imag - far * np.sin(angle) * edge.real
    return np.asarray(-across / np.abs(edge))


def _glyph(
    x: Pixels, y: Pixels, thing: Thing, rng: np.random.Generator, split: str
) -> Pixels:
    """Ink of a scanned digit, read between its 8 x 8 values along both axes."""
    scans = _scans(split)[int(thing.noun)]
    scan = scans[rng.integers(len(scans))]
    step = np.float32(2.0 * thing.radius / 8)
    across, down = _between(x[0] / step + 3.5), _between(y[:, 0] / step + 3.5)
    return np.asarray(np.clip((down @ scan @ across.T) * 1.6 - 0.2, 0.0, 1.0))


def _between(at: Pixels) -> Pixels:
    """Weights [len(at), 8] that read a row of 8 values at places between them."""
    away = np.abs(at[:, None] - np.arange(8, dtype=np.float32))
    return np.asarray(np.clip(1 - away, 0.0, None))


@functools.cache
def _scans(split: str) -> list[Pixels]:
    """The split's scans of each digit, [n, 8, 8] in 0..1."""
    digits = optional("sklearn.datasets", "scikit-learn", _WHAT).load_digits()
    images, labels = digits.images[SPLITS[split]], digits.target[SPLITS[split]]
    return [(images[labels == d] / 16).astype(np.float32) for d in range(10)]


def _background(rng: np.random.Generator) -> Pixels:
    """A part of a photograph (two times in three) or a texture, made dull."""
    plain = rng.uniform(40, 200, 3).astype(np.float32)
    strength = np.float32(rng.uniform(0.25, 0.7))
    texture = _part_of_photograph(rng) if rng.random() < 0.67 else _texture(rng)
    return np.asarray(plain + strength * (texture - plain))


def _part_of_photograph(rng: np.random.Generator) -> Pixels:
    photographs = _photographs()
    photograph = photographs[rng.integers(len(photographs))]
    top = rng.integers(photograph.shape[0] - SIDE + 1)
    left = rng.integers(photograph.shape[1] - SIDE + 1)
    part = photograph[top : top + SIDE, left : left + SIDE]
    return np.asarray(part[:, :: rng.choice((-1, 1))], np.float32)


def _texture(rng: np.random.Generator) -> Pixels:
    """Stripes or blotches of two colours, [SIDE, SIDE, 3] in 0..255."""
    one, other = rng.uniform(0, 255, (2, 3)).astype(np.float32)
    y, x = np.mgrid[:SIDE, :SIDE].astype(np.float32)
    wave = np.zeros((SIDE, SIDE), np.float32)
    for _ in range(int(rng.integers(1, 4))):
        fx, fy, start = rng.uniform((-0.5, -0.5, 0), (0.5, 0.5, 6.28)).tolist()
        wave += np.sin(np.float32(fx) * x + np.float32(fy) * y + np.float32(start))
    share = (0.5 + 0.5 * wave).clip(0, 1)[..., None]
    return np.asarray(one + share * (other - one))


@functools.cache
def _photographs() -> list[NDArray[np.uint8]]:
    """Photographs that come with scikit-image and scikit-learn, [H, W, 3]."""
    data = optional("skimage.data", "scikit-image", _WHAT)
    datasets = optional("sklearn.datasets", "scikit-learn", _WHAT)
    images = [getattr(data, name)() for name in _PHOTOGRAPHS]
    images += datasets.load_sample_images().images
    coloured = [i if i.ndim == 3 else np.stack([i] * 3, axis=2) for i in images]
    halves = [image[::2, ::2] for image in coloured]
    return [
        i
        for pair in zip(coloured, halves, strict=True)
        for i in pair
        if min(i.shape[:2]) >= SIDE
    ]
