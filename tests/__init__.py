"""Tests. They run from the root of the repository."""
