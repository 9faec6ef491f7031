"""Which releases of torch and transformers the suite passed with.

The bounds are those that pyproject.toml gives the dependencies, read from the metadata
of the installed package.
"""

from __future__ import annotations

import warnings
from importlib import metadata

from packaging.requirements import Requirement
from packaging.version import InvalidVersion, Version

CHECKED = ("torch", "transformers")
"""The dependencies that a new release of may change results."""


class UntestedVersionWarning(UserWarning):
    """A release of torch or transformers is installed that the suite never ran with."""


def warn_if_untested() -> None:
    """Warn of installed releases outside of the bounds, at the importer's line."""
    bounds = _bounds()
    found = [
        f"{bound.name} {installed}"
        for bound in bounds
        if (installed := _installed(bound.name)) and not _within(installed, bound)
    ]
    if found:
        tested = " and ".join(f"{bound.name} {bound.specifier}" for bound in bounds)
        message = (
            f"vtprune_fx is tested with {tested}; found {' and '.join(found)}. "
            "Results may be wrong: install a release within these bounds, or check "
            "yours with `vtprune verify`."
        )
        warnings.warn(message, UntestedVersionWarning, stacklevel=3)


def _bounds() -> list[Requirement]:
    """The two requirements; none for a source tree that is not installed."""
    try:
        stated = metadata.requires("vtprune-fx") or []
    except metadata.PackageNotFoundError:
        return []
    return [need for need in map(Requirement, stated) if need.name in CHECKED]


def _installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _within(installed: str, bound: Requirement) -> bool:
    """A pre-release counts where its number lies; what is no version is outside."""
    try:
        return bound.specifier.contains(Version(installed), prereleases=True)
    except InvalidVersion:
        return False
