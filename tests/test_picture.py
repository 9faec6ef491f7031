"""Pictures of kept patches, and images recovered from pixel values."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import pytest
import torch
from PIL import Image

from vtprune_fx.errors import InputError, MissingDependencyError
from vtprune_fx.evaluation.picture import (
    as_seen,
    draw_kept,
    fade_dropped,
    sample_photo,
    unnormalise,
)
from vtprune_fx.models.loading import load_processor
from vtprune_fx.reference.random_llava import CheckpointSpec, build_checkpoint

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import ProcessorMixin

GRID = (4, 4)
SPEC = CheckpointSpec(
    image_size=56, layers=1, hidden=8, heads=2, intermediate=8, vision_hidden=16
)


@pytest.fixture(scope="module")
def processor(tmp_path_factory: pytest.TempPathFactory) -> ProcessorMixin:
    folder = tmp_path_factory.mktemp("built") / "tiny"
    return load_processor(build_checkpoint(folder, SPEC))


def _levels(image: Image.Image) -> torch.Tensor:
    """The image's levels, [height, width, 3]."""
    data = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return data.view(image.height, image.width, 3).int()


def _photo(width: int = 56, height: int = 56, top: int = 200) -> Image.Image:
    generator = torch.Generator().manual_seed(0)
    levels = torch.randint(
        top, (height, width, 3), generator=generator, dtype=torch.uint8
    )
    return Image.fromarray(levels.numpy())


def _patches(image: Image.Image) -> torch.Tensor:
    """The patches in row-major order, [16, 14, 14, 3]."""
    levels = _levels(image).view(4, 14, 4, 14, 3)
    return levels.transpose(1, 2).reshape(16, 14, 14, 3)


def test_kept_patches_are_unchanged_and_dropped_ones_lighter() -> None:
    photo, kept = _photo(), {0, 5, 6, 15}
    before, after = _patches(photo), _patches(fade_dropped(photo, kept, GRID))
    for patch in range(16):
        if patch in kept:
            assert torch.equal(after[patch], before[patch])
        else:
            assert (after[patch] > before[patch]).all()


def test_patches_of_an_uneven_grid() -> None:
    photo = _photo(60, 30)
    after, before = _levels(fade_dropped(photo, [4], (2, 3))), _levels(photo)
    same = (after == before).all(-1)
    assert same[15:, 20:40].all()
    assert same.sum() == 15 * 20


@pytest.mark.parametrize("patch", [-1, 16])
def test_patch_outside_the_grid(patch: int) -> None:
    with pytest.raises(InputError, match=f"patches 0 to 15 .* found {patch}"):
        fade_dropped(_photo(), [0, patch], GRID)


def test_picture_holds_the_photo_and_each_layer(tmp_path: Path) -> None:
    path, photo = tmp_path / "new" / "kept.png", _photo(336, 336)
    kept = {8: range(10), 2: range(14)}
    assert draw_kept(photo, kept, GRID, path, title="A title") == path
    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    with Image.open(path) as picture:
        width, height = picture.size
        levels = _levels(picture.convert("RGB"))
    assert 3 * 336 < width < 3 * 336 + 150
    assert 336 < height < 336 + 150
    panels = [photo, *(fade_dropped(photo, k, GRID) for k in kept.values())]
    top = height - 24 - 336
    for place, panel in enumerate(panels):
        left = 24 + place * (336 + 20)
        shown = levels[top : top + 336, left : left + 336]
        assert torch.equal(shown, _levels(panel))
    assert list(path.parent.iterdir()) == [path]


def test_small_images_are_enlarged_and_many_layers_make_rows(tmp_path: Path) -> None:
    sizes = []
    for layers in (1, 3, 4):
        kept: dict[int, list[int]] = {layer: [] for layer in range(layers)}
        draw_kept(_photo(), kept, GRID, tmp_path / "p.png")
        with Image.open(tmp_path / "p.png") as picture:
            sizes.append(picture.size)
    (two, one_row), (four, same), (four_again, two_rows) = sizes
    assert 2 * 280 <= two < four == four_again
    assert one_row == same < two_rows


def test_long_captions_and_titles_fit(tmp_path: Path) -> None:
    def width(title: str, captions: tuple[str, str]) -> int:
        path = tmp_path / "p.png"
        draw_kept(_photo(), {0: [1]}, GRID, path, title=title, captions=captions)
        with Image.open(path) as picture:
            return picture.width

    usual = width("", ("", "{layer} {kept} {total}"))
    assert width("t" * 200, ("", "")) > usual
    assert width("", ("", "c" * 100)) > usual


def test_picture_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InputError, match="a file that can be written"):
        draw_kept(_photo(), {}, GRID, tmp_path / "file" / "p.png")
    with pytest.raises(InputError, match="a file that can be written"):
        draw_kept(_photo(), {}, GRID, tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_unnormalise_is_exact(processor: ProcessorMixin) -> None:
    photo = _photo(top=256)
    prepare: Any = processor.image_processor
    pixels = prepare(images=photo, return_tensors="pt")
    image = unnormalise(pixels["pixel_values"][0], processor)
    assert torch.equal(_levels(image), _levels(photo))


def test_as_seen_is_the_square_in_the_middle(processor: ProcessorMixin) -> None:
    wide = Image.new("RGB", (112, 56), "red")
    wide.paste(_photo(), (28, 0))
    assert torch.equal(_levels(as_seen(wide, processor)), _levels(_photo()))


@pytest.mark.parametrize("shape", [(1, 3, 56, 56), (4, 56, 56), (3, 56)])
def test_unnormalise_wants_one_image(
    processor: ProcessorMixin, shape: tuple[int, ...]
) -> None:
    with pytest.raises(InputError, match=r"one image, \[3, height, width\]"):
        unnormalise(torch.zeros(shape), processor)


def test_sample_photo() -> None:
    pytest.importorskip("skimage")
    photo = sample_photo()
    assert (photo.mode, photo.size) == ("RGB", (600, 400))


def test_sample_photo_without_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "skimage.data", None)
    with pytest.raises(MissingDependencyError, match=r'"vtprune-fx\[demo\]"'):
        sample_photo()
