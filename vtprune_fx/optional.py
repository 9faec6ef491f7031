"""Packages that only some commands need."""

from __future__ import annotations

import importlib
from typing import Any

from vtprune_fx.errors import MissingDependencyError


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
