"""The ``forward`` that exported graphs have, the same whatever release traced them.

A graph's inputs are named after the arguments of the ``forward`` that was traced, its
outputs after the fields of what that returned. Both differ from one release of
transformers to the next. So what is traced takes its cache as ``past_key_values`` and
returns a dictionary of ``logits`` and ``past_key_values`` alone.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from transformers import PreTrainedModel

from vtprune_fx.models.arguments import PAST, cache_argument, cache_of


@contextlib.contextmanager
def graph_forward(model: PreTrainedModel) -> Iterator[None]:
    """Let a model take and return what an exported graph does, for a while.

    transformers' exporters replace ``forward`` in the same way, and take hold of the
    names inside of module hooks, so a hook would be too late.
    """
    original = model.forward
    was_set = "forward" in vars(model)
    name = cache_argument(original) or PAST

    def forward(**inputs: object) -> dict[str, object]:
        if PAST in inputs:
            inputs[name] = inputs.pop(PAST)
        outputs = original(**inputs)
        return {"logits": outputs.logits, PAST: cache_of(outputs)}

    model.forward = forward
    try:
        yield
    finally:
        if was_set:
            model.forward = original
        else:
            del model.forward
