"""The oracle: a slow, plain eager pruner that every pruned graph is checked against."""

from vtprune_fx.oracle.pruner import Prefill, generate, prefill, step
from vtprune_fx.oracle.sample import Sample, split_batch

__all__ = ["Prefill", "Sample", "generate", "prefill", "split_batch", "step"]
