"""The exported folder: what is in it, and that ONNX Runtime answers as the oracle."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from pathlib import Path
from typing import Any, Literal

import onnx_ir
import pytest
import torch
from transformers import LlavaForConditionalGeneration

from tests.onnx_prefill import Prefill
from tests.tiny import (
    IMAGE,
    Inputs,
    assert_matches_oracle,
    batch,
    counted_positions,
    recipe_for,
    tiny_llava,
)
from vtprune_fx import oracle
from vtprune_fx.errors import ExportError, InputError, MissingDependencyError, PlanError
from vtprune_fx.export import export_onnx, load, manifest, write_onnx
from vtprune_fx.models.loading import open_checkpoint
from vtprune_fx.recipes.schema import Recipe

LAYERS = 3
RECIPE = recipe_for(LAYERS, {0: 5, 1: 3})
PROMPTS = {
    "one sample": [(5, 9)],
    "one sample, longer": [(5, 40)],
    "three samples, images at different places, left padding": [(9, 4), (2, 7), (0, 3)],
    "two images in one prompt": [(3, 4, 6)],
    "two images in each of two prompts": [(3, 4, 6), (1, 0, 5)],
}

Graphs = dict[str, onnx_ir.Model]


@pytest.fixture(scope="module")
def graphs() -> Graphs:
    """Prefill and decode of the tiny model, which the oracle knows."""
    exported, _ = export_onnx(tiny_llava(layers=LAYERS), batch_of_two(), RECIPE)
    return {name: part.program for name, part in exported.components.items()}


@pytest.fixture
def folder(onnx_folder: Path) -> Path:
    return onnx_folder


def batch_of_two() -> Inputs:
    return batch(tiny_llava(layers=LAYERS), (5, 9), (2, 4))


@pytest.mark.parametrize("prompts", PROMPTS.values(), ids=PROMPTS)
def test_prefill_equals_the_oracle(
    graphs: Graphs, prompts: list[tuple[int, ...]]
) -> None:
    model = tiny_llava(layers=LAYERS)
    inputs = batch(model, *prompts, seed=len(prompts))
    run = Prefill(graphs["prefill"], inputs, RECIPE)
    positioned = inputs | {"position_ids": counted_positions(inputs)}
    assert_matches_oracle(run.outputs, run.keep_sets, model, RECIPE, positioned)


@pytest.mark.parametrize(
    "score",
    [
        pytest.param("inverted", marks=pytest.mark.slow),
        "random",
        pytest.param("uniform", marks=pytest.mark.slow),
    ],
)
def test_baseline_prefill_equals_the_oracle(
    score: Literal["inverted", "random", "uniform"],
) -> None:
    model, recipe, inputs = (
        tiny_llava(layers=LAYERS),
        RECIPE.baseline(score),
        batch_of_two(),
    )
    exported, _ = export_onnx(model, inputs, recipe)
    prefill = Prefill(exported.components["prefill"].program, inputs, recipe)
    assert_matches_oracle(prefill.outputs, prefill.keep_sets, model, recipe, inputs)


def test_no_graph_depends_on_data_for_a_shape(graphs: Graphs) -> None:
    for model in graphs.values():
        # An exported function calls others; inlined, all operators are in one list.
        for node in onnx_ir.traversal.RecursiveGraphIterator(model.graph):
            assert node.op_type not in {"NonZero", "Compress", "Unique"}, node
            if node.op_type == "TopK":
                sizes = _sources(node.inputs[1])
                assert sizes <= {"Shape", "Constant", "initializer"}, (node, sizes)


def _sources(value: onnx_ir.Value | None) -> set[str]:
    """The operators that a value is computed from, walking back up to shapes."""
    assert value is not None
    node = value.producer()
    if node is None:
        return {"initializer" if value.is_initializer() else f"input {value.name}"}
    if node.op_type in {"Shape", "Constant"}:
        return {node.op_type}
    sources = [_sources(item) for item in node.inputs if item is not None]
    return set().union(*sources)


def test_the_number_of_images_stays_dynamic(graphs: Graphs) -> None:
    [pixels] = [v for v in graphs["prefill"].graph.inputs if v.name == "pixel_values"]
    assert pixels.shape is not None
    assert isinstance(pixels.shape[0], onnx_ir.SymbolicDim)


# ------------------------------------------------------------------------ the folder


def ask(folder: Path, *texts: str) -> tuple[Any, dict[str, Any]]:
    model = load(folder)
    _, processor = open_checkpoint(folder.parent / "checkpoint")
    from vtprune_fx.evaluation.picture import sample_photo

    photos = [sample_photo().rotate(90 * i) for i in range(len(texts))]
    prompts = [f"USER: <image>\n{text} ASSISTANT:" for text in texts]
    inputs = processor(images=photos, text=prompts, padding=True, return_tensors="pt")
    return model, dict(inputs)


def test_generate_gives_the_oracles_tokens_for_a_padded_batch(folder: Path) -> None:
    onnx_model, inputs = ask(folder, "What is it?", "How many cups are on the table?")
    assert (inputs["attention_mask"][:, 0] == 0).any(), "some prompt must be padded"
    ids = onnx_model.generate(**inputs, max_new_tokens=6, do_sample=False)
    model, _ = open_checkpoint(folder.parent / "checkpoint")
    assert isinstance(model, LlavaForConditionalGeneration)
    positions = counted_positions(inputs)
    for row, sample in enumerate(
        oracle.split_batch(model, **inputs, position_ids=positions)
    ):
        assert ids[row, -6:].tolist() == oracle.generate(model, RECIPE, sample, 6)


def test_a_prompt_without_an_image_runs_unpruned(folder: Path) -> None:
    ids = torch.tensor([[1, 40, 41, 42, 43, 44]])
    model: Any = open_checkpoint(folder.parent / "checkpoint")[0]
    exported: Any = load(folder)
    expected = model.generate(input_ids=ids, max_new_tokens=5, do_sample=False)
    found = exported.generate(input_ids=ids, max_new_tokens=5, do_sample=False)
    assert found.tolist() == expected.tolist()


def test_a_sample_with_too_few_visual_tokens_is_refused(folder: Path) -> None:
    model, inputs = ask(folder, "What is it?", "What is it?")
    image_id = model.manifest.image_token_id
    second = inputs["input_ids"][1]
    second[second == image_id] = 40
    with pytest.raises(InputError, match=r"at least 8 visual tokens.*found 16, 0"):
        model(**inputs)


def test_the_manifest_tells_what_was_cut_and_hashes_every_file(folder: Path) -> None:
    contents = manifest.read(folder)
    assert contents.recipe == RECIPE
    assert contents.tokens_per_layer == [11, 8, 8]
    assert set(contents.packages) >= {"torch", "transformers", "vtprune-fx"}
    files = {
        p.name: p.read_bytes() for p in folder.iterdir() if p.name != manifest.FILE
    }
    hashes = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    assert contents.files == hashes
    assert {"prefill.onnx", "decode.onnx", "tokenizer.json"} <= set(files)


def test_a_missing_file_is_named(folder: Path, tmp_path: Path) -> None:
    (tmp_path / manifest.FILE).write_text((folder / manifest.FILE).read_text())
    with pytest.raises(
        ExportError, match=r"expected chat_template.jinja, found no such"
    ):
        load(tmp_path)


def test_a_broken_manifest_is_refused(tmp_path: Path) -> None:
    (tmp_path / manifest.FILE).write_text('{"schema_version": 1}')
    with pytest.raises(ExportError, match=r"readable vtprune.json"):
        load(tmp_path)


def test_without_onnxruntime_the_error_names_the_install_line(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec

    def missing(name: str, package: str | None = None) -> object:
        return None if name == "onnxruntime" else find(name, package)

    monkeypatch.setattr(importlib.util, "find_spec", missing)
    with pytest.raises(MissingDependencyError, match=r"vtprune-fx\[onnxruntime\]"):
        load(folder)


def test_a_device_that_does_not_work_is_refused(folder: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("CUDA works here")
    with pytest.raises(ExportError, match="device cuda"):
        load(folder, device="cuda")


# -------------------------------------------------------------- what writing refuses


def export_to(folder: Path, output: Path, recipe: Recipe = RECIPE) -> None:
    write_onnx(*open_checkpoint(folder.parent / "checkpoint"), recipe, output)


def listing(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.is_file()}


def test_a_folder_that_holds_something_else_is_left_alone(
    folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(InputError, match=r"found thesis.txt"):
        export_to(folder, tmp_path)
    assert listing(tmp_path) == {"thesis.txt": b"years of work"}


def test_a_file_put_into_an_export_is_not_lost(folder: Path, tmp_path: Path) -> None:
    contents = json.loads((folder / manifest.FILE).read_text())
    (tmp_path / manifest.FILE).write_text(json.dumps(contents))
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match=r"found notes.txt"):
        export_to(folder, tmp_path)
    assert sorted(listing(tmp_path)) == ["notes.txt", manifest.FILE]


def test_a_recipe_that_does_not_fit_leaves_nothing_behind(
    folder: Path, tmp_path: Path
) -> None:
    deep = recipe_for(9, {8: 1})
    with pytest.raises(PlanError, match="a layer below 3"):
        export_to(folder, tmp_path / "new", deep)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_an_earlier_export_is_replaced(folder: Path, tmp_path: Path) -> None:
    export_to(folder, tmp_path / "onnx")
    other = recipe_for(LAYERS, {1: 2})
    export_to(folder, tmp_path / "onnx", other)
    assert manifest.read(tmp_path / "onnx").recipe == other
    assert [p.name for p in tmp_path.iterdir()] == ["onnx"]


def test_the_placeholder_of_the_tiny_model_is_what_tests_assume() -> None:
    assert tiny_llava(layers=LAYERS).config.image_token_id == IMAGE
