"""Writing files: what is there is complete, or what was there before."""

from __future__ import annotations

import uuid
from contextlib import suppress
from pathlib import Path

from vtprune_fx.errors import InputError


def replace_file(file: Path, content: bytes) -> None:
    """Write a file beside its place, then move it there.

    Raises:
        InputError: It cannot be written.
    """
    scratch = file.with_name(f".{file.name}.{uuid.uuid4().hex}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        scratch.write_bytes(content)
        scratch.replace(file)
    except OSError as error:
        raise InputError(
            f"file {str(file)!r}",
            expected="a file that can be written",
            found=error.strerror or str(error),
            fix="Name a file in a folder that can be written to.",
        ) from error
    finally:
        with suppress(OSError):
            scratch.unlink(missing_ok=True)
