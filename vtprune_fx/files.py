"""Files that are read and written with care.

Read: regular files of a bounded size, and JSON of a bounded depth that means one thing.
Written: what is there is complete, or what was there before; nothing is overwritten
that vtprune did not write.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import shutil
import stat
import tempfile
import uuid
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from vtprune_fx.errors import InputError

try:
    import fcntl
except ImportError:  # Windows, where scratch folders of killed runs stay
    fcntl = None  # type: ignore[assignment]

MOST_BYTES = 256 * 2**20
"""Size of the largest file that is read into memory as a whole."""

MOST_NESTED = 64
"""Lists and objects in each other in a JSON file."""

MOST_DIGITS = 40
"""Digits of a number in a JSON file. Tokenizers write 10^30 for "no limit"."""

MARK = b"written by vtprune"
"""In the results and pictures that vtprune writes, by which it knows them again."""

Kind = Literal["file", "folder", "folder to fill"]
"""An output: a file, a folder that is replaced, or one that files are added to."""


# ----------------------------------------------------------------------------- reading


def read_whole(path: str | Path, most: int = MOST_BYTES) -> bytes:
    """The content of a regular file; never waits for a pipe or device.

    Args:
        path: The file. A link is followed.
        most: Bytes at most.

    Raises:
        OSError: It cannot be read, is no regular file, or is larger.
        ValueError: The path holds a character that no path holds.
    """
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    descriptor = os.open(os.fspath(path), flags)
    try:
        mode = os.fstat(descriptor).st_mode
        if not stat.S_ISREG(mode):
            found = "a folder" if stat.S_ISDIR(mode) else "a pipe or device, no file"
            raise OSError(errno.EINVAL, found)
        with open(descriptor, "rb", closefd=False) as file:
            content = file.read(most + 1)
    finally:
        os.close(descriptor)
    if len(content) > most:
        raise OSError(errno.EFBIG, f"more than {most:,} bytes")
    return content


def parse_json(content: str | bytes) -> Any:
    """What a JSON text says, if it says one thing and is not built to do harm.

    Args:
        content: Text, or UTF-8.

    Raises:
        ValueError: It is no JSON, names a field twice, is nested more than
            ``MOST_NESTED`` deep, or holds half a character or a number that is not
            finite or longer than ``MOST_DIGITS``.
    """
    text = content if isinstance(content, str) else content.decode("utf-8")
    try:
        found = json.loads(
            text,
            object_pairs_hook=_once,
            parse_int=_number,
            parse_float=_finite,
            parse_constant=_finite,
        )
        _check_depth(found)
    except RecursionError:
        raise _too_deep() from None
    if "\\u" in text:
        _check_characters(found)
    return found


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the field {twice!r} twice")
    return fields


def _number(digits: str) -> int:
    if len(digits) > MOST_DIGITS:
        raise ValueError(f"a number of {len(digits)} digits")
    return int(digits)


def _finite(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise ValueError(f"the number {digits[:MOST_DIGITS]}")
    return number


def _check_depth(found: object) -> None:
    level = [found]
    for _ in range(MOST_NESTED):
        level = [
            item
            for value in level
            if isinstance(value, dict | list)
            for item in (value.values() if isinstance(value, dict) else value)
            if isinstance(item, dict | list)
        ]
        if not level:
            return
    raise _too_deep()


def _too_deep() -> ValueError:
    return ValueError(f"JSON nested more than {MOST_NESTED} deep")


def _check_characters(found: object) -> None:
    try:
        json.dumps(found, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise ValueError("half a character (a lone surrogate)") from error


# ---------------------------------------------------------------- where output may go


def check_output(
    path: Path, kind: Kind, *, inputs: Iterable[Path] = (), mark: bytes | None = None
) -> None:
    """Check that an output can be written, before any work that it is the result of.

    Args:
        path: Where it shall go. Parents that do not exist can be made.
        kind: What it is.
        inputs: Files and folders that are read, which it must not replace or lie in.
        mark: What a file holds in its first 64 KiB that vtprune wrote; other files
            that are not empty are not replaced.

    Raises:
        InputError: Something is in the way, or nothing can be written there.
    """
    found = _in_the_way(path, kind, mark) or _input(path, inputs) or _unwritable(path)
    if found:
        expected = {
            "file": "a new file, or one that vtprune wrote",
            "folder": "a new folder, or one that can be replaced",
            "folder to fill": "a folder that files can be added to",
        }
        raise InputError(
            f"output {kind.partition(' ')[0]} {str(path)!r}",
            expected=expected[kind],
            found=found,
            fix="Choose another path. Nothing was changed.",
        )


def _in_the_way(path: Path, kind: Kind, mark: bytes | None) -> str | None:
    try:
        mode = os.stat(path, follow_symlinks=kind == "folder to fill").st_mode
    except FileNotFoundError:
        return "a link to nothing" if path.is_symlink() else None
    except (OSError, ValueError) as error:
        return _reason(error)
    there = _what_is(mode)
    wanted = "a file" if kind == "file" else "a folder"
    if there != wanted:
        return there
    if kind == "folder":
        return _irreplaceable(path)
    return _of_others(path, mark) if kind == "file" and mark is not None else None


def _what_is(mode: int) -> str:
    kinds = (
        (stat.S_ISLNK, "a link"),
        (stat.S_ISREG, "a file"),
        (stat.S_ISDIR, "a folder"),
    )
    return next((name for is_one, name in kinds if is_one(mode)), "a pipe or device")


def _of_others(path: Path, mark: bytes) -> str | None:
    try:
        with path.open("rb") as file:
            head = file.read(2**16)
    except OSError as error:
        return _reason(error)
    return (
        "a file that this command did not write" if head and mark not in head else None
    )


def _irreplaceable(path: Path) -> str | None:
    """Why another folder cannot take a folder's place."""
    place = path.resolve()
    if Path.cwd().resolve().is_relative_to(place):
        return "the current folder, or one around it"
    return "a mount point" if os.path.ismount(place) else None


