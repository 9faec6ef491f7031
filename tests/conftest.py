"""What all tests share."""

from __future__ import annotations

import logging
import sys
from typing import TYPE_CHECKING

import pytest
import torch

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


# pytest's log capture makes torch think that somebody reads its structured trace, for
# which it prints every graph.
logging.getLogger("torch.__trace").disabled = True


@pytest.fixture(autouse=True)
def _forget_compiled_graphs(request: pytest.FixtureRequest) -> Iterator[None]:
    """Let no test run on graphs, or under guards, that an earlier one left behind.

    But for those that say that they share them.
    """
    yield
    shares = request.node.get_closest_marker("shares_graphs") is not None
    if "torch._dynamo" in sys.modules and not shares:
        torch._dynamo.reset()


@pytest.fixture(scope="session")
def onnx_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny export with two cuts, made once; its checkpoint stands beside it."""
    from tests.tiny import recipe_for
    from vtprune_fx.export import write_onnx
    from vtprune_fx.models.loading import open_checkpoint
    from vtprune_fx.reference.random_llava import CheckpointSpec, build_checkpoint

    root = tmp_path_factory.mktemp("export")
    spec = CheckpointSpec(
        image_size=56, layers=3, hidden=32, heads=4, intermediate=48, vision_layers=2
    )
    parts = open_checkpoint(build_checkpoint(root / "checkpoint", spec))
    write_onnx(*parts, recipe_for(3, {0: 5, 1: 3}), root / "onnx")
    return root / "onnx"
