"""Several processes that share the samples of one job, started by ``torchrun``."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

from torch import Tensor, distributed


@contextlib.contextmanager
def joined() -> Iterator[None]:
    """Join the ``torchrun`` process group, if there is one."""
    alone = int(os.environ.get("WORLD_SIZE", "1")) == 1
    if alone or distributed.is_initialized():
        yield
        return
    distributed.init_process_group("gloo")
    try:
        yield
    finally:
        distributed.destroy_process_group()


def rank() -> int:
    """Which process this is, from 0."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def count() -> int:
    """How many processes there are."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def wait_for_all() -> None:
    """Wait until all processes have reached this call."""
    if distributed.is_initialized():
        distributed.barrier()


def sum_of_all(value: Tensor) -> Tensor:
    """The sum over processes, in all of them. The tensor is on the CPU."""
    if distributed.is_initialized():
        distributed.all_reduce(value)
    return value
