"""``vtprune verify``: good exports pass, damaged ones fail and say where."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir
import pytest
import torch
from torch import nn
from transformers.exporters import ExportedModel
from typer.testing import CliRunner

from tests.test_onnx_safety import edit_graph, trust_again
from tests.tiny import recipe_for
from vtprune_fx.cli import app
from vtprune_fx.errors import ExportError, InputError
from vtprune_fx.export import OnnxOptions, load, manifest, write_onnx
from vtprune_fx.export.onnx_model import OnnxModel
from vtprune_fx.export.quantize import rounded
from vtprune_fx.export.verify import Verification, verify
from vtprune_fx.models.arguments import CACHE_NAMES
from vtprune_fx.models.loading import open_checkpoint
from vtprune_fx.recipes.schema import Recipe
from vtprune_fx.reference.random_llava import CheckpointSpec, build_checkpoint


def told(result: Verification) -> str:
    """The first difference of each case, for a failing test's message."""
    return str([(o.case, o.first) for o in result.outcomes])


def test_a_good_export_passes(onnx_folder: Path) -> None:
    result = verify(onnx_folder)
    assert result.passed, told(result)
    cases = {outcome.case for outcome in result.outcomes}
    assert cases == {
        *("one", "the shortest", "four, padded", "one more image", "text alone"),
        "two, answered",
    }
    # Every kind of value was looked at; cuts are in layers 0 and 1.
    seen = {difference.where for difference in result.outcomes[0].differences}
    layers = {f"layer {i}, {kind}" for i in range(3) for kind in ("keys", "values")}
    assert seen == {*layers, "layer 0, cut", "layer 1, cut", "logits", "next tokens"}
    [answered] = [o for o in result.outcomes if o.case == "two, answered"]
    chosen = [d for d in answered.differences if d.where == "answer"]
    assert len(chosen) == 2 * 8


@pytest.mark.compat
def test_the_command_prints_a_table_and_returns_0(onnx_folder: Path) -> None:
    run = CliRunner().invoke(app, ["verify", str(onnx_folder)])
    assert run.exit_code == 0, run.output
    assert "four, padded" in run.output


# ---------------------------------------------------------------------- damaged ones


@pytest.fixture
def copy(onnx_folder: Path, tmp_path: Path) -> Path:
    return shutil.copytree(onnx_folder, tmp_path / "onnx")


def change_a_weight(folder: Path) -> None:
    model = onnx_ir.load(folder / "prefill.onnx")
    name = "model.language_model.layers.1.self_attn.v_proj.weight"
    tensor = model.graph.initializers[name].const_value
    assert isinstance(tensor, onnx_ir.ExternalTensor)
    assert tensor.offset is not None
    weights = bytearray((folder / "prefill.onnx.data").read_bytes())
    one = np.frombuffer(weights[tensor.offset : tensor.offset + 4], np.float32) + 1
    weights[tensor.offset : tensor.offset + 4] = one.astype(np.float32).tobytes()
    (folder / "prefill.onnx.data").write_bytes(weights)


def change_a_count(folder: Path) -> None:
    """Let the second cut take one token less: where what stays begins in the order."""

    def edit(proto: onnx.ModelProto) -> None:
        nodes = {out: node for node in proto.graph.node for out in node.output}
        kept = nodes["keep_sets.1"]
        cut = nodes[kept.input[0]]
        assert (kept.op_type, cut.op_type) == ("TopK", "Slice")
        fewer = onnx.numpy_helper.from_array(np.array([2]), "fewer")  # not 3
        proto.graph.initializer.append(fewer)
        cut.input[1] = "fewer"

    edit_graph(folder / "prefill.onnx", edit)


def forget_the_cache(folder: Path) -> None:
    """Let the decode graph attend to the new tokens alone."""

    def edit(proto: onnx.ModelProto) -> None:
        nodes = [n for n in proto.graph.node if n.op_type == "Concat"]
        cached = [n for n in nodes if n.input[0].startswith("input.past_key_values")]
        assert len(cached) == 2 * 3
        for node in cached:
            del node.input[0]

    edit_graph(folder / "decode.onnx", edit)


