"""Two processes: each prunes whole samples of its own; shards of one are refused."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed
from torch.multiprocessing.spawn import spawn
from transformers import LlavaForConditionalGeneration

import vtprune_fx
from tests.tiny import batch, counted_positions, recipe_for, tiny_llava
from vtprune_fx import oracle
from vtprune_fx.errors import CaptureError

RECIPE = recipe_for(2, {0: 3, 1: 5})
PROMPTS = ((3, 6), (2, 9))
RANKS = 2

pytestmark = pytest.mark.slow


def in_two_processes(function: Callable[..., None], folder: Path) -> None:
    started: Any = spawn
    started(functools.partial(_with_peers, function), (folder,), nprocs=RANKS)


def _with_peers(function: Callable[..., None], rank: int, folder: Path) -> None:
    # As torchrun does, which transformers asks about its ranks.
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(RANKS),
    }
    met = f"file://{folder / 'met'}"
    distributed.init_process_group("gloo", init_method=met, rank=rank, world_size=RANKS)
    try:
        function(rank, folder)
    finally:
        distributed.destroy_process_group()


def test_ranks_with_samples_of_their_own_say_what_one_process_says(
    tmp_path: Path,
) -> None:
    model = tiny_llava(layers=2)
    inputs = batch(model, *PROMPTS)
    samples = oracle.split_batch(
        model, **inputs, position_ids=counted_positions(inputs)
    )
    expected = [oracle.generate(model, RECIPE, sample, 8) for sample in samples]
    in_two_processes(_generate_own, tmp_path)
    found = [torch.load(tmp_path / f"{rank}.pt").tolist() for rank in range(RANKS)]
    assert found == expected


def _generate_own(rank: int, folder: Path) -> None:
    model: Any = vtprune_fx.compile(tiny_llava(layers=2), RECIPE, inner="eager")
    inputs = batch(model, *PROMPTS)
    own = {name: value[rank : rank + 1] for name, value in inputs.items()}
    ids = model.generate(**own, max_new_tokens=8, do_sample=False, eos_token_id=None)
    torch.save(ids[0, inputs["input_ids"].shape[1] :], folder / f"{rank}.pt")


def test_shards_of_a_model_are_refused_with_what_to_do(tmp_path: Path) -> None:
    """What each process expects is in it; one that fails, fails this."""
    tiny_llava(layers=2).save_pretrained(tmp_path / "model")
    in_two_processes(_generate_from_shards, tmp_path)


def _generate_from_shards(_: int, folder: Path) -> None:
    model: Any = LlavaForConditionalGeneration.from_pretrained(
        folder / "model", tp_plan="auto"
    )
    vtprune_fx.compile(model, RECIPE, inner="eager")
    with pytest.raises(CaptureError, match="without tp_plan"):
        model.generate(**batch(model, (3, 6)), max_new_tokens=2)
