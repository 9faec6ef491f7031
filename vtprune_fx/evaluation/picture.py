"""Pictures of what a recipe keeps: a photograph, and the patches left after a layer."""

from __future__ import annotations

import io
import math
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from vtprune_fx.errors import InputError
from vtprune_fx.files import MARK, replace_file
from vtprune_fx.optional import optional

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping
    from pathlib import Path

    from transformers import ProcessorMixin

FADED = (238, 238, 238)
"""The light grey that dropped patches fade to."""

FADE = 0.86
"""How far they fade: 0 changes nothing, 1 makes it plain grey."""

PER_ROW = 4
"""Most panels side by side. More of them make more rows."""

CAPTIONS = (
    "what the model sees: {total} tokens",
    "after layer {layer}: {kept} of {total} tokens",
)
"""Captions of the photograph and of each layer's picture."""

_BACKGROUND, _INK, _SOFT_INK = (255, 255, 255), (34, 34, 34), (110, 110, 110)
_MARGIN, _GAP = 24, 20
_TITLE_SIZE, _CAPTION_SIZE, _CAPTION_HEIGHT = 22, 16, 26
_SMALLEST_PANEL = 280  # narrower pictures are enlarged by an integer factor
_CHANNELS = 3


def draw_kept(
    image: Image.Image,
    kept_by_layer: Mapping[int, Collection[int]],
    grid: tuple[int, int],
    path: Path,
    *,
    title: str = "",
    captions: tuple[str, str] = CAPTIONS,
) -> Path:
    """Draw the photograph, and beside it what is left of it after some layers.

    Args:
        image: What the model sees, as ``as_seen`` returns it.
        kept_by_layer: For each layer to show, in this order, the visual tokens that are
            left after it: indices of patches, row by row from the top left.
        grid: Rows and columns of patches.
        path: The PNG file to write.
        title: A line above everything; none if empty.
        captions: What stands above the photograph and above each layer's picture;
            ``{total}``, ``{layer}`` and ``{kept}`` are filled in.

    Returns:
        ``path``.

    Raises:
        InputError: A patch is outside the grid, or the file cannot be written.
    """
    total = grid[0] * grid[1]
    scale = max(1, math.ceil(_SMALLEST_PANEL / image.width))
    panels = [(captions[0].format(total=total), image.convert("RGB"))]
    for layer, kept in kept_by_layer.items():
        text = captions[1].format(layer=layer, kept=len(set(kept)), total=total)
        panels.append((text, fade_dropped(image, kept, grid)))
    replace_file(path, png_of(_arrange(panels, title, scale)))
    return path


def png_of(image: Image.Image) -> bytes:
    """A PNG file that says that vtprune wrote it."""
    file, said = io.BytesIO(), PngInfo()
    said.add_text("Software", MARK.decode())
    image.save(file, format="PNG", pnginfo=said)
    return file.getvalue()


def fade_dropped(
    image: Image.Image, kept: Collection[int], grid: tuple[int, int]
) -> Image.Image:
    """The image with all patches but the ``kept`` ones faded to light grey.

    Args:
        image: The image, of any size.
        kept: Indices of the patches that do not fade, row by row.
        grid: Rows and columns of patches.
    """
    rows, columns = grid
    outside = sorted(patch for patch in kept if not 0 <= patch < rows * columns)
    if outside:
        raise InputError(
            "kept visual tokens",
            expected=f"patches 0 to {rows * columns - 1} of a {rows} x {columns} grid",
            found=str(outside[0]),
            fix="Number each image's tokens from 0, row by row.",
        )
    original = image.convert("RGB")
    result = Image.blend(original, Image.new("RGB", image.size, FADED), FADE)
    for patch in kept:
        box = _box(patch, grid, image.size)
        result.paste(original.crop(box), box)
    return result


def as_seen(image: Image.Image, processor: ProcessorMixin) -> Image.Image:
    """The part of the image that the model sees, in the size in which it sees it."""
    prepare: Any = processor.image_processor
    pixels = prepare(images=image, return_tensors="pt")["pixel_values"][0]
    return unnormalise(pixels, processor)


def unnormalise(pixel_values: torch.Tensor, processor: ProcessorMixin) -> Image.Image:
    """The image of which a processor made pixel values.

    Args:
        pixel_values: What the processor made of an image, [3, height, width].
        processor: The processor that made it: its mean, deviation and scale are undone.
    """
    channels, *sides = pixel_values.shape
    if channels != _CHANNELS or len(sides) != len(("height", "width")):
        raise InputError(
            "pixel_values",
            expected="one image, [3, height, width]",
            found=str(list(pixel_values.shape)),
            fix="Pass one image of the batch; tiled images cannot be drawn.",
        )
    settings: Any = processor.image_processor
    pixels = pixel_values.detach().to("cpu", torch.float32)
    if settings.do_normalize:
        mean, std = torch.tensor(settings.image_mean), torch.tensor(settings.image_std)
        pixels = pixels * std[:, None, None] + mean[:, None, None]
    if settings.do_rescale:
        pixels = pixels / settings.rescale_factor
    levels = pixels.round().clamp(0, 255).to(torch.uint8)
    return Image.fromarray(levels.permute(1, 2, 0).contiguous().numpy())


def sample_photo() -> Image.Image:
    """A photograph that needs no download: a cup of coffee, 600 x 400, CC0.

    Raises:
        MissingDependencyError: scikit-image, whose wheel holds it, is not installed.
    """
    data = optional("skimage.data", "scikit-image", "the sample photograph")
    return Image.fromarray(data.coffee()).convert("RGB")


def _box(
    patch: int, grid: tuple[int, int], size: tuple[int, int]
) -> tuple[int, int, int, int]:
    """Left, top, right and bottom pixel of a patch."""
    (rows, columns), (width, height) = grid, size
    row, column = divmod(patch, columns)
    return (
        column * width // columns,
        row * height // rows,
        (column + 1) * width // columns,
        (row + 1) * height // rows,
    )


def _arrange(
    panels: list[tuple[str, Image.Image]], title: str, scale: int
) -> Image.Image:
    """All panels in rows, each below its caption, the title above them."""
    width, height = (side * scale for side in panels[0][1].size)
    large, small = (ImageFont.load_default(s) for s in (_TITLE_SIZE, _CAPTION_SIZE))
    across, down = min(len(panels), PER_ROW), math.ceil(len(panels) / PER_ROW)
    widest = max(width, *(math.ceil(small.getlength(text)) for text, _ in panels))
    step_x, step_y = widest + _GAP, height + _GAP + _CAPTION_HEIGHT
    top = _MARGIN + (2 * _TITLE_SIZE if title else 0)
    inner = max(across * step_x - _GAP, math.ceil(large.getlength(title)))
    size = (2 * _MARGIN + inner, top + down * step_y - _GAP + _MARGIN)
    canvas = Image.new("RGB", size, _BACKGROUND)
    draw = ImageDraw.Draw(canvas)
    if title:
        draw.text((_MARGIN, _MARGIN), title, _INK, large)
    for place, (text, panel) in enumerate(panels):
        x, y = _MARGIN + place % PER_ROW * step_x, top + place // PER_ROW * step_y
        ink = _SOFT_INK if place == 0 else _INK
        draw.text((x, y), text, ink, small)
        enlarged = panel.resize((width, height), Image.Resampling.NEAREST)
        canvas.paste(enlarged, (x, y + _CAPTION_HEIGHT))
    return canvas
