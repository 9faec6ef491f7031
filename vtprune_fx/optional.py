"""Packages that only some commands need."""

from __future__ import annotations

import importlib
from typing import Any

from vtprune_fx.errors import MissingDependencyError


def optional(module: str, package: str, what: str) -> Any:
    """Import a module of the ``demo`` extra.

    Args:
        module: Its full name.
        package: What pip calls the package that holds it.
        what: What needs it, for the error.

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
            fix='Run `pip install "vtprune-fx[demo]"`.',
        ) from error
