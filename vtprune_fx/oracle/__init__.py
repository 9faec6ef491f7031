"""The oracle: a slow, plain eager pruner that every pruned graph is checked against."""

from vtprune_fx.oracle.pruner import (
    Prefill,
    Sample,
    generate,
    prefill,
    split_batch,
    step,
)

__all__ = ["Prefill", "Sample", "generate", "prefill", "split_batch", "step"]
