"""TensorRT: what is built without a GPU, and what a runtime does with it."""

from __future__ import annotations

import copy
import importlib
import importlib.metadata
import importlib.util
import json
import shutil
import time
from pathlib import Path
from typing import Any

import onnx_ir
import onnxruntime
import pytest
import torch
import typer
from google.protobuf import text_format
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)
from typer.testing import CliRunner

from tests import zoo
from tests.ort_engine import OrtEngine
from tests.test_onnx_safety import edit_json, trust_again
from tests.tiny import IMAGE, batch, counted_positions, recipe_for, tiny_llava
from vtprune_fx import oracle
from vtprune_fx.cli import app
from vtprune_fx.errors import ExportError, InputError, MissingDependencyError
from vtprune_fx.evaluation.picture import sample_photo
from vtprune_fx.export import (
    EngineSizes,
    Span,
    load,
    manifest,
    tensorrt_library,
    tensorrt_model,
    tensorrt_parse,
    to_onnx,
    to_tensorrt,
    write_onnx,
    write_tensorrt,
    write_triton,
)
from vtprune_fx.export.tensorrt_profile import decode_points
from vtprune_fx.export.to_onnx import example_prompts, export_onnx
from vtprune_fx.export.verify import verify
from vtprune_fx.models.loading import open_checkpoint
from vtprune_fx.recipes.loading import load_recipe
from vtprune_fx.reference.random_llava import CheckpointSpec, build_checkpoint

LAYERS = 2
RECIPE = recipe_for(LAYERS, {0: 5, 1: 3})
SPEC = CheckpointSpec(
    image_size=56, layers=LAYERS, hidden=32, heads=4, intermediate=48, vision_layers=2
)
SIZES = EngineSizes(Span(1, 1, 4), Span(20, 60, 120), Span(1, 1, 2), new_tokens=9)


class Export:
    """The checkpoint, its graphs, and the folder of engines built of them."""

    def __init__(self, root: Path) -> None:
        self.checkpoint = build_checkpoint(root / "checkpoint", SPEC)
        model, processor = open_checkpoint(self.checkpoint)
        exported = export_onnx(model, example_prompts(processor), RECIPE)
        self.graphs: dict[str, onnx_ir.Model] = {
            name: part.program for name, part in exported[0].components.items()
        }
        self.folder = root / "engines"
        with pytest.MonkeyPatch.context() as patch:
            # Exported once, for all folders and for what stands in for engines here.
            patch.setattr(to_tensorrt, "export_onnx", lambda *_: exported)
            patch.setattr(to_onnx, "export_onnx", lambda *_: exported)
            self.onnx = root / "onnx"
            write_onnx(model, processor, RECIPE, self.onnx)
            self.report = write_tensorrt(
                model, processor, RECIPE, self.folder, SIZES, "8.9"
            )


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Export:
    return Export(tmp_path_factory.mktemp("tensorrt"))


# ------------------------------------------------------------------ what is built


def test_two_engines_are_built_and_hashed(export: Export) -> None:
    contents = manifest.read(export.folder)
    assert contents.target == "tensorrt"
    assert contents.recipe == RECIPE
    assert contents.packages.keys() >= {"torch", tensorrt_library.library().__name__}
    for name in ("prefill", "decode"):
        file = export.folder / f"{name}.engine"
        assert file.read_bytes() == export.report.engines[name].plan
        assert file.name in contents.files
    assert not list(export.folder.glob("*.onnx*"))


def test_prefill_is_built_for_every_prompt_asked_for(export: Export) -> None:
    built = export.report.engines["prefill"]
    prompts = [(1, 20), (1, 60), (4, 120)]
    assert built.inputs == {
        "input_ids": prompts,
        "attention_mask": prompts,
        "position_ids": prompts,
        # As many images as prompts, twice as many at most.
        "pixel_values": [(n, 3, 56, 56) for n in (1, 1, 8)],
    }
    # Layer 0 is cached whole; 5 tokens leave in it, 3 more in layer 1.
    for layer, gone in ((0, 0), (1, 5)):
        for kind in ("keys", "values"):
            assert built.outputs[f"past_key_values.layers.{layer}.{kind}"] == [
                (n, 4, length - gone, 8) for n, length in prompts
            ]
    logits = built.outputs["logits"]
    assert [shape[:2] for shape in logits] == [(1, 12), (1, 52), (4, 112)]


