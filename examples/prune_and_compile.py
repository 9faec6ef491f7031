"""Prune a LLaVA in torch.compile and let it answer a question about a photograph.

    python examples/prune_and_compile.py

Builds a small LLaVA with random weights in a temporary folder: the answer means
nothing, the tokens that leave at each layer are real. Needs `vtprune-fx[demo]`.
"""

from __future__ import annotations

import logging
import sys
import tempfile
from pathlib import Path

from vtprune_fx.answer import continued
from vtprune_fx.checkpoint import CheckpointSpec, build_checkpoint
from vtprune_fx.generation import pruned
from vtprune_fx.inputs import open_checkpoint, prompt_inputs
from vtprune_fx.picture import sample_photo
from vtprune_fx.recipe import default


def main(inner: str = "inductor") -> str:
    """Answer once; returns the answer."""
    logging.basicConfig(level=logging.INFO)  # the backend logs what it cut
    spec = CheckpointSpec(image_size=112, layers=4, hidden=64, heads=4)
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = build_checkpoint(Path(folder) / "llava", spec)
        model, processor = open_checkpoint(checkpoint)
    inputs = prompt_inputs(processor, "What is on the table?", sample_photo())
    recipe = default(layers=spec.layers, visual_tokens=spec.visual_tokens)
    with pruned(model, recipe, inner) as compiled:
        ids = continued(compiled, inputs, max_new_tokens=8)
    return str(processor.decode(ids, skip_special_tokens=True))


if __name__ == "__main__":
    print(main(*sys.argv[1:]))
