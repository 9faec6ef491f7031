"""Try a folder's chat templates and tokenizer in a process with limits.

Both are small programs by others: a template has loops, a tokenizer has patterns.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from vtprune_fx.errors import InputError
from vtprune_fx.files import read_whole
from vtprune_fx.models import processor_trial_child
from vtprune_fx.models.fields import read_fields

SECONDS = 20
"""Time at most, the process's start included."""


def try_processor(folder: Path) -> None:
    """Refuse a folder whose templates or tokenizer take too much time or memory.

    Args:
        folder: A checkpoint or an export.

    Raises:
        InputError: They do.
        OSError: A file cannot be read.
        ValueError: A file is no JSON.
    """
    saved = folder / "tokenizer.json"
    tokenizer = read_whole(saved).decode() if saved.is_file() else None
    found = _tried(tuple(_templates(folder)), tokenizer)
    if found is not None:
        raise InputError(
            f"model {str(folder)!r}, chat template and tokenizer",
            expected=f"a question as tokens in {SECONDS} s, with "
            f"{processor_trial_child.MEMORY >> 30} GB of memory",
            found=found,
            fix="Save the processor of the model's author there with "
            "save_pretrained(), or delete the folder: it may be made to do harm.",
        )


@functools.lru_cache(maxsize=4)
def _tried(templates: tuple[str, ...], tokenizer: str | None) -> str | None:
    """What goes wrong when a process of its limits renders and encodes a question."""
    given = json.dumps({"templates": templates, "tokenizer": tokenizer})
    try:
        done = subprocess.run(
            [sys.executable, "-I", processor_trial_child.__file__],
            input=given.encode(),
            capture_output=True,
            timeout=SECONDS,
            check=False,
            env=os.environ | {"TOKENIZERS_PARALLELISM": "false"},
        )
    except subprocess.TimeoutExpired:
        return f"no end after {SECONDS} s"
    if done.returncode == processor_trial_child.BROKEN:
        return "a tokenizer that breaks its library"
    if done.returncode == processor_trial_child.TOO_MUCH or done.returncode < 0:
        return "more memory needed"
    return None


def _templates(folder: Path) -> Iterator[str]:
    """The texts of all chat templates in a folder."""
    for path in sorted(folder.glob("*.jinja")):
        yield read_whole(path).decode()
    for path in sorted(folder.glob("*.json")):
        if path.name in _WITH_TEMPLATES:
            fields = read_fields(path)
            saved = fields.get("chat_template") if isinstance(fields, dict) else None
            yield from _texts(saved)


_WITH_TEMPLATES = {
    *("chat_template.json", "tokenizer_config.json", "processor_config.json"),
}


def _texts(saved: object) -> Iterator[str]:
    """One template, or several, by name or as ``[{"name": ..., "template": ...}]``."""
    if isinstance(saved, str):
        yield saved
    elif isinstance(saved, dict):
        for part in saved.values():
            yield from _texts(part)
    elif isinstance(saved, list):
        for part in saved:
            yield from _texts(part)