def test_decode_has_a_range_for_each_layers_cache(export: Export) -> None:
    inputs = export.report.engines["decode"].inputs
    # 8 steps follow the first of 9 new tokens, 4 of them in the middle of an answer.
    assert inputs["attention_mask"] == [(1, 1), (1, 65), (4, 129)]
    for layer, gone in ((0, 0), (1, 5)):
        assert inputs[f"input.past_key_values.layers.{layer}.keys"] == [
            (1, 4, 0, 8),
            (1, 4, 60 - gone + 4, 8),
            (4, 4, 120 - gone + 8, 8),
        ]


def test_decode_may_take_any_number_of_new_tokens() -> None:
    def given(name: str, *sizes: str) -> onnx_ir.Value:
        return onnx_ir.Value(name=name, shape=onnx_ir.Shape(sizes))

    ids = given("input_ids", "batch", "new")
    mask = given("attention_mask", "batch", "seen")
    graph = onnx_ir.Graph([ids, mask], [], nodes=[])
    points = decode_points(graph, SIZES, {})
    # A prompt of text alone is at most as long as any other.
    assert [point["new"] for point in points] == [1, 1, 120]
    assert [point["seen"] for point in points] == [1, 65, 129]


def test_the_report_tells_sizes_times_and_profiles(export: Export) -> None:
    text = str(export.report)
    assert "prefill: " in text
    assert "MiB, built in " in text
    assert "pixel_values  1x3x56x56 : 1x3x56x56 : 8x3x56x56" in text


def test_a_network_with_other_sizes_than_its_graph_is_refused(export: Export) -> None:
    built = export.report.engines["decode"]
    builder = tensorrt_library.library().Builder(tensorrt_library.log())
    parsed = tensorrt_parse.parse(builder, export.graphs["decode"], "decode")
    to_tensorrt.check_shapes("decode", parsed.network, built.inputs, built.outputs)
    name = "output.past_key_values.layers.1.keys"
    # 120 - 5 of a prompt and 8 that were generated, with 120 more: 243.
    wrong = [*built.outputs[name][:2], (4, 4, 244, 8)]
    with pytest.raises(ExportError, match=r"layers.1.keys.*244.*243.*in the network"):
        to_tensorrt.check_shapes(
            "decode", parsed.network, built.inputs, built.outputs | {name: wrong}
        )


@pytest.mark.slow
def test_bfloat16_engines_have_bfloat16_caches() -> None:
    model = copy.deepcopy(tiny_llava(layers=LAYERS)).bfloat16()
    inputs = batch(model, (5, 9), (2, 4))
    inputs["pixel_values"] = inputs["pixel_values"].bfloat16()
    exported, _ = export_onnx(model, inputs, RECIPE)
    graphs = [part.program.graph for part in exported.components.values()]
    to_tensorrt.build_engines(exported, SIZES)
    kinds = {v.name: v.dtype for graph in graphs for v in graph.outputs}
    assert set(kinds.values()) == {onnx_ir.DataType.BFLOAT16}


@pytest.mark.slow
def test_two_layers_at_7b_width_build_in_a_minute(
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = LlamaConfig(
        hidden_size=4096,
        intermediate_size=11008,
        num_attention_heads=32,
        num_hidden_layers=2,
        vocab_size=32064,
    )
    vision = CLIPVisionConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, image_size=336,
        patch_size=14, num_attention_heads=4,
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=IMAGE
    )
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float16)
    model.train(mode=False)
    inputs = batch(model, (5, 20), (5, 20))
    inputs["pixel_values"] = inputs["pixel_values"].half()
    recipe = recipe_for(2, {0: 200, 1: 150}, visual_tokens=576)
    exported, report = export_onnx(model, inputs, recipe)
    del model
    sizes = EngineSizes(Span(1, 1, 4), Span(600, 700, 1024), new_tokens=512)
    # Of all cores together: what they take alone on a machine is less.
    start = time.process_time()
    engines = to_tensorrt.build_engines(exported, sizes, "8.9")
    seconds = time.process_time() - start
    with capsys.disabled():
        typer.echo(to_tensorrt.EngineReport(report, engines))
    assert seconds < 60
    # Two layers of 4 x 4096^2 + 3 x 4096 x 11008, two tables of 32064 x 4096, fp16.
    weights = 2 * (2 * (4 * 4096**2 + 3 * 4096 * 11008) + 2 * 32064 * 4096)
    assert all(len(built.plan) > 0.99 * weights for built in engines.values())
    cached = engines["decode"].inputs["input.past_key_values.layers.1.keys"]
    assert cached == [(1, 32, 0, 128), (1, 32, 755, 128), (4, 32, 1335, 128)]


