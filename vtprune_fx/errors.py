"""Every error that vtprune_fx raises on purpose.

A message says where, what was expected, what was found, and what to do next, in that
order. ``VtpruneError`` is the base class, so callers can catch the lot; the command
line prints the message alone and exits with status 1.
"""

from __future__ import annotations

import re
import textwrap

__all__ = [
    "AnatomyError",
    "CaptureError",
    "ExportError",
    "InputError",
    "MissingDependencyError",
    "PlanError",
    "RecipeError",
    "VerifyError",
    "VtpruneError",
]


class VtpruneError(Exception):
    """Base class of all errors in this module.

    Args:
        where: The file, layer, node or argument that is wrong.
        expected: What should have been there.
        found: What was there instead.
        fix: What the reader can do about it.
    """

    def __init__(self, where: str, *, expected: str, found: str, fix: str) -> None:
        self.where, self.expected, self.found, self.fix = where, expected, found, fix
        super().__init__(f"{where}: expected {expected}, found {found}. {fix}")


class RecipeError(VtpruneError):
    """A recipe cannot be read, has a wrong field, or names an unknown method."""


class CaptureError(VtpruneError):
    """A model or a graph cannot be brought into the form that passes read."""


class AnatomyError(VtpruneError):
    """A graph lacks something that pruning needs: visual tokens, layers, attention."""


class PlanError(VtpruneError):
    """A recipe cannot be placed on a graph: a missing layer, too many tokens."""


class VerifyError(VtpruneError):
    """A pass wrote a graph that is wrong. Always a defect of the pass."""


class ExportError(VtpruneError):
    """A model cannot be exported, or an export cannot be loaded or run."""


class InputError(VtpruneError):
    """A file, folder, image or prompt that was handed in is not usable."""


class MissingDependencyError(VtpruneError):
    """An optional package is missing or does not load. The message has the remedy."""


def first_sentence(error: BaseException) -> str:
    """What a library's error says first, in one line and without a full stop.

    Libraries wrap a sentence over several lines. A blank or an indented line ends it,
    except after a colon.
    """
    first, *others = str(error).strip().splitlines() or [type(error).__name__]
    for line in others:
        ended = first.endswith((".", "!", "?")) or not line.strip() or line[0].isspace()
        if ended and not first.endswith(":"):
            break
        first = f"{first} {line.strip()}".strip()
    sentence = re.split(r"(?<=[.!?])\s+(?=[A-Z])", first)[0]
    return textwrap.shorten(sentence.rstrip(".:"), 300)
