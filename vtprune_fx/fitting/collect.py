"""Take statistics batch by batch, so that an interrupted run can be resumed.

Each batch's statistics are a separate file until all are there. Of several processes
each takes every n-th batch; all use the same folder.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from transformers import PreTrainedModel

from vtprune_fx.fitting import distributed
from vtprune_fx.fitting.attention_statistics import (
    Statistics,
    load_statistics,
    merged,
    save_statistics,
)
from vtprune_fx.fitting.calibration import Calibration

STATISTICS, PARTS = "statistics.safetensors", "statistics.parts"
"""In a folder: the statistics, and those of single batches while they are taken."""

_PROBED = 64
"""Values of each weight that enter a model's fingerprint."""


def origin(model: PreTrainedModel, calibration: Calibration) -> dict[str, str]:
    """Fingerprints of a model and its calibration prompts."""
    return {"model": model_fingerprint(model), "data": calibration.fingerprint()}


def model_fingerprint(model: PreTrainedModel) -> str:
    """A hash of a few values of each of a model's weights."""
    content = hashlib.sha256()
    for name, weight in model.state_dict().items():
        content.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
        values = weight.detach().flatten()
        probed = values[:: max(1, len(values) // _PROBED)]
        content.update(probed.to("cpu", torch.float32).numpy().tobytes())
    return content.hexdigest()[:16]


def collect(
    take: Callable[[Sequence[int]], Statistics],
    calibration: Calibration,
    folder: Path,
    source: Mapping[str, str],
    advance: Callable[[int], None],
) -> Statistics:
    """Take a model's statistics, or read those that are in a folder.

    Args:
        take: Takes those of some samples.
        calibration: The prompts.
        folder: Where statistics are, go, or were begun.
        source: The result of ``origin``.
        advance: Called with the number of samples that are done.

    Raises:
        InputError: What is there is broken, or of another model or data, or ``take``
            did.
    """
    file = folder / STATISTICS
    if not file.exists():
        _take(take, calibration, folder / PARTS, source, advance)
        distributed.wait_for_all()
        if distributed.rank() == 0:
            _finish(calibration, folder, source)
        distributed.wait_for_all()
    advance(len(calibration))
    return load_statistics(file, source)


def _take(
    take: Callable[[Sequence[int]], Statistics],
    calibration: Calibration,
    parts: Path,
    source: Mapping[str, str],
    advance: Callable[[int], None],
) -> None:
    done = 0
    for samples in batches_here(calibration):
        part, its = _part(parts, samples, source)
        if part.exists():
            load_statistics(part, its)
        else:
            save_statistics(take(samples), part, its)
        done += len(samples)
        advance(done)


def batches_here(calibration: Calibration) -> list[list[int]]:
    """The batches of this process."""
    return calibration.batches()[distributed.rank() :: distributed.count()]


def _part(
    parts: Path, samples: Sequence[int], source: Mapping[str, str]
) -> tuple[Path, dict[str, str]]:
    """A batch's file, and what its statistics are taken from."""
    part = {"samples": " ".join(map(str, samples))}
    return parts / f"{samples[0]:08}.safetensors", {**source, **part}


def _finish(calibration: Calibration, folder: Path, source: Mapping[str, str]) -> None:
    batches = calibration.batches()
    parts = [load_statistics(*_part(folder / PARTS, s, source)) for s in batches]
    order = torch.tensor([index for samples in batches for index in samples])
    save_statistics(merged(parts).rows(order.argsort()), folder / STATISTICS, source)
    shutil.rmtree(folder / PARTS)
