"""Writing an exported folder all at once, and over nothing but an earlier export."""

from __future__ import annotations

import contextlib
import errno
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from vtprune_fx.errors import ExportError, InputError
from vtprune_fx.export import manifest
from vtprune_fx.export.target import find_target
from vtprune_fx.files import OLD, check_output, scratch_beside

if TYPE_CHECKING:
    from transformers import ProcessorMixin
    from transformers.exporters import ExportedModel


def check_free(folder: Path, inputs: Iterable[Path] = ()) -> None:
    """Check that an export may be written to ``folder``.

    Args:
        folder: Where it shall go.
        inputs: What it is made of, which it must not lie in.

    Raises:
        InputError: It is no folder, holds anything that an earlier export did not
            write, cannot be replaced, or nothing can be written there.
    """
    check_output(folder, "folder", inputs=inputs)
    if not folder.exists():
        return
    found = _foreign(folder)
    if found is not None:
        raise InputError(
            f"output folder {folder}",
            expected="a new or empty folder, or an earlier export",
            found=found,
            fix="Choose another folder. Nothing was changed.",
        )


def _foreign(folder: Path) -> str | None:
    """What in ``folder`` is not ours, if anything."""
    entries = {path.name for path in folder.iterdir()}
    if not entries:
        return None
    if not manifest.is_export(folder):
        return sorted(entries)[0]
    try:
        ours = {manifest.FILE, *manifest.read(folder).files}
    except ExportError:
        return f"a {manifest.FILE} that cannot be read"
    return next(iter(sorted(entries - ours)), None)


def write_export(
    folder: Path, exported: ExportedModel, processor: ProcessorMixin, **fields: object
) -> None:
    """Write graphs, processor and manifest, and replace ``folder`` at the end.

    Args:
        folder: New, empty, or an earlier export.
        exported: The graphs, with the model's configurations.
        processor: The model's processor.
        fields: Fields of the manifest without ``files``; ``target`` is registered.

    Raises:
        InputError: ``folder`` holds something else.
        ExportError: No target of this name is registered.
    """
    find_target(str(fields.get("target")), f"export {folder}")
    with written_at_once(folder) as scratch:
        exported.save_pretrained(scratch)
        processor.save_pretrained(scratch)
        contents = manifest.Manifest.model_validate(
            fields | {"files": manifest.hashes(scratch)}
        )
        contents.write(scratch)


@contextlib.contextmanager
def written_at_once(folder: Path) -> Iterator[Path]:
    """A scratch folder that takes the place of ``folder`` when all went well.

    Raises:
        InputError: ``folder`` holds something else, cannot be replaced, or its disk is
            full.
    """
    check_free(folder)
    with scratch_beside(folder) as scratch, _naming_full_disks(folder):
        yield scratch
        check_free(folder)
        scratch.chmod(0o755)
        _take_place(scratch, folder)


_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)


@contextlib.contextmanager
def _naming_full_disks(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL:
            raise
        raise InputError(
            f"output folder {folder}",
            expected="a disk with space for the export",
            found=str(error.strerror),
            fix="Choose another disk. What was there before still is.",
        ) from error


def _take_place(scratch: Path, folder: Path) -> None:
    """Rename ``scratch`` to ``folder``; the old folder goes only if that worked."""
    retired = scratch.with_name(f"{scratch.name}{OLD}")
    if folder.exists():
        folder.rename(retired)
    try:
        scratch.rename(folder)
    except OSError:
        if retired.exists():
            retired.rename(folder)
        raise
    shutil.rmtree(retired, ignore_errors=True)
