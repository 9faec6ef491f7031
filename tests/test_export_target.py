"""A target from outside of the package: written, loaded, run, and where it is refused.

The toy runtime knows one answer: its graphs are files with a token's id in them.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import DynamicCache, LlavaForConditionalGeneration, ProcessorMixin
from transformers.exporters import (
    ExportedComponent,
    ExportedModel,
    OnnxExporter,
    register_backend,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

from tests.test_onnx_safety import edit_manifest, trust_again
from tests.tiny import recipe_for
from vtprune_fx.errors import ExportError, InputError
from vtprune_fx.export import (
    ExportTarget,
    GraphModel,
    GraphSpec,
    Manifest,
    OnnxModel,
    TensorRTModel,
    TensorSpec,
    TritonSupport,
    load,
    register_target,
    write_export,
    write_triton,
)
from vtprune_fx.export.graph_outputs import bare_metadata
from vtprune_fx.export.verify import verify
from vtprune_fx.models.arguments import causal_output
from vtprune_fx.models.loading import open_checkpoint
from vtprune_fx.models.prompts import prompt_inputs
from vtprune_fx.reference.random_llava import CheckpointSpec, build_checkpoint

SPEC = CheckpointSpec(
    image_size=28, layers=1, hidden=16, heads=2, intermediate=16, vision_layers=2
)


class ToyFormat(OnnxExporter):
    """How transformers writes the toy's graphs."""

    export_format: Any = "toy"
    program_suffix = ".toy"

    @classmethod
    def save_program(cls, program: Any, path: Any) -> None:
        Path(path).write_text(str(program))


class ToyRunner:
    """Answers every token with the one in its file."""

    def __init__(self, token: int, words: int) -> None:
        self.token, self.words = token, words
        self.device = torch.device("cpu")
        self.keep_sets: dict[int, torch.Tensor] = {}

    def __call__(self, **inputs: Any) -> CausalLMOutputWithPast:
        ids = inputs["input_ids"]
        cache = inputs.get("past_key_values") or DynamicCache()
        new = torch.zeros(len(ids), 2, ids.shape[1], 8)
        cache.update(new, new, 0)
        chosen = torch.full_like(ids, self.token)
        return causal_output(torch.nn.functional.one_hot(chosen, self.words), cache)


def open_toy(folder: Path, contents: Manifest, device: str | None) -> GraphModel:
    assert device is None
    runners = {}
    for name in ("prefill", "decode"):
        token = int((folder / f"{name}.toy").read_text())
        runners[name] = ToyRunner(token, contents.image_token_id + 300)
    return GraphModel(folder, contents, runners)


def read_toy(folder: Path, contents: Manifest, max_batch: int) -> dict[str, GraphSpec]:
    assert (folder / "prefill.toy").is_file()
    assert contents.target == "toy"
    ids = TensorSpec("input_ids", "INT64", (-1, -1))
    return {"prefill": GraphSpec((ids,), ())}


TOY = ExportTarget("toy", ".toy", open_toy, triton=TritonSupport("python", read_toy))
register_backend(ToyFormat)
register_target(TOY)


def write_toy(
    model: LlavaForConditionalGeneration, processor: ProcessorMixin, folder: Path
) -> None:
    parts = {
        name: ExportedComponent(token, bare_metadata("float32"))
        for name, token in (("prefill", 7), ("decode", 8))
    }
    write_export(
        folder,
        ExportedModel(parts, "toy", model.config, model.generation_config),
        processor,
        target="toy",
        source="",
        recipe=recipe_for(1, {0: 1}),
        visual_tokens=4,
        tokens_per_layer=[3],
        image_token_id=model.config.image_token_id,
        precision="float32",
        tolerance=1e-4,
        packages={"toy": "1"},
    )


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("toy") / "checkpoint"
    return open_checkpoint(build_checkpoint(folder, SPEC))


@pytest.fixture
def toy(opened: Any, tmp_path: Path) -> Path:
    model, processor = opened
    write_toy(model, processor, tmp_path / "toy")
    return tmp_path / "toy"


def test_a_folder_of_the_toy_target_is_loaded_and_answers(
    opened: Any, toy: Path
) -> None:
    model: Any = load(toy)
    assert type(model) is GraphModel
    assert model.manifest.target == "toy"
    picture = Image.new("RGB", (28, 28))
    # The prefill answers a prompt with an image, decode all other steps.
    for image, expected in ((picture, [7, 8, 8]), (None, [8, 8, 8])):
        inputs = prompt_inputs(opened[1], "What is it?", image)
        ids = model.generate(**inputs, max_new_tokens=3, do_sample=False)
        assert ids[0, inputs["input_ids"].shape[1] :].tolist() == expected


def test_triton_gets_the_toy_target(toy: Path, tmp_path: Path) -> None:
    [model] = write_triton(toy, tmp_path / "models", 2)
    assert (model / "1" / "prefill.toy").read_text() == "7"
    text = (model / "config.pbtxt").read_text()
    assert 'backend: "python"' in text
    assert 'default_model_filename: "prefill.toy"' in text


def test_a_target_that_hides_keep_sets_is_not_verified(toy: Path) -> None:
    with pytest.raises(ExportError, match=r"keep.*found target 'toy'"):
        verify(toy)


def test_a_graph_of_another_suffix_is_refused(toy: Path) -> None:
    (toy / "prefill.toy").rename(toy / "prefill.onnx")
    trust_again(toy)
    with pytest.raises(ExportError, match=r"expected prefill\.toy, found no such file"):
        load(toy)


def test_an_unknown_target_is_refused(toy: Path, opened: Any) -> None:
    edit_manifest(toy, target="abacus")
    known = r"expected a target among onnx, tensorrt.*, found 'abacus'"
    for read in (load, verify):
        with pytest.raises(ExportError, match=known):
            read(toy)
    with pytest.raises(ExportError, match=known):
        write_export(toy, ExportedModel({}, "abacus"), opened[1], target="abacus")


def test_a_name_is_registered_once() -> None:
    assert register_target(TOY) is TOY
    with pytest.raises(InputError, match="expected a name that no other target has"):
        register_target(dataclasses.replace(TOY, suffix=".other"))


def test_the_models_of_two_runtimes_are_siblings() -> None:
    for kind, other in ((OnnxModel, TensorRTModel), (TensorRTModel, OnnxModel)):
        assert issubclass(kind, GraphModel)
        assert not issubclass(kind, other)
