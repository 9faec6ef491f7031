"""Why a pattern was not found in a graph."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class NoMatch:
    """A failed match: what stands in the graph in place of the pattern.

    Attributes:
        reason: What was found.
        node: Name of the node at which the match failed, None where there is none.
        expected: What should have been there.
    """

    reason: str
    node: str | None
    expected: str

    def __str__(self) -> str:
        at = f" (node {self.node})" if self.node else ""
        return f"{self.reason}{at} instead of {self.expected}"