# ---------------------------------------------------------------------- preflight


class Sparse(nn.Module):
    """A layer of a user's that looks for what is not zero."""

    def forward(self, values: Tensor) -> Tensor:
        return values + torch.nonzero(values > 0).shape[0]


class Users(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 4), Sparse(), nn.ReLU(), Sparse()])

    def forward(self, values: Tensor) -> Tensor:
        for layer in self.layers:
            values = layer(values)
        return values


def test_preflight_names_every_refused_node_with_its_layer() -> None:
    program = torch.onnx.export(
        Users().train(mode=False),
        (torch.ones(3, 4),),
        dynamo=True,
        opset_version=20,
        verbose=False,
    )
    assert program is not None
    builder = tensorrt_library.library().Builder(tensorrt_library.log())
    with pytest.raises(ExportError, match=r"graph users: .* 2 that its parser") as info:
        tensorrt_parse.parse(builder, program.model, "users")
    line = Sparse.forward.__code__.co_firstlineno + 1
    for layer in ("layers.1", "layers.3"):
        assert f"in module {layer}, {__file__}:{line}:" in str(info.value)
    assert "NonZero" in str(info.value)


@pytest.mark.slow
def test_a_users_layer_in_the_decoder_is_named() -> None:
    model = tiny_llava(layers=LAYERS)
    layers = model.model.language_model.layers
    plain = layers[1].mlp
    layers[1].mlp = nn.Sequential(plain, Sparse())
    try:
        exported, _ = export_onnx(model, batch(model, (5, 9), (2, 4)), RECIPE)
    finally:
        layers[1].mlp = plain
    with pytest.raises(ExportError, match=r"NonZero.*layers\.1\.mlp\.1"):
        to_tensorrt.build_engines(exported, SIZES)


# -------------------------------------------------------------------- the runtime


class Loaded:
    """The folder's model, ONNX Runtime standing in for the engines."""

    def __init__(self, export: Export, monkeypatch: pytest.MonkeyPatch) -> None:
        built = export.report.engines
        self.engines = {
            name: OrtEngine(graph, built[name].inputs)
            for name, graph in export.graphs.items()
        }

        def of(plan: Any, device: torch.device) -> OrtEngine:
            [name] = [name for name in built if built[name].plan == plan[:]]
            return self.engines[name]

        monkeypatch.setattr(tensorrt_model, "_deserialized", of)
        monkeypatch.setattr(tensorrt_model, "_check_device", lambda device: None)
        self.model: Any = load(export.folder, device="cpu")


@pytest.fixture
def loaded(export: Export, monkeypatch: pytest.MonkeyPatch) -> Loaded:
    return Loaded(export, monkeypatch)


def test_generate_gives_the_oracles_tokens_for_a_padded_batch(
    export: Export, loaded: Loaded
) -> None:
    inputs = prompts(export, "What is it?", "How many cups are on the table?")
    ids = loaded.model.generate(**inputs, max_new_tokens=6, do_sample=False)
    assert_the_oracles_tokens(export, inputs, ids)
    assert {name: engine.runs for name, engine in loaded.engines.items()} == {
        "prefill": 1,
        "decode": 5,
    }


def prompts(export: Export, *texts: str) -> dict[str, Tensor]:
    processor: Any = open_checkpoint(export.checkpoint)[1]
    photos = [sample_photo().rotate(90 * i) for i in range(len(texts))]
    questions = [f"USER: <image>\n{text} ASSISTANT:" for text in texts]
    return dict(
        processor(images=photos, text=questions, padding=True, return_tensors="pt")
    )


def assert_the_oracles_tokens(
    export: Export, inputs: dict[str, Tensor], ids: Tensor, new: int = 6
) -> None:
    model, _ = open_checkpoint(export.checkpoint)
    assert isinstance(model, LlavaForConditionalGeneration)
    samples = oracle.split_batch(
        model, **inputs, position_ids=counted_positions(inputs)
    )
    for row, sample in enumerate(samples):
        assert ids[row, -new:].tolist() == oracle.generate(model, RECIPE, sample, new)


