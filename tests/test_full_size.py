"""Models of full size without weights: ``vtprune explain --config``."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

from vtprune_fx import cli
from vtprune_fx.cli.full_size import explain_config
from vtprune_fx.errors import InputError, PlanError
from vtprune_fx.models.weightless import (
    build,
    example_prompts,
    load_config,
)
from vtprune_fx.recipes.counting import Geometry, cost
from vtprune_fx.recipes.loading import load_recipe

if TYPE_CHECKING:
    from pathlib import Path

RECIPE = "fitprune-llava-1.5-7b-60"
CODE = "import sys; from vtprune_fx.cli import main; sys.argv[0] = 'vtprune'; main()"

# Billions of weights, as the models' cards on the hub say.
WEIGHTS = {
    "llava-1.5-7b": 7.06,
    "llava-1.5-13b": 13.4,
    "llava-next-34b": 34.8,
    "qwen2-vl-72b": 73.4,
}

# Visual tokens of one image. LLaVA-NeXT at 672 x 672: 24 x 24 of the whole image, and
# 48 rows of 48 with an end each. Qwen2-VL at 1008 x 1008: one for 28 x 28 pixels.
VISUAL = {
    "llava-1.5-7b": 576,
    "llava-1.5-13b": 576,
    "llava-next-34b": 576 + 48 * 49,
    "qwen2-vl-72b": 36 * 36,
}


def shrunk(name: str, folder: Path) -> str:
    """A shipped configuration, made narrow and shallow."""
    config = load_config(name).to_dict()
    text, vision = config["text_config"], config["vision_config"]
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
    text |= sizes | {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    text.pop("layer_types", None)
    if name == "qwen2-vl-72b":
        text["rope_parameters"]["mrope_section"] = [1, 1, 2]
        vision["hidden_size"] = 32
    else:
        vision |= sizes | {"num_attention_heads": 2, "image_size": 56}
    file = folder / "config.json"
    file.write_text(json.dumps(config), encoding="utf-8")
    return str(file)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> str:
    """LLaVA-1.5-7B's configuration, shrunk: 16 visual tokens."""
    return shrunk("llava-1.5-7b", tmp_path_factory.mktemp("config"))


@pytest.mark.compat
@pytest.mark.parametrize(
    ("name", "positions"),
    [
        ("llava-next-34b", ("batch", "prompt")),
        ("qwen2-vl-72b", ("3", "batch", "prompt")),
    ],
)
def test_graphs_of_models_that_are_told_sizes_start_with_features(
    name: str, positions: tuple[str, ...], tmp_path: Path
) -> None:
    found = explain_config(shrunk(name, tmp_path), None, 32, text_tokens=4)
    assert found.plan.visual_tokens == 32
    assert {port.name: port.shape for port in found.interface.inputs} == {
        "input_ids": ("batch", "prompt"),
        "attention_mask": ("batch", "prompt"),
        "position_ids": positions,
        "mm_encoder_outputs.image.pooler_output.0": ("features", "32"),
    }


@pytest.mark.parametrize("name", sorted(WEIGHTS))
def test_shipped_configurations_are_of_the_published_size(name: str) -> None:
    model = build(load_config(name))
    numbers = sum(weight.numel() for weight in model.parameters())
    assert f"{numbers / 1e9:.3g}" == str(WEIGHTS[name])
    assert {weight.device.type for weight in model.parameters()} == {"meta"}
    prompt = example_prompts(model, None, text_tokens=75)
    assert prompt["input_ids"].shape == (2, VISUAL[name] + 75)


def test_a_prompt_of_several_images(small: str) -> None:
    """Three images of 4 x 4 patches in each of two prompts."""
    prompt = example_prompts(build(load_config(small)), 48, text_tokens=2)
    assert prompt["input_ids"].shape == (2, 50)
    assert prompt["pixel_values"].shape == (6, 3, 56, 56)


def test_a_default_recipe_is_stretched_to_the_depth(small: str) -> None:
    found = explain_config(small, None, None, text_tokens=5)
    assert (found.plan.layers, found.plan.visual_tokens) == (3, 16)
    decoder = Geometry.from_config(load_config(small))
    assert found.cost == cost(found.plan.recipe, decoder, 16, 5)
    # 576 tokens take 14, 33 and 89 leaves in the first layers of 32; of 3 layers the
    # first stands for 32 / 3 of them, and 449 of 576 leave in all.
    assert found.plan.recipe.drops(16)[0] > 0
    assert found.plan.dropped <= 449 * 16 // 576


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ((RECIPE, None, 75), PlanError, "expected 3, the layers of"),
        ((None, 20, 75), InputError, "what images of this model take, such as 16"),
        ((None, None, 0), InputError, "number of text tokens: expected 1 or more"),
    ],
)
def test_what_does_not_fit_is_refused_before_tracing(
    small: str, arguments: Any, error: type[Exception], says: str
) -> None:
    recipe, visual_tokens, text_tokens = arguments
    loaded = load_recipe(recipe) if recipe else None
    with pytest.raises(error, match=says):
        explain_config(small, loaded, visual_tokens, text_tokens)


def test_models_without_pictures_of_known_size_are_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}', encoding="utf-8")
    with pytest.raises(InputError, match="config of type 'llama': expected one of"):
        build(load_config(tmp_path))


@pytest.mark.compat
def test_the_command_prints_tables_of_80_columns(
    small: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(sys, "argv", ["vtprune", "explain", "--config", small])
    with pytest.raises(SystemExit, match="0"):
        cli.main()
    out, err = capsys.readouterr()
    assert max(map(len, out.splitlines())) <= 80
    assert "TMACs, all tokens" in out
    assert "[batch, 2, as above, 8]" in out
    assert err == ""


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(WEIGHTS))
def test_full_size_in_two_minutes_and_4_gib(name: str) -> None:
    """Processor time is measured, so that a busy machine does not fail it."""
    recipe = ["--recipe", RECIPE] if name == "llava-1.5-7b" else []
    command = [sys.executable, "-c", CODE, "explain", "--config", name, "--json"]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([*command, *recipe], capture_output=True, check=True)
    found = json.loads(done.stdout)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 120
    assert after.ru_maxrss < 4 * 2**20, "KiB"
    assert found["visual_tokens"] == VISUAL[name]
    assert found["weights"] > WEIGHTS[name] * 0.99e9
