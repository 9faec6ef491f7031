"""What all tests share."""

from __future__ import annotations

import logging
import sys
from typing import TYPE_CHECKING

import pytest
import torch

if TYPE_CHECKING:
    from collections.abc import Iterator


# pytest's log capture makes torch think that somebody reads its structured trace, for
# which it prints every graph.
logging.getLogger("torch.__trace").disabled = True


@pytest.fixture(autouse=True)
def _forget_compiled_graphs() -> Iterator[None]:
    """Let no test run on graphs, or under guards, that an earlier one left behind."""
    yield
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
