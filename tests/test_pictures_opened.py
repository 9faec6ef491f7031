"""Pictures: seen as they are shown, or refused with a reason."""

from __future__ import annotations

import io
import os
import struct
import zlib
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from PIL import Image

from vtprune_fx.errors import InputError
from vtprune_fx.models.pictures import MOST_PIXELS, as_rgb, open_image

if TYPE_CHECKING:
    from pathlib import Path

GREY = np.add.outer(np.arange(128), np.arange(128)).astype(np.uint16)
"""Levels from 0 to 254."""


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def levels(content: bytes) -> np.ndarray[Any, Any]:
    opened = open_image(content)
    assert opened.mode == "RGB"
    return np.asarray(opened)[..., 0].astype(int)


# ------------------------------------------------------------------------- the values


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_a_picture_in_16_bits_is_the_same_in_8(kind: str) -> None:
    content = saved(Image.fromarray(GREY * 257), kind)
    assert np.array_equal(levels(content), GREY)


def test_a_picture_in_big_endian_16_bits_is_the_same_in_8() -> None:
    image = Image.fromarray((GREY * 257).astype(">u2"))
    assert image.mode == "I;16B"
    assert np.array_equal(levels(saved(image, "TIFF")), GREY)


def test_16_bits_of_a_data_set_are_the_same_in_8() -> None:
    seen = np.asarray(as_rgb(Image.fromarray(GREY * 257)))
    assert np.array_equal(seen[..., 0], GREY)


@pytest.mark.parametrize(
    "values", [GREY.astype(np.float32), GREY.astype(np.int32) * 2**16]
)
def test_values_without_a_known_white_are_refused(values: Any) -> None:
    content = saved(Image.fromarray(values), "TIFF")
    with pytest.raises(InputError, match="of which none is known to be white"):
        open_image(content)


def test_values_in_12_bits_are_refused() -> None:
    """They come in 16, and would be dark."""
    content = saved(Image.fromarray(GREY * 257), "TIFF")
    tag = struct.pack("<HHI", 258, 3, 1)
    assert content.count(tag) == 1
    at = content.index(tag) + len(tag)
    twelve = content[:at] + struct.pack("<H", 12) + content[at + 2 :]
    with pytest.raises(InputError, match=r"image: expected"):
        open_image(twelve)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK"])
def test_other_modes_are_opened_as_transformers_does(mode: str) -> None:
    shown = Image.fromarray(GREY.astype(np.uint8)).convert("RGB").convert(mode)
    content = saved(shown, "TIFF")
    with Image.open(io.BytesIO(content)) as image:
        expected = np.asarray(image.convert("RGB"))
    assert np.array_equal(np.asarray(open_image(content)), expected)


# --------------------------------------------------------------------------- the size


def png(width: int, height: int, rows: bytes = b"") -> bytes:
    """A PNG that says to be this large, of few bytes."""

    def chunk(name: bytes, data: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(name + data))
        return struct.pack(">I", len(data)) + name + data + check

    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    body = zlib.compress(rows or bytes((width + 1) * height), 9)
    ends = chunk(b"IDAT", body) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + ends


@pytest.mark.parametrize("size", [(1, 20_000), (20_000, 1), (51, 1), (3_000, 50)])
def test_a_picture_that_is_much_longer_than_wide_is_refused(size: Any) -> None:
    with pytest.raises(InputError, match=rf"at most 50 times.* found {size[0]} x "):
        open_image(png(*size))


def test_a_panorama_is_opened() -> None:
    assert open_image(png(50, 1)).size == (50, 1)


@pytest.mark.parametrize("size", [(20_000, 20_000), (2**31 - 1, 2**31 - 1)])
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_picture_with_too_many_pixels_is_refused(size: Any) -> None:
    with pytest.raises(InputError, match=r"pixels"):
        open_image(png(size[0], size[1], b"few"))


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_what_is_allowed_is_less_than_what_is_refused() -> None:
    with pytest.raises(InputError, match=f"at most {MOST_PIXELS:,}"):
        open_image(png(10_001, 10_000, rows=b"few"))


# -------------------------------------------------------------------- where it comes of


@pytest.mark.parametrize("orientation", [3, 6, 8])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF"])
def test_every_photograph_stands_upright(kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x112] = orientation
    content = saved(Image.new("RGB", (40, 20)), kind, exif=exif)
    expected = (40, 20) if orientation == 3 else (20, 40)
    assert open_image(content).size == expected


def test_a_pipe_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", "/dev/zero"):
        with pytest.raises(InputError, match="found a pipe or device"):
            open_image(path)


@pytest.mark.parametrize("name", ["a" * 5000, "a\0b", ""])
def test_a_path_that_cannot_be_is_refused(name: str) -> None:
    with pytest.raises(InputError, match="image '"):
        open_image(name)


def test_a_format_whose_reader_runs_a_program_is_refused() -> None:
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n"
    with pytest.raises(InputError, match="not a readable image"):
        open_image(eps)
