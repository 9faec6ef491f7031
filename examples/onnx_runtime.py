"""Export a pruned model, and let ONNX Runtime answer a question about a picture.

    python examples/onnx_runtime.py reference-onnx

The model is the reference model that ships with the package. A minute or two, nearly
all of it in the export. Needs `vtprune-fx[onnxruntime,demo]`.
"""

from __future__ import annotations

import sys
from pathlib import Path

from vtprune_fx.export import load, write_onnx
from vtprune_fx.models import continued, load_processor, open_checkpoint, prompt_inputs
from vtprune_fx.recipes import load_recipe
from vtprune_fx.reference import CHECKPOINT, reference_task


def main(name: str) -> str:
    """Export to a folder and answer once; returns question and answer."""
    folder, recipe = Path(name), load_recipe("fitprune-reference-55")
    write_onnx(*open_checkpoint(CHECKPOINT), recipe, folder)
    model, processor = load(folder), load_processor(folder)
    task = reference_task(seed=0)
    inputs = prompt_inputs(processor, task.prompt, task.image)
    ids = continued(model, inputs, max_new_tokens=12)
    answer = str(processor.decode(ids, skip_special_tokens=True)).strip()
    return f"{task.prompt} {answer}"


if __name__ == "__main__":
    print(main(*sys.argv[1:]))
