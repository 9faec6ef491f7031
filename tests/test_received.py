"""The attention that tokens get: on a CPU, in Triton's interpreter, compiled, on a GPU.

What is expected is worked out here in float64, row by row.
"""

from __future__ import annotations

import functools
import importlib.util
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from vtprune_fx.ops import attention, received

ROOT = Path(__file__).resolve().parents[1]


class Arguments(NamedTuple):
    """What the operator takes."""

    query: Tensor
    key: Tensor
    mask: Tensor | None
    weights: Tensor
    lse: Tensor | None
    scale: float
    maximum: bool

    def exact(self) -> Arguments:
        """With queries and keys in float32."""
        return self._replace(query=self.query.float(), key=self.key.float())

    def to(self, device: str) -> Arguments:
        """On another device."""
        moved: dict[str, Any] = {
            name: value.to(device)
            for name, value in self._asdict().items()
            if isinstance(value, Tensor)
        }
        return self._replace(**moved)


class Case(NamedTuple):
    """Arguments to draw.

    Attributes:
        mask: ``none`` (causal), ``bool``, ``float`` (-inf), ``lowest`` (the least
            number of the queries' type), ``shared`` ([1, 1, S, S]), ``padding`` (not
            causal: all rows of a sample are one piece of memory) or ``bias`` (pairs
            that may attend have some of their own). In all but ``none`` and ``shared``
            a sample has padding on the left.
        rows: Which rows have weights: ``kinds`` (as FitPrune's: visual and text apart),
            ``raters`` (some of the text), ``last``, or ``all`` (padding too, and no two
            alike).
        known: Give log-sum-exps: somewhat off, so that using them makes a difference.
        nan: Queries of padding are not numbers.
    """

    samples: int = 2
    heads: int = 2
    groups: int = 1
    tokens: int = 70
    depth: int = 16
    dtype: torch.dtype = torch.float32
    mask: str = "bool"
    rows: str = "kinds"
    known: bool = False
    nan: bool = False
    maximum: bool = True


CASES = {
    "as FitPrune": Case(heads=4, groups=2),
    "as FitPrune, known": Case(heads=4, groups=2, known=True),
    "as SparseVLM": Case(rows="raters", maximum=False, mask="none"),
    "as FastV": Case(rows="last", maximum=False, groups=2),
    "maximum, causal": Case(mask="none", depth=24, samples=1),
    "mean, known": Case(known=True, maximum=False, mask="float", groups=2),
    "padding gives": Case(rows="all", mask="float"),
    "not causal, mean": Case(rows="all", mask="padding", maximum=False),
    "padding gives nothing, known": Case(rows="all", known=True),
    "half precision": Case(dtype=torch.float16, mask="lowest", depth=40),
    "half precision, known": Case(dtype=torch.float16, known=True, mask="shared"),
    "bias": Case(mask="bias", rows="all", tokens=33),
}
BFLOAT16 = {
    "bfloat16": Case(dtype=torch.bfloat16, mask="lowest"),
    "bfloat16, known": Case(dtype=torch.bfloat16, known=True, maximum=False),
}
"""Not for Triton's interpreter: it multiplies their bits as if they were integers."""
NAN = {"padding is not a number": Case(nan=True)}
"""Not for the definition: it weighs what has no weight."""


