"""Prune a LLaVA in torch.compile and let it answer a question about a picture.

    python examples/prune_and_compile.py

The model is the reference model that ships with the package: small, and trained on
pictures of shapes and digits. Needs `vtprune-fx[demo]`, which draws such a picture.
"""

from __future__ import annotations

import logging
import sys

from vtprune_fx.generation.compile import pruned
from vtprune_fx.models import continued, open_checkpoint, prompt_inputs
from vtprune_fx.recipes import load_recipe
from vtprune_fx.reference import CHECKPOINT, reference_task


def main(inner: str = "inductor") -> str:
    """Answer once; returns question and answer."""
    logging.basicConfig(level=logging.INFO)  # the backend logs what it cut
    model, processor = open_checkpoint(CHECKPOINT)
    task = reference_task(seed=0)
    inputs = prompt_inputs(processor, task.prompt, task.image)
    with pruned(model, load_recipe("fitprune-reference-55"), inner) as compiled:
        ids = continued(compiled, inputs, max_new_tokens=12)
    answer = str(processor.decode(ids, skip_special_tokens=True)).strip()
    return f"{task.prompt} {answer}"


if __name__ == "__main__":
    print(main(*sys.argv[1:]))
