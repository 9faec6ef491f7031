"""Building the demo checkpoint, and opening checkpoints and images."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import warnings
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from PIL import Image
from transformers import AutoConfig, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from vtprune_fx.errors import InputError
from vtprune_fx.models.loading import (
    load_model,
    load_processor,
    open_checkpoint,
    quiet,
)
from vtprune_fx.models.pictures import open_image
from vtprune_fx.reference.random_llava import (
    CHAT_TEMPLATE,
    RECORD,
    CheckpointSpec,
    build_checkpoint,
)
from vtprune_fx.reference.tokenizer import IMAGE_ID, PAD_ID, SPECIAL_TOKENS

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

TINY = CheckpointSpec(
    image_size=56,
    layers=4,
    hidden=32,
    heads=4,
    intermediate=48,
    vision_hidden=16,
    vision_layers=2,
    vision_heads=2,
)
PROMPT = "USER: <image>\nWhat is in this picture? ASSISTANT:"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_checkpoint(tmp_path_factory.mktemp("built") / "tiny", TINY)


@pytest.fixture(scope="module")
def opened(folder: Path) -> tuple[Any, Any]:
    return open_checkpoint(str(folder))


def _photo(width: int = 90, height: int = 60, seed: int = 0) -> Image.Image:
    generator = torch.Generator().manual_seed(seed)
    levels = torch.randint(
        256, (height, width, 3), generator=generator, dtype=torch.uint8
    )
    return Image.fromarray(levels.numpy())


def _snapshot(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {
        entry.name: (entry.stat().st_mtime_ns, entry.read_bytes())
        for entry in folder.iterdir()
    }


def test_defaults_are_the_geometry_of_llava_1_5() -> None:
    spec = CheckpointSpec()
    assert (spec.grid, spec.visual_tokens, spec.layers) == ((24, 24), 576, 32)


def test_round_trip(folder: Path, opened: tuple[Any, Any]) -> None:
    model, processor = opened
    config = model.config
    assert type(model).__name__ == "LlavaForConditionalGeneration"
    assert not model.training
    assert model.dtype == torch.float32
    assert config.vision_config.image_size == 56
    assert config.vision_feature_layer == -2
    assert config.vision_feature_select_strategy == "default"
    assert config.text_config.num_hidden_layers == 4
    assert config.text_config.vocab_size == len(processor.tokenizer)
    assert config.image_token_id == IMAGE_ID
    assert model.generation_config.pad_token_id == PAD_ID
    assert not model.generation_config.do_sample
    assert not [entry for entry in folder.parent.iterdir() if entry != folder]


def test_opening_it_says_nothing(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        open_checkpoint(str(folder))
    assert capfd.readouterr() == ("", "")


def test_other_dtype(folder: Path) -> None:
    assert load_model(folder, torch.bfloat16).dtype == torch.bfloat16


def test_one_image_becomes_one_id_per_patch(opened: tuple[Any, Any]) -> None:
    model, processor = opened
    batch = processor(images=_photo(), text=PROMPT, return_tensors="pt")
    assert batch["pixel_values"].shape == (1, 3, 56, 56)
    assert int((batch["input_ids"] == IMAGE_ID).sum()) == TINY.visual_tokens == 16
    with torch.no_grad():
        logits = model(**batch).logits
    assert logits.isfinite().all()


def test_default_size_becomes_576_ids(tmp_path: Path) -> None:
    narrow = replace(TINY, image_size=336, layers=1)
    processor: Any = load_processor(build_checkpoint(tmp_path / "big", narrow))
    batch = processor(images=_photo(600, 400), text=PROMPT, return_tensors="pt")
    assert int((batch["input_ids"] == IMAGE_ID).sum()) == 576


def test_two_images_in_one_prompt(opened: tuple[Any, Any]) -> None:
    model, processor = opened
    text = "USER: <image>\n<image>\nWhich picture is older? ASSISTANT:"
    images = [_photo(seed=1), _photo(seed=2)]
    batch = processor(images=images, text=text, return_tensors="pt")
    assert int((batch["input_ids"] == IMAGE_ID).sum()) == 32
    with torch.no_grad():
        assert model(**batch).logits.isfinite().all()


def test_padding_is_on_the_left_and_changes_no_answer(
    opened: tuple[Any, Any],
) -> None:
    model, processor = opened
    texts = [PROMPT, "USER: <image>\nDescribe the image, please, in two or three."]
    images = [_photo(seed=1), _photo(seed=2)]
    batch = processor(images=images, text=texts, padding=True, return_tensors="pt")
    assert batch["attention_mask"][0, 0] == 0
    assert batch["attention_mask"][:, -1].all()
    assert batch["input_ids"][0, 0] == PAD_ID
    together = model.generate(**batch, max_new_tokens=4)[0, -4:]
    alone = processor(images=images[:1], text=texts[:1], return_tensors="pt")
    assert torch.equal(together, model.generate(**alone, max_new_tokens=4)[0, -4:])


def test_chat_template(opened: tuple[Any, Any]) -> None:
    question = {"type": "text", "text": "What is in this picture?"}
    user = {"role": "user", "content": [{"type": "image"}, question]}
    answer = {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]}
    render = opened[1].apply_chat_template
    assert render([user], add_generation_prompt=True) == PROMPT
    assert (
        render([user, answer, {"role": "user", "content": "Is it?"}])
        == "USER: <image>\nWhat is in this picture? ASSISTANT: A cat. USER: Is it? "
    )
    assert opened[1].chat_template == CHAT_TEMPLATE


def test_tokenizer(opened: tuple[Any, Any]) -> None:
    tokenizer = opened[1].tokenizer
    assert tokenizer.convert_ids_to_tokens(range(5)) == list(SPECIAL_TOKENS)
    assert len(tokenizer) <= TINY.vocab_size
    text = "The saucer is dark red, and so on: žluť 猫 🙂\n"
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_generates_words_and_as_many_as_asked(opened: tuple[Any, Any]) -> None:
    model, processor = opened
    batch = processor(images=_photo(), text=PROMPT, return_tensors="pt")
    new = model.generate(**batch, max_new_tokens=12)[0, batch["input_ids"].shape[1] :]
    words = processor.decode(new).split(" ")
    assert words.pop(0) == ""
    assert len(words) == len(new) == 12
    assert all(a != b for a, b in itertools.pairwise(words))


def test_attention_is_not_uniform(opened: tuple[Any, Any]) -> None:
    model, processor = opened
    batch = processor(images=_photo(), text=PROMPT, return_tensors="pt")
    model.set_attn_implementation("eager")
    with torch.no_grad():
        attentions = model(**batch, output_attentions=True).attentions
    model.set_attn_implementation("sdpa")
    visual = batch["input_ids"][0] == IMAGE_ID
    for layer in attentions:  # [1, heads, tokens, tokens]
        rows = layer[0, :, -5:][..., visual].clamp_min(1e-9).log()
        assert 1.0 < rows.std(-1).mean() < 4.0


def test_weights_depend_on_the_seed_alone(tmp_path: Path, folder: Path) -> None:
    torch.manual_seed(7)
    before = torch.get_rng_state()
    build_checkpoint(tmp_path / "again", TINY)
    assert torch.equal(before, torch.get_rng_state())
    build_checkpoint(tmp_path / "other", replace(TINY, seed=1))
    first, again, other = _snapshot(folder), *map(_snapshot, tmp_path.iterdir())
    if again["model.safetensors"][1] != first["model.safetensors"][1]:
        again, other = other, again
    assert {k: v[1] for k, v in first.items()} == {k: v[1] for k, v in again.items()}
    assert other["model.safetensors"][1] != first["model.safetensors"][1]


def test_same_checkpoint_is_reused(folder: Path) -> None:
    before = _snapshot(folder)
    assert build_checkpoint(folder, TINY) == folder
    assert _snapshot(folder) == before


def test_empty_folder_is_filled(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert (build_checkpoint(tmp_path / "empty", TINY) / RECORD).is_file()


def _other_spec(folder: Path) -> None:
    record = json.loads((folder / RECORD).read_text())
    record["spec"]["seed"] = 5
    (folder / RECORD).write_text(json.dumps(record))


@pytest.mark.parametrize(
    ("spoil", "found"),
    [
        (_other_spec, "another size, seed or version"),
        (lambda f: (f / RECORD).unlink(), "other files"),
        (lambda f: (f / RECORD).write_text("{"), "cannot be read"),
        (lambda f: (f / RECORD).write_text("[]"), "cannot be read"),
        (lambda f: (f / "model.safetensors").unlink(), "incomplete"),
        (lambda f: (f / "config.json").write_text("{}"), "incomplete"),
    ],
)
def test_anything_else_is_refused_and_left_alone(
    folder: Path, tmp_path: Path, spoil: Callable[[Path], object], found: str
) -> None:
    spoilt = tmp_path / "spoilt"
    shutil.copytree(folder, spoilt)
    spoil(spoilt)
    before = _snapshot(spoilt)
    with pytest.raises(InputError, match=found) as caught:
        build_checkpoint(spoilt, TINY)
    assert caught.value.where == f"folder {str(spoilt)!r}"
    assert _snapshot(spoilt) == before
    assert list(tmp_path.iterdir()) == [spoilt]


def test_file_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InputError, match="not a folder"):
        build_checkpoint(tmp_path / "file", TINY)
    with pytest.raises(InputError, match="can be written"):
        build_checkpoint(tmp_path / "file" / "inside", TINY)
    assert (tmp_path / "file").read_text() == "mine"


def test_nothing_is_left_of_a_build_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("vtprune_fx.reference.random_llava._processor", fail)
    with pytest.raises(InputError, match="No space left on device"):
        build_checkpoint(tmp_path / "tiny", TINY)
    assert not list(tmp_path.iterdir())


def test_two_builders_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build_checkpoint(tmp_path / "first", TINY)

    def other_is_faster(scratch: Path, _: CheckpointSpec) -> None:
        (scratch / "file").write_text("slow")
        os.replace(tmp_path / "first", tmp_path / "tiny")

    monkeypatch.setattr("vtprune_fx.reference.random_llava._write", other_is_faster)
    assert build_checkpoint(tmp_path / "tiny", TINY) == tmp_path / "tiny"
    assert list(tmp_path.iterdir()) == [tmp_path / "tiny"]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("image_size", 57),
        ("image_size", 0),
        ("patch_size", 0),
        ("hidden", 33),
        ("heads", 32),
        ("layers", 0),
        ("vision_layers", 1),
        ("vocab_size", 100),
    ],
)
def test_impossible_sizes(field: str, value: int) -> None:
    with pytest.raises(InputError, match=r"CheckpointSpec\."):
        replace(TINY, **{field: value})


@pytest.mark.parametrize(
    "name", ["", ".", "./nowhere", "/nowhere", "a/b/c", "~/x", "x/"]
)
def test_no_such_checkpoint(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="expected a checkpoint folder or the id"):
        open_checkpoint(name)


def test_unreachable_hub_id(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError("We couldn't connect.\nMany more lines.")

    monkeypatch.setattr(AutoConfig, "from_pretrained", fail)
    with pytest.raises(InputError, match=r"found OSError: We couldn't connect\. Check"):
        open_checkpoint("owner/name")


@pytest.mark.parametrize(
    ("file", "content", "expected"),
    [
        ("config.json", None, "found a folder without a config.json"),
        ("config.json", b"{", "expected config.json that can be read"),
        ("config.json", b"{}", "expected config.json that can be read"),
        ("model.safetensors", b"nothing", "expected weights that can be read"),
        ("model.safetensors", None, "expected weights that can be read"),
        ("processor_config.json", b"{", "expected a processor's file"),
    ],
)
def test_broken_checkpoint(
    folder: Path, tmp_path: Path, file: str, content: bytes | None, expected: str
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    (broken / file).unlink()
    if content is not None:
        (broken / file).write_bytes(content)
    with pytest.raises(InputError, match=expected):
        open_checkpoint(broken)


def test_model_without_visual_tokens(tmp_path: Path, folder: Path) -> None:
    config = LlamaConfig(
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=300,
    )
    with quiet():
        LlamaForCausalLM(config).save_pretrained(tmp_path)
        AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="expected a vision-language model"):
        open_checkpoint(tmp_path)
    with pytest.raises(InputError, match="processor"):
        load_processor(tmp_path)


def test_open_image(tmp_path: Path) -> None:
    _photo().convert("L").save(tmp_path / "grey.png")
    image = open_image(tmp_path / "grey.png")
    assert (image.mode, image.size) == ("RGB", (90, 60))


def test_open_image_turns_it_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: a quarter turn
    _photo().save(tmp_path / "turned.jpg", exif=exif)
    assert open_image(tmp_path / "turned.jpg").size == (60, 90)


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("text.png", "not a readable image"),
        ("cut.png", "not a readable image"),
        ("none.png", "no such file"),
        ("folder", "a folder"),
    ],
)
def test_no_image(tmp_path: Path, name: str, found: str) -> None:
    (tmp_path / "text.png").write_text("not an image")
    _photo().save(tmp_path / "whole.png")
    half = (tmp_path / "whole.png").read_bytes()[:2000]
    (tmp_path / "cut.png").write_bytes(half)
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError, match=found):
        open_image(tmp_path / name)
