"""Check an installation: pruned answers against the oracle's, in a few minutes.

    python examples/check_installation.py           # torch.compile with inductor
    python examples/check_installation.py eager     # the same without a compiler

The reference model answers a padded batch and prompts with two images, with growing and
static caches, in torch.compile, and the padded batch on ONNX Runtime. Prints a line for
each, and `same` at the end if every token is the oracle's. Needs
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
from vtprune_fx.models.loading import open_checkpoint
from vtprune_fx.recipes import Recipe, load_recipe
from vtprune_fx.reference import CHECKPOINT
from vtprune_fx.reference.questions import Sample, draw_samples

NEW = 8
PADDED, TWO_IMAGES = "8 padded prompts", "2 prompts of two images"
GREEDY = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None}

Inputs = dict[str, Tensor]
Answers = list[list[int]]


def main(inner: str = "inductor") -> bool:
    """Run all checks; returns whether every answer is the oracle's."""
    model, processor = open_checkpoint(CHECKPOINT)
    recipe = load_recipe("fitprune-reference-55")
    batches = {
        name: inputs_of(processor, samples) for name, samples in prompts().items()
    }
    expected = {
        name: by_oracle(model, recipe, inputs) for name, inputs in batches.items()
    }
    same = True

    def check(name: str, answer: Callable[[Inputs], Answers], *asked: str) -> None:
        nonlocal same
        for batch in asked or batches:
            agrees = answer(batches[batch]) == expected[batch]
            same = same and agrees
            print(f"{name}, {batch}: {'same' if agrees else 'OTHER TOKENS'}")

    with pruned(model, recipe, inner) as compiled:
        check("torch.compile", lambda inputs: by_generate(compiled, inputs))
        static = {"cache_implementation": "static"}
        check(
            "torch.compile, static cache",
            lambda inputs: by_generate(compiled, inputs, **static),
        )
    with tempfile.TemporaryDirectory() as scratch:
        write_onnx(model, processor, recipe, Path(scratch) / "onnx")
        exported = load(Path(scratch) / "onnx")
        # The recipe takes shares, so an export is for one number of images.
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
    """What the oracle answers to each prompt by itself."""
    positions = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    samples = oracle.split_batch(model, **inputs, position_ids=positions)
    return [oracle.generate(model, recipe, sample, NEW) for sample in samples]


def by_generate(model: Any, inputs: Inputs, **options: Any) -> Answers:
    """What ``generate`` answers to all of them at once."""
    ids = model.generate(**inputs, **GREEDY, **options)
    answers: Answers = ids[:, inputs["input_ids"].shape[1] :].tolist()
    return answers


if __name__ == "__main__":
    sys.exit(not main(*sys.argv[1:]))