def _input(path: Path, inputs: Iterable[Path]) -> str | None:
    place = path.resolve()
    for given in inputs:
        if given.exists() and place.is_relative_to(given.resolve()):
            return f"a part of the input {str(given)!r}"
    return None


def _unwritable(path: Path) -> str | None:
    """What keeps files from being written to a path, or to the folder it will be in."""
    around = path if path.is_dir() else path.parent
    while not os.path.lexists(around):
        around = around.parent
    if not around.is_dir():
        return f"no folder but {_what(around)} at {str(around)!r}"
    try:
        # Without a name where the system can, so that nothing stays of it.
        with tempfile.TemporaryFile(dir=around) as file:
            file.write(bytes(4096))
    except OSError as error:
        return f"a folder that takes no files ({_reason(error)}) at {str(around)!r}"
    return None


def _what(path: Path) -> str:
    return "a link to nothing" if path.is_symlink() else "a file"


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)


# ----------------------------------------------------------------------------- writing


def replace_file(file: Path, content: bytes) -> None:
    """Write a file beside its place, then move it there.

    Raises:
        InputError: It cannot be written.
    """
    scratch = file.with_name(f"{_prefix(file)}{uuid.uuid4().hex}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        remove_abandoned(file)
        with scratch.open("xb") as opened:
            _try_lock(opened.fileno())
            opened.write(content)
            opened.flush()
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


@contextlib.contextmanager
def scratch_beside(path: Path) -> Iterator[Path]:
    """A scratch folder beside a path, which is removed at the end if it is still there.

    What runs that were killed left there for the same path is removed first.

    Raises:
        InputError: It cannot be made.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_abandoned(path)
        scratch = Path(tempfile.mkdtemp(dir=path.parent, prefix=_prefix(path)))
        lock = os.open(scratch, os.O_RDONLY)
    except OSError as error:
        raise InputError(
            f"folder {str(path.parent)!r}",
            expected="a folder that can be written to",
            found=error.strerror or str(error),
            fix="Choose another path.",
        ) from error
    try:
        _try_lock(lock)
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        os.close(lock)


OLD = "-old"
"""End of the name of what a scratch folder is about to replace."""


def remove_abandoned(path: Path) -> None:
    """Remove what killed runs left beside a path; what they had set aside comes back.

    A run that lives holds a lock on its scratch folder, which the system takes back
    from one that ended.
    """
    if fcntl is None:
        return
    left = [p for p in path.parent.iterdir() if p.name.startswith(_prefix(path))]
    used = {p.name for p in left if not p.name.endswith(OLD) and _is_locked(p)}
    for entry in left:
        if entry.name.removesuffix(OLD) in used:
            continue
        if entry.name.endswith(OLD) and not os.path.lexists(path):
            entry.rename(path)
        elif entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry, ignore_errors=True)
        else:
            entry.unlink(missing_ok=True)


def _prefix(path: Path) -> str:
    """Begins the names of scratch files for a path: short, as its name may be long."""
    return f".vtprune-{hashlib.sha256(os.fsencode(path.name)).hexdigest()[:12]}-"


def _try_lock(descriptor: int) -> bool:
    """Lock an open file or folder for this process, unless another has it."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a disk without locks
        return True
    return True


def _is_locked(path: Path) -> bool:
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return True  # gone, or not ours
    try:
        return not _try_lock(descriptor)
    finally:
        os.close(descriptor)
