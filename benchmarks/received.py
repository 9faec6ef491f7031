"""What the scores of a cut cost, beside fused attention and a dense layer.

    python -m benchmarks.received [--rounds 9] [--threads N] [--json FILE]

A layer's queries and keys, random, of 35 tokens of text, an image of 576 visual tokens
and 40 tokens of text, rated as FitPrune rates: maxima over heads, visual and text rows
apart. On a GPU the layer is LLaVA-1.5-7B's in bfloat16, batch 1 and 8, and the operator
runs in Triton; on a CPU it is one 1,024 wide in float32, and the operator runs in
blocks of rows. ``spelled out`` writes all probabilities down. Ways to compute run in
turn; a time is the median of the rounds.

Operations and bytes are counted in advance, from sizes alone.
"""

from __future__ import annotations

import argparse
import datetime as dt
import functools
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import (
    LlamaDecoderLayer,
    LlamaRotaryEmbedding,
)

from benchmarks.presets import TEXT_AFTER, TEXT_BEFORE, config_of
from vtprune_fx.ops import attention, received
from vtprune_fx.recipes.counting import LLAVA_1_5_7B, Geometry

VISUAL = 576
TOKENS = TEXT_BEFORE + VISUAL + TEXT_AFTER


class Setting(NamedTuple):
    """What is timed.

    Attributes:
        geometry: Of the decoder.
        dtype: Of queries and keys.
        batches: Numbers of samples.
        rows: Rows of a block of the operator's.
        columns: Its columns, or 1 where a block ends with what its rows attend to.
        products: How often products are made where log-sum-exps are not known.
        calls: Of one way to compute, timed as one.
    """

    geometry: Geometry
    dtype: torch.dtype
    batches: tuple[int, ...]
    rows: int
    columns: int
    products: int
    calls: int


CPU_MID = Geometry.from_config(config_of("cpu-mid"))

SETTINGS = {
    "cuda": Setting(LLAVA_1_5_7B, torch.bfloat16, (1, 8), 64, 64, 2, 20),
    "cpu": Setting(CPU_MID, torch.float32, (1,), 32, 1, 1, 1),
}

Ways = dict[str, Callable[[], object]]