@functools.cache
def drawn(case: Case) -> Arguments:
    """Arguments of a case, always the same."""
    generator = torch.Generator().manual_seed(0)
    normal = functools.partial(torch.randn, generator=generator)
    width = case.tokens, case.depth
    # As a model has them: heads side by side in each token.
    query = 2 * normal(case.samples, width[0], case.heads, width[1]).transpose(1, 2)
    key = normal(case.samples, width[0], case.groups, width[1]).transpose(1, 2)
    if case.nan:
        query[-1, :, : case.tokens // 6] = torch.nan
    given = Arguments(
        query.to(case.dtype),
        key.to(case.dtype),
        _mask(case, generator),
        _weights(case, generator),
        None,
        case.depth**-0.5,
        case.maximum,
    )
    if not case.known:
        return given
    off = normal(case.samples, case.heads, case.tokens) / 10
    return given._replace(lse=_log_sum_exps(given) + off)


def _mask(case: Case, generator: torch.Generator) -> Tensor | None:
    samples, tokens = case.samples, case.tokens
    attends = torch.ones(samples, 1, tokens, tokens, dtype=torch.bool).tril()
    if case.mask == "none":
        return None
    if case.mask == "shared":
        return attends[:1]
    attends[-1, :, :, : tokens // 6] = False
    if case.mask == "padding":
        return attends[:, :, -1:].expand(-1, -1, tokens, -1)
    if case.mask == "bool":
        return attends
    if case.mask == "lowest":
        least = torch.finfo(case.dtype).min
        return torch.where(attends, 0.0, least).to(case.dtype)
    bias = torch.zeros(attends.shape)
    if case.mask == "bias":
        bias.normal_(generator=generator)
    return torch.where(attends, bias, -torch.inf)


def _weights(case: Case, generator: torch.Generator) -> Tensor:
    samples, tokens = case.samples, case.tokens
    if case.rows == "all":
        return torch.rand(samples, 3, tokens, generator=generator) - 0.25
    visual = torch.zeros(samples, 2, tokens)
    visual[:, 0, tokens // 5 : tokens // 2] = 1
    visual[:, 1, tokens // 2 :] = 1
    if case.rows == "kinds":
        return visual
    if case.rows == "last":
        return torch.eye(tokens)[-1].expand(samples, 1, -1)
    return visual[:, 1:] * (torch.rand(samples, 1, tokens, generator=generator) < 0.3)


# ------------------------------------------------------------------- what is expected


def by_hand(given: Arguments) -> Tensor:
    """[B, W, S] float64."""
    total = torch.zeros(given.weights.shape, dtype=torch.float64)
    for sample, row in given.weights.any(dim=1).nonzero().tolist():
        by_head = [
            _probabilities(given, sample, head, row)
            for head in range(given.query.shape[1])
        ]
        each = torch.stack(by_head)
        pairs = each.max(dim=0).values if given.maximum else each.mean(dim=0)
        for way in range(given.weights.shape[1]):
            total[sample, way] += given.weights[sample, way, row].double() * pairs
    return total


def _probabilities(given: Arguments, sample: int, head: int, row: int) -> Tensor:
    """[S]: what a row attends to, by one head."""
    attended, logits = _row(given, sample, head, row)
    found = torch.zeros(logits.shape, dtype=torch.float64)
    if given.lse is not None:
        norm = given.lse[sample, head, row].double()
        if norm != -torch.inf:
            found[attended] = (logits[attended] - norm).exp()
    elif attended.any():
        found[attended] = logits[attended].softmax(dim=0)
    else:
        found += 1 / len(found)
    return found


def _row(given: Arguments, sample: int, head: int, row: int) -> tuple[Tensor, Tensor]:
    """[S] bool and [S] float64: which tokens a row may attend to, and its logits."""
    query = given.query[sample, head, row].double()
    heads_of_a_key = given.query.shape[1] // given.key.shape[1]
    key = given.key[sample, head // heads_of_a_key].double()
    logits = (key * query).sum(dim=1) * given.scale
    if given.mask is None:
        return torch.arange(len(logits)) <= row, logits
    mask = given.mask[sample if len(given.mask) > 1 else 0, 0, row]
    if mask.dtype == torch.bool:
        return mask, logits
    return mask > torch.finfo(mask.dtype).min, logits + mask.double()


def _log_sum_exps(given: Arguments) -> Tensor:
    """[B, H, S] float32: -inf in rows that may attend nothing."""
    found = torch.empty(given.query.shape[:3])
    for at in itertools.product(*map(range, found.shape)):
        attended, logits = _row(given, *at)
        found[at] = logits[attended].logsumexp(dim=0)
    return found


def assert_by_hand(found: Tensor, case: Case) -> None:
    assert found.dtype == torch.float32
    expected = by_hand(drawn(case)).float()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


# --------------------------------------------------------------------------- on a CPU


@pytest.mark.parametrize("name", CASES | BFLOAT16 | NAN)
def test_on_a_cpu(name: str) -> None:
    case = (CASES | BFLOAT16 | NAN)[name]
    assert_by_hand(received.received(*drawn(case)), case)


SHARED = {
    name: case
    for name, case in (CASES | NAN).items()
    if case.mask in {"none", "bool", "shared", "padding"}
    and case.dtype == torch.float32
    and not case.known
}
"""What ``attend`` takes."""


@pytest.mark.parametrize("name", SHARED)
def test_beside_the_attention_itself(name: str) -> None:
    """Three blocks of rows, the last a short one."""
    given, case = drawn(SHARED[name]), SHARED[name]
    value = _value(case, given)
    block = given.query.shape[1] * case.tokens * (case.tokens * 2 // 5)
    with mock.patch.object(received, "_BLOCK", block):
        output, sums = _attended(given, value)
    assert_by_hand(sums, case)
    heard = slice(case.tokens // 6 if case.nan else 0, None)
    expected = _output(given, value)[:, :, heard].float()
    torch.testing.assert_close(output[:, :, heard], expected)
    assert output.transpose(1, 2).is_contiguous(), "a token's heads side by side"


def _value(case: Case, given: Arguments) -> Tensor:
    """[B, G, S, 12]: not as wide as keys."""
    generator = torch.Generator().manual_seed(1)
    value = torch.randn(case.samples, case.tokens, case.groups, 12, generator=generator)
    assert given.key.shape[:3] == value.transpose(1, 2).shape[:3]
    return value.transpose(1, 2)


def _attended(given: Arguments, value: Tensor) -> tuple[Tensor, Tensor]:
    query, key, mask, weights, _, scale, maximum = given
    return received.attend(query, key, value, mask, weights, scale, maximum)


def _output(given: Arguments, value: Tensor) -> Tensor:
    """[B, H, S, D'] float64: 0 in rows that may attend nothing."""
    found = value.new_zeros(*given.query.shape[:3], value.shape[3], dtype=torch.double)
    served = found.shape[1] // value.shape[1]
    for sample, head, row in itertools.product(*map(range, found.shape[:3])):
        attended, _ = _row(given, sample, head, row)
        if attended.any():
            share = _probabilities(given, sample, head, row)
            values = value[sample, head // served].double()
            found[sample, head, row] = share @ values
    return found


@pytest.mark.parametrize("name", CASES | BFLOAT16)
def test_the_definition(name: str) -> None:
    case = (CASES | BFLOAT16)[name]
    assert_by_hand(received.spelled_out(*drawn(case).exact()), case)


def test_products_of_half_precision_are_rounded_by_the_definition_alone() -> None:
    case = BFLOAT16["bfloat16"]
    error = received.spelled_out(*drawn(case)) - by_hand(drawn(case))
    assert error.abs().max() > 1e-3


def _most_bytes(call: Callable[..., Tensor], given: Arguments) -> int:
    """What the operator within a call that takes the most memory takes."""
    with torch.profiler.profile(profile_memory=True) as seen:
        call(*given)
    taken: list[int] = [event.self_cpu_memory_usage for event in seen.events() or ()]
    return max(taken)


@pytest.mark.parametrize("known", [False, True])
def test_no_head_has_all_its_pairs_written(
    monkeypatch: pytest.MonkeyPatch, *, known: bool
) -> None:
    case = Case(heads=8, tokens=160, known=known)
    monkeypatch.setattr(received, "_BLOCK", 32 * case.heads * case.tokens)
    pair = 4 * case.heads
    assert _most_bytes(received.spelled_out, drawn(case)) >= (
        pair * case.samples * case.tokens**2
    )
    # Logits of 32 rows; the mask, in which all heads are one, for all of both samples.
    assert _most_bytes(received.received, drawn(case)) <= max(
        pair * 32 * case.tokens, 8 * case.samples * case.tokens**2
    )


# ------------------------------------------------------------------------ as operators


@pytest.mark.parametrize("name", ["as FitPrune", "as SparseVLM", "mean, known"])
def test_pytorchs_checks_of_the_operator(name: str) -> None:
    torch.library.opcheck(received.received, drawn(CASES[name]))


def test_results_lie_in_memory_as_compilers_are_told() -> None:
    given = drawn(CASES["as FitPrune"])
    given = given._replace(weights=given.weights.mT.contiguous().mT)
    torch.library.opcheck(received.received, given)
    assert received.received(*given).is_contiguous()


@pytest.mark.parametrize("name", ["as FitPrune", "mean, known", "half precision"])
def test_compiled_as_one_graph(name: str) -> None:
    given = drawn(CASES[name])

    def twice(*arguments: Any) -> Tensor:
        doubled: Tensor = received.received(*arguments) * 2
        return doubled

    compiled = torch.compile(twice, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(*given), twice(*given))


# -------------------------------------------------------------------------- in Triton

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None,
    reason="Triton is not installed",
)
INTERPRETED = CASES | NAN
INTERPRETED["small blocks"] = Case(tokens=50, mask="none", rows="all", samples=1)


def _in_a_process(call: str, **variables: str) -> None:
    """Run a function of this module where Triton has not been imported yet."""
    code = f"from tests import test_received; test_received.{call}"
    command = [sys.executable, "-c", code]
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | variables
    subprocess.run(command, cwd=ROOT, env=environment, check=True)


def write_interpreted(path: str) -> None:
    """Results of all cases in Triton's interpreter."""
    from vtprune_fx.ops import received_triton

    results = {}
    for name, case in INTERPRETED.items():
        if name == "small blocks":
            # Four blocks of rows, in two shares.
            received_triton.SIDE, received_triton.SHARES = 16, 2
        results[name] = received_triton.received(attention.Received(*drawn(case)))
    save_file(results, path)


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    path = tmp_path_factory.mktemp("interpreted") / "results.safetensors"
    _in_a_process(f"write_interpreted({str(path)!r})", TRITON_INTERPRET="1")
    return load_file(path)


@needs_triton
@pytest.mark.parametrize("name", INTERPRETED)
def test_in_tritons_interpreter(name: str, interpreted: dict[str, Tensor]) -> None:
    assert_by_hand(interpreted[name], INTERPRETED[name])


class Target(NamedTuple):
    """A GPU to compile for, which need not be there, and what it multiplies by."""

    capability: int
    product: str
    case: Case


TARGETS = {
    "H100, bfloat16": Target(90, "wgmma", Case(dtype=torch.bfloat16, depth=128)),
    "A100, float16, a mean": Target(
        80,
        "mma.sync",
        Case(dtype=torch.float16, depth=80, mask="lowest", maximum=False),
    ),
    "RTX 4090, float32": Target(89, "mma.sync", Case(depth=128, mask="none")),
}
SHARED_MEMORY = 99 * 1024
"""Bytes that a program may have on the least of these GPUs, the RTX 4090."""


def write_compiled(path: str) -> None:
    """What kernels are called, take and multiply by, compiled without a GPU."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import JITFunction, driver

    from vtprune_fx.ops import received_triton

    run, kernels, gpu = JITFunction.run, list[Any](), mock.Mock()

    def compile_alone(self: Any, *args: Any, warmup: bool, **kwargs: Any) -> None:
        kernels.append(run(self, *args, warmup=True, **kwargs))

    JITFunction.run = compile_alone
    driver.set_active(gpu)
    found = {}
    for name, target in TARGETS.items():
        gpu.get_current_device.return_value = target.capability
        gpu.get_current_target.return_value = GPUTarget("cuda", target.capability, 32)
        received_triton.received(attention.Received(*drawn(target.case).to("meta")))
        found[name] = [
            (
                each.metadata.name,
                each.metadata.shared,
                target.product in each.asm["ptx"],
            )
            for each in kernels
        ]
        kernels.clear()
    Path(path).write_text(json.dumps(found), encoding="utf-8")


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("compiled")
    path = folder / "found.json"
    _in_a_process(f"write_compiled({str(path)!r})", TRITON_CACHE_DIR=str(folder))
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


@needs_triton
@pytest.mark.parametrize("name", TARGETS)
def test_kernels_compile_for_a_gpu(name: str, compiled: dict[str, Any]) -> None:
    names, shared, multiplied = zip(*compiled[name], strict=True)
    assert names == ("_log_sum_exps", "_weighted_sums")
    assert max(shared) <= SHARED_MEMORY
    assert all(multiplied)


# --------------------------------------------------------------------------- on a GPU

LLAVA = Case(samples=1, heads=32, groups=32, tokens=651, depth=128)
"""A layer of LLaVA-1.5-7B, with one picture and 75 tokens of text."""
ON_A_GPU = {
    "bfloat16": LLAVA._replace(dtype=torch.bfloat16, mask="none"),
    "float16": LLAVA._replace(dtype=torch.float16, mask="lowest"),
    "eight, padded": LLAVA._replace(samples=8, dtype=torch.bfloat16),
    "eight, float16": LLAVA._replace(samples=8, dtype=torch.float16, maximum=False),
    "grouped": LLAVA._replace(samples=2, groups=8, dtype=torch.bfloat16),
    "known": LLAVA._replace(samples=2, dtype=torch.bfloat16, known=True),
    "last": LLAVA._replace(dtype=torch.bfloat16, rows="last", maximum=False),
    "padding gives": LLAVA._replace(samples=2, dtype=torch.float16, rows="all"),
    "float32": LLAVA._replace(samples=2),
}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ON_A_GPU)
def test_on_a_gpu(name: str) -> None:
    case = ON_A_GPU[name]
    given = drawn(case._replace(known=False)).to("cuda")
    if case.known:
        exact = attention.logits(*given.exact()[:3], given.scale)
        given = given._replace(lse=exact.logsumexp(dim=3) + 0.1)
    found = received.received(*given)
    assert found.is_cuda
    expected = received.spelled_out(*given.exact())
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)
    assert torch.equal(found, received.received(*given))
