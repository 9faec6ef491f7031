"""The ``vtprune`` command."""

from vtprune_fx.cli.entry import app, main

__all__ = ["app", "main"]