def main() -> None:
    """Count, time, print, write JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, help="of the CPU")
    parser.add_argument("--json", type=Path, help="file for all numbers")
    arguments = parser.parse_args()
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    counted = {name: counts(setting) for name, setting in SETTINGS.items()}
    console = Console(width=100)
    console.print(counts_table(counted))
    setting = SETTINGS[device]
    result: dict[str, Any] = {
        "date": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        "command": ["python", "-m", "benchmarks.received", *sys.argv[1:]],
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "tokens": TOKENS,
        "counted": counted,
        "seconds": {},
    }
    for batch in setting.batches:
        seconds = timed(ways(setting, device, batch), setting.calls, arguments.rounds)
        result["seconds"][batch] = seconds
        console.print(times_table(seconds, setting, batch, counted[device]))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


# --------------------------------------------------------------------- from sizes alone


def counts(setting: Setting) -> dict[str, float]:
    """Multiply-adds and bytes of one sample's scores at one cut, with known lse.

    Without, Triton's first kernel makes as many products again.
    """
    geometry, blocks = setting.geometry, pairs(setting.rows, setting.columns)
    macs = sum(rows * columns for rows, columns in blocks)
    macs *= geometry.heads * geometry.head_dim
    number = setting.dtype.itemsize
    width = geometry.head_dim * number
    once = TOKENS * ((geometry.heads + geometry.kv_heads) * width + geometry.heads * 4)
    by_blocks = sum(rows + columns for rows, columns in blocks)
    dense = geometry.macs_before_cut(TOKENS) + geometry.macs_after_cut(TOKENS)
    return {
        "macs": macs,
        "of a dense layer": macs / dense,
        "of a dense prefill": macs / dense / geometry.layers,
        "bytes of queries, keys, lse": once,
        "bytes that blocks read": by_blocks * geometry.heads * width,
    }


def pairs(rows: int, columns: int) -> list[tuple[int, int]]:
    """Sizes of the blocks that hold a row with a weight and a column it attends to.

    Rows have weights from the image on. Blocks of fixed columns stand on a grid, and
    count in full where they reach past the end.
    """
    if columns == 1:
        starts = range(TEXT_BEFORE, TOKENS, rows)
        ends = (min(start + rows, TOKENS) for start in starts)
        return [(end - start, end) for start, end in zip(starts, ends, strict=True)]
    starts = range(TEXT_BEFORE // rows * rows, TOKENS, rows)
    return [
        (rows, columns)
        for start in starts
        for _ in range(0, min(start + rows, TOKENS), columns)
    ]


def counts_table(counted: dict[str, dict[str, float]]) -> Table:
    """Both settings side by side."""
    shown = Table(title="Scores of one cut, one sample, from sizes alone")
    shown.add_column("")
    for device in counted:
        layer = "LLaVA-1.5-7B, Triton" if device == "cuda" else "1,024 wide, CPU"
        shown.add_column(layer, justify="right")
    first, second = counted.values()
    for name, value in first.items():
        of = name.startswith("of")
        cells = (f"{v:.3%}" if of else f"{v:.4g}" for v in (value, second[name]))
        shown.add_row(name, *cells)
    return shown


# ------------------------------------------------------------------------------ timed


def ways(setting: Setting, device: str, batch: int) -> Ways:
    """What is timed, by name."""
    geometry = setting.geometry
    torch.manual_seed(0)
    normal = functools.partial(torch.randn, device=device, dtype=setting.dtype)
    query = normal(batch, geometry.heads, TOKENS, geometry.head_dim)
    key = normal(batch, geometry.kv_heads, TOKENS, geometry.head_dim)
    value, scale = torch.randn_like(key), geometry.head_dim**-0.5
    weights = torch.zeros(batch, 2, TOKENS, device=device)
    weights[:, 0, TEXT_BEFORE : TEXT_BEFORE + VISUAL] = 1
    weights[:, 1, TEXT_BEFORE + VISUAL :] = 1
    mask = torch.ones(batch, 1, TOKENS, TOKENS, dtype=torch.bool, device=device).tril()
    logits = attention.logits(query.float(), key.float(), None, scale)
    fused = functional.scaled_dot_product_attention
    score = functools.partial(received.received, query, key)
    rest = scale, True
    lse = logits.logsumexp(dim=3)
    return {
        "scores": lambda: score(None, weights, None, *rest),
        "scores, lse known": lambda: score(None, weights, lse, *rest),
        "scores, mask": lambda: score(mask, weights, None, *rest),
        "scores, mask, lse known": lambda: score(mask, weights, lse, *rest),
        "spelled out": lambda: received.spelled_out(
            query, key, None, weights, None, *rest
        ),
        "fused attention": lambda: fused(
            query, key, value, is_causal=True, enable_gqa=True
        ),
        "dense layer": dense_layer(setting, device, batch),
    }


def dense_layer(setting: Setting, device: str, batch: int) -> Callable[[], Tensor]:
    """A decoder layer on a prompt."""
    geometry = setting.geometry
    config = LlamaConfig(
        hidden_size=geometry.hidden,
        intermediate_size=geometry.intermediate,
        num_attention_heads=geometry.heads,
        num_key_value_heads=geometry.kv_heads,
    )
    config._attn_implementation = "sdpa"
    layer = LlamaDecoderLayer(config, 0).to(device, setting.dtype)
    hidden = torch.randn(
        batch, TOKENS, geometry.hidden, device=device, dtype=setting.dtype
    )
    places = torch.arange(TOKENS, device=device)[None]
    rotation = LlamaRotaryEmbedding(config).to(device)(hidden, places)

    def run() -> Tensor:
        output: Tensor = layer(hidden, position_embeddings=rotation)
        return output

    return run


@torch.no_grad()
def timed(compared: Ways, calls: int, rounds: int) -> dict[str, list[float]]:
    """Seconds of each way to compute, of each round, in turn."""
    for call in compared.values():
        _seconds(call, calls)
    seconds: dict[str, list[float]] = {name: [] for name in compared}
    for _ in range(rounds):
        for name, call in compared.items():
            seconds[name].append(_seconds(call, calls))
    return seconds


def _seconds(call: Callable[[], object], calls: int) -> float:
    """Seconds of a call, of several in a row the mean, until the GPU is done."""
    _wait()
    start = time.perf_counter()
    for _ in range(calls):
        call()
    _wait()
    return (time.perf_counter() - start) / calls


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def times_table(
    seconds: dict[str, list[float]],
    setting: Setting,
    batch: int,
    counted: dict[str, float],
) -> Table:
    """Medians, spread, shares of a dense layer and prefill, and multiply-adds a second.

    A prefill is as many dense layers as the decoder has.
    """
    shown = Table(title=f"{setting.dtype}, batch {batch}, {TOKENS} tokens")
    shown.add_column("")
    titles = "ms", "least", "most", "of a layer", "of a prefill", "GMAC/s"
    for title in titles:
        shown.add_column(title, justify="right")
    dense = statistics.median(seconds["dense layer"])
    for name, values in seconds.items():
        median = statistics.median(values)
        times = (f"{1e3 * value:.3f}" for value in (median, min(values), max(values)))
        shares = (
            f"{median / of:.2%}" for of in (dense, dense * setting.geometry.layers)
        )
        work = counted["macs"] * batch
        work *= 1 if name.endswith("known") else setting.products
        rate = f"{work / median / 1e9:,.0f}" if name.startswith("scores") else ""
        shown.add_row(name, *times, *shares, rate)
    return shown


if __name__ == "__main__":
    main()
