"""Packages that only some commands, or some models' processors, need."""

from __future__ import annotations

import importlib
from typing import Any

from vtprune_fx.errors import MissingDependencyError, first_sentence

_INSTALL = 'Run `pip install "vtprune-fx[families]"`.'
_OF_FAMILIES = {
    "torchvision": f"{_INSTALL} Beside a CPU build of torch install torchvision's CPU "
    "build, from PyTorch's CPU index.",
    "num2words": _INSTALL,
}
"""The packages of the extra ``families``, and how to install each."""


def optional(module: str, package: str, what: str, extra: str = "demo") -> Any:
    """Import a module of an extra.

    Args:
        module: Its full name.
        package: What pip calls the package that holds it.
        what: What needs it, for the error.
        extra: The extra that holds the package.

    Raises:
        MissingDependencyError: The package is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingDependencyError(
            what,
            expected=f"the package {package}",
            found="it is not installed",
            fix=f'Run `pip install "vtprune-fx[{extra}]"`.',
        ) from error


def lacking(
    error: BaseException, where: str, needs: str
) -> MissingDependencyError | None:
    """The error to raise for one that a package of ``families`` caused.

    Args:
        error: What transformers raised.
        where: What was being opened.
        needs: The part of it that needs the package.

    Returns:
        An error that names the package; None where ``error`` is about something else.
    """
    causes = _causes(error)
    for package, fix in _OF_FAMILIES.items():
        named = [cause for cause in causes if package in str(cause).lower()]
        if named and not _loads(package):
            return MissingDependencyError(
                where,
                expected=f"the package {package} for {needs}",
                found=f"{type(named[-1]).__name__}: {first_sentence(named[-1])}",
                fix=fix,
            )
    return None


def _causes(error: BaseException | None) -> list[BaseException]:
    """An error and those that led to it; the one that was raised first is last."""
    found: list[BaseException] = []
    while error is not None and error not in found:
        found.append(error)
        error = error.__cause__ or error.__context__
    return found


def _loads(package: str) -> bool:
    try:
        importlib.import_module(package)
    except Exception:  # not only ImportError: operators of another torch's build
        return False
    return True