def test_a_prompt_of_text_alone_starts_from_an_empty_cache(
    export: Export, loaded: Loaded
) -> None:
    ids = torch.tensor([[1, 40, 41, 42, 43, 44]])
    model: Any = open_checkpoint(export.checkpoint)[0]
    expected = model.generate(input_ids=ids, max_new_tokens=5, do_sample=False)
    found = loaded.model.generate(input_ids=ids, max_new_tokens=5, do_sample=False)
    assert found.tolist() == expected.tolist()


def test_what_an_engine_was_not_built_for_is_refused(
    export: Export, loaded: Loaded
) -> None:
    inputs = prompts(export, *["What is it?"] * 5)
    with pytest.raises(InputError, match=r"from \(1, 20\) to \(4, 120\).*found \(5, "):
        loaded.model.generate(**inputs, max_new_tokens=1)
    assert loaded.engines["prefill"].runs == 0


def test_an_input_that_is_missing_is_named(loaded: Loaded) -> None:
    runner = loaded.model._prefill_graph
    with pytest.raises(InputError, match="found no pixel_values"):
        runner(**dict.fromkeys(["input_ids", "attention_mask", "position_ids"], ONES))


ONES = torch.ones(1, 30, dtype=torch.long)


def test_an_engine_is_read_from_its_file(export: Export) -> None:
    plan = tensorrt_model.TensorRTFormat.load_program(export.folder / "decode.engine")
    assert plan[:] == export.report.engines["decode"].plan
    if torch.cuda.is_available():
        return
    # Taken as it is: what fails is CUDA.
    log = tensorrt_library.log()
    runtime = tensorrt_library.library().Runtime(log)
    log.errors.clear()
    assert runtime.deserialize_cuda_engine(plan) is None
    assert "Cuda" in log.errors[0]


def test_without_a_gpu_loading_says_so(export: Export) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(ExportError, match=r"device cuda.*no CUDA device that works"):
        load(export.folder)
    with pytest.raises(ExportError, match=r"device cpu.*found another kind"):
        load(export.folder, device="cpu")


def test_engines_are_not_verified_and_the_error_says_what_is(export: Export) -> None:
    with pytest.raises(
        ExportError, match=r"found target 'tensorrt'.*vtprune export onnx"
    ):
        verify(export.folder)


def test_engines_of_the_other_tensorrt_are_refused(
    export: Export, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensorrt_model, "version", lambda: {"another": "1"})
    with pytest.raises(ExportError, match="engines of another TensorRT"):
        load(export.folder)


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available(), reason="engines run on a CUDA device alone"
)
def test_engines_answer_as_the_oracle(export: Export, tmp_path: Path) -> None:
    # Built again, for the GPU of this machine.
    model, processor = open_checkpoint(export.checkpoint)
    write_tensorrt(model, processor, RECIPE, tmp_path / "engines", SIZES)
    inputs = prompts(export, "What is it?", "How many cups are on the table?")
    engines: Any = load(tmp_path / "engines")
    on_gpu = {name: value.cuda() for name, value in inputs.items()}
    ids = engines.generate(**on_gpu, max_new_tokens=6, do_sample=False)
    assert_the_oracles_tokens(export, inputs, ids.cpu())


# ------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("text", "span"), [("1:1:4", (1, 1, 4)), ("7", (7, 7, 7)), ("2:2:2", (2, 2, 2))]
)
def test_a_span_is_read(text: str, span: tuple[int, int, int]) -> None:
    assert Span.parse(text, "--batch") == span


@pytest.mark.parametrize("text", ["", "0", "1:2", "4:2:1", "1:1:4:5", "a", "-1:1:1"])
def test_a_span_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="--batch: expected smallest:usual:largest"):
        Span.parse(text, "--batch")


def test_prompts_that_cannot_be_sorted_are_refused() -> None:
    EngineSizes(prompt=Span(600, 700, 3840))
    with pytest.raises(InputError, match="at most 3840 tokens"):
        EngineSizes(prompt=Span(600, 700, 3841))
    # Filled in, the largest prompt is 448 longer than its visual tokens.
    with pytest.raises(InputError, match="at most 3840 tokens"):
        EngineSizes().for_prompts(visual_tokens=3393, dropped=5)
    assert EngineSizes().for_prompts(576, 460).prompt == (592, 704, 1024)


def test_prompts_of_which_nothing_is_left_are_refused() -> None:
    with pytest.raises(InputError, match=r"more than 460 tokens, .*found 460"):
        EngineSizes(prompt=Span(460, 500, 600)).for_prompts(576, 460)


