"""Build TensorRT engines of a pruned model, on a machine that needs no GPU.

    python examples/build_engine.py engines         # for any GPU since Ampere
    python examples/build_engine.py engines 8.9     # for one compute capability

The model is a small LLaVA with random weights; for yours: `vtprune export tensorrt`.
The folder is moved to a machine with such a GPU, and runs there without the model:
`vtprune generate engines --image FILE --prompt TEXT`. Needs `vtprune-fx[tensorrt-rtx]`.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from vtprune_fx.export import EngineSizes, Span, write_tensorrt
from vtprune_fx.models import open_checkpoint
from vtprune_fx.reference import CheckpointSpec, build_checkpoint

# Smallest, most usual, largest: an engine takes what lies between.
SIZES = EngineSizes(batch=Span(1, 1, 4), prompt=Span(24, 48, 96), new_tokens=32)


def main(folder: str, capability: str | None = None) -> str:
    """Build into a folder; returns what was built and what it takes."""
    spec = CheckpointSpec(image_size=56, layers=2, hidden=32, heads=4)
    with tempfile.TemporaryDirectory() as scratch:
        parts = open_checkpoint(build_checkpoint(Path(scratch) / "model", spec))
        # No recipe: the default, stretched to the depth of the model.
        return str(write_tensorrt(*parts, None, Path(folder), SIZES, capability))


if __name__ == "__main__":
    print(main(*sys.argv[1:]))
