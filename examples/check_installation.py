"""Check an installation in a few minutes, on a small model that ships with vtprune_fx.

    python examples/check_installation.py           # torch.compile with inductor
    python examples/check_installation.py eager     # the same without a compiler

The model answers questions about pictures, pruned, in torch.compile and on ONNX
Runtime. Its answers are compared, token by token, with those of the oracle: a slow
second implementation of pruning in plain PyTorch. Prints a line for each comparison and
`same` at the end if all agree; else the exit status is 1. Needs
`vtprune-fx[onnxruntime,demo]`.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from vtprune_fx import oracle
from vtprune_fx.evaluation.evaluate import inputs_of
from vtprune_fx.export import load, write_onnx
from vtprune_fx.generation.compile import pruned
from vtprune_fx.models.encoding import counted_positions
from vtprune_fx.models.loading import open_checkpoint
from vtprune_fx.recipes import Recipe, load_recipe
from vtprune_fx.reference import CHECKPOINT
from vtprune_fx.reference.questions import Sample, draw_samples

NEW_TOKENS = 8
PADDED, TWO_IMAGES = "8 padded prompts", "2 prompts of two images"
GREEDY = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "eos_token_id": None}

Inputs = dict[str, Tensor]
"""A processor's output for a batch of prompts."""

Answers = list[list[int]]
"""New token ids of each prompt."""


def main(backend: str = "inductor") -> bool:
    """Run all checks; return whether every answer is the oracle's.

    Args:
        backend: Compiles the pruned graphs in ``torch.compile``.
    """
    model, processor = open_checkpoint(CHECKPOINT)
    recipe = load_recipe("fitprune-reference-55")
    batches = {
        name: inputs_of(processor, samples) for name, samples in prompts().items()
    }
    expected = {
        name: by_oracle(model, recipe, inputs) for name, inputs in batches.items()
    }
    same = True

    def check(runtime: str, answer: Callable[[Inputs], Answers], *names: str) -> None:
        """Compare answers to some batches, by default to all, with the oracle's."""
        nonlocal same
        for name in names or batches:
            agrees = answer(batches[name]) == expected[name]
            same = same and agrees
            print(f"{runtime}, {name}: {'same' if agrees else 'DIFFERENT TOKENS'}")

    with pruned(model, recipe, backend) as compiled:
        check("torch.compile", lambda inputs: by_generate(compiled, inputs))
        static = {"cache_implementation": "static"}
        check(
            "torch.compile, static cache",
            lambda inputs: by_generate(compiled, inputs, **static),
        )
    with tempfile.TemporaryDirectory() as scratch:
        write_onnx(model, processor, recipe, Path(scratch) / "onnx")
        exported = load(Path(scratch) / "onnx")
        # This recipe drops shares of the visual tokens, so an export is for prompts
        # with one number of images.
        check("ONNX Runtime", lambda inputs: by_generate(exported, inputs), PADDED)
    print("same" if same else "not the same")
    return same


def prompts() -> dict[str, list[Sample]]:
    """Eight questions about a picture, and two about two pictures."""
    samples = list(draw_samples("test", 7, 100))
    one = [sample for sample in samples if len(sample.pictures) == 1]
    two = [sample for sample in samples if len(sample.pictures) == 2]
    return {PADDED: one[:8], TWO_IMAGES: two[:2]}


def by_oracle(model: Any, recipe: Recipe, inputs: Inputs) -> Answers:
    """The oracle's answers; it runs one prompt at a time."""
    positions = counted_positions(inputs["attention_mask"])
    samples = oracle.split_batch(model, **inputs, position_ids=positions)
    return [oracle.generate(model, recipe, sample, NEW_TOKENS) for sample in samples]


def by_generate(model: Any, inputs: Inputs, **options: Any) -> Answers:
    """A model's answers, by ``generate``, to all prompts in one batch."""
    ids = model.generate(**inputs, **GREEDY, **options)
    answers: Answers = ids[:, inputs["input_ids"].shape[1] :].tolist()
    return answers


if __name__ == "__main__":
    sys.exit(not main(*sys.argv[1:]))
