"""Render chat templates and load a tokenizer: a script that ``processor_trial`` runs.

Reads ``{"templates": [...], "tokenizer": ...}`` from standard input. Exits with
``TOO_MUCH`` or ``BROKEN``, or with 0: that a template or the tokenizer is wrong in an
ordinary way is said by what reads it later. Who runs it limits the time.

It imports nothing of vtprune_fx, and no torch: it takes less than a second.
"""

from __future__ import annotations

import contextlib
import json
import resource
import sys
from collections.abc import Iterator
from typing import Any

from tokenizers import Tokenizer
from transformers.utils.chat_template_utils import render_jinja_template

TOO_MUCH = 3
"""Exit status where memory does not suffice."""

BROKEN = 4
"""Exit status where the tokenizer makes its library panic, which nothing catches."""

MEMORY = 2 << 30
"""Bytes of address space at most."""

TURN = {
    "role": "user",
    "content": [{"type": "image"}, {"type": "text", "text": "What is on the picture?"}],
}


def main() -> int:
    """Try all that standard input names."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    given = json.load(sys.stdin)
    texts = [str(TURN)]
    try:
        for template in given["templates"]:
            with _ordinary_errors_ignored():
                texts.append(_rendered(template))
        with _ordinary_errors_ignored():
            _encode(texts, given["tokenizer"])
    except MemoryError:
        return TOO_MUCH
    except BaseException:
        return BROKEN
    return 0


@contextlib.contextmanager
def _ordinary_errors_ignored() -> Iterator[None]:
    """Only a lack of memory, and a panic, get out of the block."""
    try:
        yield
    except MemoryError:
        raise
    except Exception:
        return


def _rendered(template: str) -> str:
    texts: Any = render_jinja_template(
        [[TURN]], chat_template=template, add_generation_prompt=True
    )
    return str(texts[0][0])


def _encode(texts: list[str], saved: str | None) -> None:
    if saved is None:
        return
    tokenizer = Tokenizer.from_str(saved)
    for text in texts:
        tokenizer.encode(text)


if __name__ == "__main__":
    sys.exit(main())