def test_a_gpu_that_is_not_built_for_is_refused() -> None:
    if tensorrt_library.library().__name__ != "tensorrt_rtx":
        pytest.skip("full TensorRT builds for the GPU at hand")
    assert tensorrt_library.compute_capability(None) is None
    ada = tensorrt_library.compute_capability("8.9")
    assert ada is not None
    assert ada.name == "SM89"
    with pytest.raises(InputError, match=r"one of 7\.5, 8\.0, .*found 7\.0"):
        tensorrt_library.compute_capability("7.0")


def test_without_tensorrt_the_error_names_both_install_lines(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def missing(name: str) -> object:
        raise ImportError(name)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(
        MissingDependencyError,
        match=r"vtprune-fx\[tensorrt\].*vtprune-fx\[tensorrt-rtx\]",
    ):
        tensorrt_library.library.__wrapped__()


def test_counts_that_depend_on_the_prompt_are_refused(tmp_path: Path) -> None:
    by_rank = load_recipe("sparsevlm-rank-llava-1.5-7b-64")
    nothing: Any = None  # refused ahead of the model
    with pytest.raises(ExportError, match="found numbers that depend on the prompt"):
        write_tensorrt(nothing, nothing, by_rank, tmp_path / "engines", SIZES)


def test_encoders_that_are_told_sizes_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Qwen2-VL's are told grids: how many features they give depends on values."""
    model = zoo.shared("Qwen2-VL")
    inputs = zoo.batch("Qwen2-VL", model, (3, "image", 4), (2, "image", 6))
    processor: Any = None  # its prompts are drawn
    monkeypatch.setattr(to_tensorrt, "example_prompts", lambda _: inputs)
    message = "encoders that see pixels alone.*found encoders that take image sizes"
    with pytest.raises(ExportError, match=message):
        write_tensorrt(model, processor, None, tmp_path / "engines", SIZES)
    with pytest.raises(ExportError, match=message):
        write_onnx(model, processor, None, tmp_path / "onnx", inputs)
    assert not list(tmp_path.iterdir())


@pytest.fixture
def engines(export: Export, tmp_path: Path) -> Path:
    """A copy of a good export, to damage."""
    return shutil.copytree(export.folder, tmp_path / "engines")


@pytest.mark.parametrize("name", ["config.json", "processor_config.json"])
def test_a_name_of_code_beside_engines_is_refused(engines: Path, name: str) -> None:
    edit_json(engines / name, auto_map={"AutoConfig": "own.C"})
    trust_again(engines)
    with pytest.raises(ExportError, match=rf"no code, found auto_map in {name}"):
        load(engines)


def test_code_beside_engines_is_refused(engines: Path) -> None:
    (engines / "own.py").write_text("class C: pass\n")
    trust_again(engines)
    with pytest.raises(ExportError, match=r"no code, found own\.py"):
        load(engines)


def test_engines_in_another_format_are_refused(engines: Path) -> None:
    # Whose files are read in other ways.
    edit_json(engines / "export.json", export_format="dynamo")
    trust_again(engines)
    with pytest.raises(ExportError, match=r"found .*dynamo"):
        load(engines)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (["--batch", "4:1:1"], "--batch"),
        (["--prompt", "600:700:4000"], "at most 3840 tokens"),
        (["--compute-capability", "1.0"], "--compute-capability"),
    ],
)
def test_the_command_refuses_ahead_of_opening_the_model(
    option: list[str], message: str, tmp_path: Path
) -> None:
    output = tmp_path / "engines"
    arguments = ["export", "tensorrt", "no-such-model", "--output", str(output)]
    result = CliRunner().invoke(app, [*arguments, *option])
    assert isinstance(result.exception, InputError | ExportError)
    assert message in str(result.exception)
    assert not output.exists()


# ------------------------------------------------------------------------- Triton


