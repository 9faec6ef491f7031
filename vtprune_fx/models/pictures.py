"""Opening pictures: one way for every command, server and data set."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from vtprune_fx.errors import InputError
from vtprune_fx.files import read_whole

FORMATS = (
    *("PNG", "JPEG", "MPO", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000"),
)
"""Formats that are opened. Others have readers that run programs, such as EPS."""

MOST_PIXELS = 100_000_000
"""Pixels of the largest picture that is opened."""

MOST_LONGER = 50
"""How many times as long as the other side a side may be.

Processors enlarge a picture until its shorter side fits, however long the other gets.
"""

_IN_16_BITS = ("PNG", "PPM", "TIFF")
"""Formats whose one-channel pictures in more than 8 bits are known to use all 16."""


def open_image(source: str | Path | bytes) -> Image.Image:
    """Open a picture as RGB in 8 bits, upright as its EXIF data says.

    Args:
        source: A file, or its content.

    Raises:
        InputError: It is missing, is no picture, is too large or too long, or has
            values without a stated black and white.
    """
    where = "image" if isinstance(source, bytes) else f"image {str(source)!r}"
    content = source if isinstance(source, bytes) else _read(source, where)
    try:
        with Image.open(io.BytesIO(content), formats=_known()) as image:
            _check_size(image, where)
            image.load()
            return as_rgb(image, where)
    except InputError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise _refused(where, f"more than {MOST_PIXELS:,} pixels", _SMALLER) from error
    except Exception as error:  # whatever a decoder says of what is no picture
        found = "a file that is not a readable image"
        raise _refused(
            where, found, "Name a file that an image viewer opens."
        ) from error


def as_rgb(image: Image.Image, where: str = "image") -> Image.Image:
    """An opened picture as RGB in 8 bits, upright as its EXIF data says.

    Args:
        image: As PIL opened it.
        where: What an error says first.

    Raises:
        InputError: As for ``open_image``.
    """
    _check_size(image, where)
    upright = ImageOps.exif_transpose(image)
    if upright.mode.startswith("I") or upright.mode == "F":
        upright = _in_8_bits(upright, _bits(image), where)
    return upright.convert("RGB")


def _read(path: str | Path, where: str) -> bytes:
    try:
        return read_whole(path)
    except (OSError, ValueError) as error:
        found = getattr(error, "strerror", None) or "a path that cannot be"
        if isinstance(error, FileNotFoundError):
            found = "no such file"
        raise _refused(
            where, found, "Name a file that an image viewer opens."
        ) from error


def _known() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


_SMALLER = "Make it smaller."


def _check_size(image: Image.Image, where: str) -> None:
    width, height = image.size
    found = f"{width} x {height} pixels"
    if width * height > MOST_PIXELS:
        raise _refused(where, found, _SMALLER, f"at most {MOST_PIXELS:,} pixels")
    if max(width, height) > MOST_LONGER * min(width, height):
        expected = f"sides of which one is at most {MOST_LONGER} times the other"
        raise _refused(where, found, "Cut out what matters.", expected)


def _bits(image: Image.Image) -> int | None:
    """Bits of a value of a picture with one channel of more than 8; None if unknown."""
    if image.format not in _IN_16_BITS:
        return 16 if image.format is None and image.mode.startswith("I;16") else None
    if image.format != "TIFF":
        return 16
    tags = getattr(image, "tag_v2", {})
    signed = tags.get(339, (1,))[0] != 1
    bits = tags.get(258, (0,))[0]
    return 16 if bits == 16 and not signed else None


def _in_8_bits(image: Image.Image, bits: int | None, where: str) -> Image.Image:
    if image.mode == "F" or bits != 16:
        raise _refused(
            where,
            f"values of type {image.mode}, of which none is known to be white",
            "Save it with 8 or 16 bits a channel.",
            "values in 8 or 16 bits",
        )
    levels = np.asarray(image).astype(np.float64) / 257
    eight = np.round(levels).clip(0, 255).astype(np.uint8)
    return Image.fromarray(eight)


def _refused(
    where: str,
    found: str,
    fix: str,
    expected: str = "an image file (PNG, JPEG, WebP, ...)",
) -> InputError:
    return InputError(where, expected=expected, found=found, fix=fix)