def swap_a_graph(folder: Path) -> None:
    model = onnx_ir.load(folder / "prefill.onnx")
    onnx_ir.external_data.load_to_model(model)
    onnx_ir.save(model, folder / "decode.onnx", external_data="decode.onnx.data")


DAMAGE = {
    "one weight": (change_a_weight, "layer 1, values"),
    "one cut's count": (change_a_count, r"layer 1, cut|it does not run"),
    "one graph for another": (swap_a_graph, "it does not run"),
    "a decode graph without its cache": (forget_the_cache, "next tokens|it does not"),
}


@pytest.mark.parametrize(("damage", "where"), DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_export_fails(
    copy: Path, damage: Callable[[Path], None], where: str
) -> None:
    damage(copy)
    trust_again(copy)
    result = verify(copy)
    assert not result.passed
    firsts = [outcome.first.where for outcome in result.outcomes if outcome.first]
    assert any(np.char.find(firsts[0], part) >= 0 for part in where.split("|")), firsts


def test_an_answer_that_forgets_the_prompt_fails(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Graphs that are right do not help where ``generate`` loses the cache."""
    prepare: Any = OnnxModel.prepare_inputs_for_generation

    def losing(self: OnnxModel, *args: Any, **kwargs: Any) -> dict[str, Any]:
        prepared: dict[str, Any] = prepare(self, *args, **kwargs)
        return {n: v for n, v in prepared.items() if n not in CACHE_NAMES}

    monkeypatch.setattr(OnnxModel, "prepare_inputs_for_generation", losing)
    result = verify(copy)
    wrong = {outcome.case: outcome.first for outcome in result.outcomes}
    assert {case for case, first in wrong.items() if first} == {"two, answered"}
    first = wrong["two, answered"]
    assert first is not None
    assert first.where == "answer"
    assert re.fullmatch(r"sample \d, token [1-7]: \d+, not \d+", first.note)


def test_the_command_returns_1_and_names_the_layer(copy: Path) -> None:
    change_a_weight(copy)
    trust_again(copy)
    run = CliRunner().invoke(app, ["verify", str(copy)])
    assert run.exit_code == 1
    assert "layer 1, values" in " ".join(run.output.split())


def test_hashes_out_of_date_fail_ahead_of_anything_else(copy: Path) -> None:
    change_a_weight(copy)
    with pytest.raises(ExportError, match="as it was written"):
        verify(copy)


def test_without_the_original_model_nothing_can_be_compared(copy: Path) -> None:
    contents = manifest.read(copy).model_copy(update={"source": ""})
    contents.write(copy)
    with pytest.raises(InputError, match="--model"):
        verify(copy)


def test_another_model_than_the_original_fails(copy: Path, tmp_path: Path) -> None:
    spec = CheckpointSpec(
        *(56, 14, 3, 32, 4, 48), vision_hidden=32, vision_layers=2, seed=1
    )
    other = build_checkpoint(tmp_path / "other", spec)
    result = verify(copy, str(other))
    assert not result.passed


# ------------------------------------------------------------------- other precisions


SPEC = CheckpointSpec(
    image_size=56, layers=2, hidden=32, heads=4, intermediate=48, vision_layers=2
)
RECIPE = recipe_for(2, {0: 5, 1: 3})


def exported(
    root: Path, options: OnnxOptions, dtype: torch.dtype, recipe: Recipe = RECIPE
) -> Path:
    checkpoint = build_checkpoint(root / "checkpoint", SPEC)
    parts = open_checkpoint(checkpoint, dtype)
    write_onnx(*parts, recipe, root / "onnx", options=options)
    return root / "onnx"


OPTIONS = {
    "int4": (OnnxOptions(quantize="int4"), torch.float32),
    "int8": (OnnxOptions(quantize="int8"), torch.float32),
    "float16": (OnnxOptions(), torch.float16),
    "float16, int8": (OnnxOptions(quantize="int8"), torch.float16),
    "opset 23": (OnnxOptions(opset=23), torch.float32),
    "one prompt of 40": (OnnxOptions(prompt=40, batch=1), torch.float32),
}


@pytest.mark.slow
@pytest.mark.parametrize(("options", "dtype"), OPTIONS.values(), ids=OPTIONS)
def test_an_export_with_options_passes(
    tmp_path: Path, options: OnnxOptions, dtype: torch.dtype
) -> None:
    folder = exported(tmp_path, options, dtype)
    contents = manifest.read(folder)
    assert contents.precision == str(dtype).removeprefix("torch.")
    assert (contents.quantize, contents.batch) == (options.quantize, options.batch)
    result = verify(folder)
    assert result.passed, told(result)
    graph = onnx_ir.load(folder / "prefill.onnx")
    assert graph.opset_imports[""] == options.opset
    rounds = [n for n in graph.graph.all_nodes() if n.op_type == "MatMulNBits"]
    # Seven in each decoder layer, four and two in each used layer of the tower, two of
    # the projector, and the head.
    used = SPEC.vision_layers - 1
    assert len(rounds) == (7 * 2 + 6 * used + 3 if options.quantize else 0)


def test_two_samples_rounded_to_int4_and_told_who_stays(tmp_path: Path) -> None:
    options = OnnxOptions(quantize="int4", batch=2, keep_sets=True)
    folder = exported(tmp_path, options, torch.float32)
    result = verify(folder)
    assert result.passed, told(result)
    # What the folder tells of itself, to transformers alone too: outputs ahead of the
    # model's own do not disturb it.
    plain = ExportedModel.from_pretrained(folder, device="cpu")
    session: Any = plain.runners["prefill"]
    names = [spec.name for spec in session.session.get_outputs()]
    assert names[:3] == ["keep_sets.0", "keep_sets.1", "logits"]
    model: Any = load(folder)
    image = torch.full((16,), model.manifest.image_token_id)
    ids = torch.cat([torch.arange(10, 15), image, torch.arange(20, 25)]).expand(2, -1)
    pixels = torch.randn(2, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    outputs = model(input_ids=ids, pixel_values=pixels)
    assert outputs.logits.shape[1] == 26 - 5 - 3
    kept = model.keep_sets
    assert {layer: tuple(k.shape) for layer, k in kept.items()} == {
        0: (2, 21),
        1: (2, 18),
    }
    # Text stands ahead of position 5 and behind position 20; all of it stays.
    assert kept[1][:, :5].tolist() == [[0, 1, 2, 3, 4]] * 2
    assert kept[1][:, -5:].tolist() == [[21, 22, 23, 24, 25]] * 2
    with pytest.raises(InputError, match=r"shape \[2, 26\].* found \[1, 26\]"):
        model(input_ids=ids[:1], pixel_values=pixels[:1])


def test_prompts_shorter_than_an_image_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="at least 18: 16 visual tokens and two of"):
        exported(tmp_path, OnnxOptions(prompt=17), torch.float32)


@pytest.mark.slow
def test_bfloat16_is_written_and_its_missing_operator_named(tmp_path: Path) -> None:
    folder = exported(tmp_path, OnnxOptions(), torch.bfloat16)
    with pytest.raises(ExportError, match=r"ONNX Runtime in bfloat16.* none for \w+"):
        verify(folder)


@pytest.mark.slow
def test_a_graph_of_another_recipe_fails(tmp_path: Path) -> None:
    folder = exported(tmp_path / "one", OnnxOptions(), torch.float32)
    other = exported(
        tmp_path / "other", OnnxOptions(), torch.float32, recipe_for(2, {0: 5, 1: 4})
    )
    for name in ("prefill.onnx", "prefill.onnx.data"):
        shutil.copy(other / name, folder / name)
    trust_again(folder)
    result = verify(folder)
    first = result.outcomes[0].first
    assert first is not None
    assert (first.where, first.note) == ("layer 1, cut", "4 dropped, not 3")


@pytest.mark.parametrize(("to", "steps"), [("int8", 127), ("int4", 7)])
def test_weights_are_rounded_to_a_step_of_their_block(to: str, steps: int) -> None:
    torch.manual_seed(0)
    weight = nn.Linear(64, 8).weight.detach()
    found = rounded(weight, to)  # type: ignore[arg-type] # one of the two
    blocks = weight.reshape(8, 2, 32)
    # Symmetric: the largest of a block is the last step, on one side or the other.
    step = blocks.abs().amax(2, keepdim=True) / steps
    off = (found.reshape(8, 2, 32) - blocks).abs()
    assert (off <= step).all()
    assert off.max() > 0
