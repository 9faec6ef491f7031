"""Rate visual tokens by your score, and let the pruned model answer.

    python examples/write_scorer.py

A visual token that is unlike the mean visual token of its layer has something to say.
The model is the reference model that ships with the package. Needs `vtprune-fx[demo]`.
"""

from __future__ import annotations

import sys

from torch import Tensor
from torch.nn.functional import cosine_similarity

import vtprune_fx
from vtprune_fx.generation.compile import pruned
from vtprune_fx.models import continued, open_checkpoint, prompt_inputs
from vtprune_fx.recipes import load_recipe
from vtprune_fx.reference import CHECKPOINT, reference_task
from vtprune_fx.scorers import VISUAL, Evidence


def unlike_the_mean(seen: Evidence) -> Tensor:
    """[B, S]: one minus the cosine to the sample's mean visual token."""
    assert seen.hidden is not None, "the reference model shows its residual stream"
    visual = (seen.roles == VISUAL).unsqueeze(2).to(seen.hidden.dtype)
    mean = (seen.hidden * visual).sum(1, keepdim=True) / visual.sum(1, keepdim=True)
    return 1 - cosine_similarity(seen.hidden, mean, dim=2)


def main(inner: str = "inductor") -> str:
    """Answer once; returns question and answer."""
    vtprune_fx.register_scorer("unlike-the-mean", unlike_the_mean, rows=0)
    recipe = load_recipe("fitprune-reference-30").model_copy(
        update={"name": "mine", "method": "custom", "score": "unlike-the-mean"}
    )
    model, processor = open_checkpoint(CHECKPOINT)
    task = reference_task(seed=0)
    inputs = prompt_inputs(processor, task.prompt, task.image)
    with pruned(model, recipe, inner) as compiled:
        ids = continued(compiled, inputs, max_new_tokens=12)
    answer = str(processor.decode(ids, skip_special_tokens=True)).strip()
    return f"{task.prompt} {answer}"


if __name__ == "__main__":
    print(main(*sys.argv[1:]))