def schema() -> Any:
    """The class of Triton's own model configurations.

    From its client library, whose other modules want packages that are not here.
    """
    client = importlib.metadata.distribution("tritonclient")
    file = Path(str(client.locate_file("tritonclient/grpc/model_config_pb2.py")))
    spec = importlib.util.spec_from_file_location("model_config_pb2", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.ModelConfig


def configurations(models: list[Path]) -> dict[str, Any]:
    """Every ``config.pbtxt``, parsed with Triton's schema, by the graph's name."""
    found = {}
    for model in models:
        text = (model / "config.pbtxt").read_text()
        found[model.name.rpartition("_")[2]] = text_format.Parse(text, schema()())
    return found


TRITON_TYPES = {"tensor(int64)": 9, "tensor(float)": 11}
"""ONNX Runtime's names of types, and their numbers in Triton's ``DataType``."""


def dims_of(value: Any) -> list[int]:
    return [size if isinstance(size, int) else -1 for size in value.shape]


@pytest.mark.parametrize("max_batch", [0, 4])
def test_triton_is_told_what_onnx_runtime_takes(
    export: Export, tmp_path: Path, max_batch: int
) -> None:
    models = write_triton(export.onnx, tmp_path / "repository", max_batch)
    assert sorted(models) == sorted((tmp_path / "repository").iterdir())
    for part, config in configurations(models).items():
        folder = tmp_path / "repository" / f"onnx_{part}"
        joined = max_batch if part == "prefill" else 0
        assert (config.name, config.backend) == (folder.name, "onnxruntime")
        assert config.max_batch_size == joined
        assert config.HasField("dynamic_batching") == bool(joined)
        file = folder / "1" / config.default_model_filename
        session = onnxruntime.InferenceSession(file)
        for told, taken in (
            (config.input, session.get_inputs()),
            (config.output, session.get_outputs()),
        ):
            # Without a batch ahead of them, joined inputs have one row a request.
            expected = {
                value.name: (TRITON_TYPES[value.type], dims_of(value)[bool(joined) :])
                for value in taken
                if not (joined and value.name == "image_hidden_states")
            }
            found = {t.name: (t.data_type, list(t.dims)) for t in told}
            assert found == expected


def test_triton_is_told_what_engines_take(export: Export, tmp_path: Path) -> None:
    folder = as_of_full_tensorrt(export, tmp_path / "engines")
    models = write_triton(folder, tmp_path / "repository", 4)
    config = configurations(models)["prefill"]
    assert (config.backend, config.max_batch_size) == ("tensorrt", 4)
    assert {t.name: (t.data_type, list(t.dims)) for t in config.input} == {
        "input_ids": (9, [-1]),
        "attention_mask": (9, [-1]),
        "position_ids": (9, [-1]),
        "pixel_values": (11, [3, 56, 56]),
    }
    vocabulary = AutoConfig.from_pretrained(folder).text_config.vocab_size
    [logits] = [t for t in config.output if t.name == "logits"]
    assert list(logits.dims) == [-1, vocabulary]
    linked = models[0] / "1" / "prefill.engine"
    assert linked.samefile(folder / "prefill.engine")


def as_of_full_tensorrt(export: Export, folder: Path) -> Path:
    shutil.copytree(export.folder, folder)
    contents = manifest.read(folder)
    packages = contents.packages | {"tensorrt": "11.0"}
    contents.model_copy(update={"packages": packages}).write(folder)
    return folder


def test_triton_gets_no_graph_that_lies_elsewhere(
    export: Export, tmp_path: Path
) -> None:
    folder = shutil.copytree(export.onnx, tmp_path / "onnx")
    fields = json.loads((folder / "export.json").read_text())
    parts = fields["components"]
    parts["../../prefill"] = parts.pop("prefill")
    (folder / "export.json").write_text(json.dumps(fields))
    trust_again(folder)
    with pytest.raises(ExportError, match=r"found .*\.\./\.\./prefill"):
        write_triton(folder, tmp_path / "repository" / "models", 4)
    assert not (tmp_path / "repository").exists()


def test_triton_does_not_join_more_than_engines_take(
    export: Export, tmp_path: Path
) -> None:
    folder = as_of_full_tensorrt(export, tmp_path / "engines")
    with pytest.raises(InputError, match=r"--max-batch: expected at most 4.*found 5"):
        write_triton(folder, tmp_path / "repository", 5)


def test_triton_reads_no_engines_of_tensorrt_for_rtx(
    export: Export, tmp_path: Path
) -> None:
    with pytest.raises(ExportError, match="found engines of TensorRT for RTX"):
        write_triton(export.folder, tmp_path / "repository", 4)


def test_a_model_in_the_repository_is_left_alone(
    export: Export, tmp_path: Path
) -> None:
    taken = tmp_path / "onnx_decode"
    taken.mkdir()
    with pytest.raises(InputError, match=r"onnx_decode: .* one that exists already"):
        write_triton(export.onnx, tmp_path, 4)
    assert list(tmp_path.rglob("*")) == [taken]
