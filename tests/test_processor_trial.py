"""Chat templates and tokenizers made to do harm, tried in a process with limits."""

from __future__ import annotations

import json
import shutil
import time
from typing import TYPE_CHECKING, Any

import pytest

from vtprune_fx.errors import InputError
from vtprune_fx.models import processor_trial
from vtprune_fx.models.loading import load_processor
from vtprune_fx.models.processor_trial import try_processor
from vtprune_fx.models.prompts import prompt_inputs

if TYPE_CHECKING:
    from pathlib import Path

ENDLESS = (
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
)
HUGE = "{{ ('a' * 4000000000) | length }}"
HARMLESS = "{{ messages[0].content[1].text }}"


def write_template(folder: Path, name: str, template: str) -> None:
    """Into one of the files that transformers reads templates of."""
    if name.endswith(".jinja"):
        (folder / name).write_text(template)
    else:
        saved = [{"name": "default", "template": template}]
        (folder / name).write_text(json.dumps({"chat_template": saved}))


@pytest.mark.parametrize(
    "name",
    [
        *("chat_template.jinja", "chat_template.json", "tokenizer_config.json"),
        "processor_config.json",
    ],
)
def test_a_template_that_takes_all_memory_is_refused(tmp_path: Path, name: str) -> None:
    write_template(tmp_path, name, HUGE)
    with pytest.raises(InputError, match="found more memory needed"):
        try_processor(tmp_path)


def test_a_template_without_an_end_is_refused_in_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processor_trial, "SECONDS", 4)
    write_template(tmp_path, "chat_template.jinja", ENDLESS)
    started = time.monotonic()
    with pytest.raises(InputError, match="found no end after 4 s"):
        try_processor(tmp_path)
    assert time.monotonic() - started < 10


@pytest.mark.parametrize("template", [HARMLESS, "{{ 1 / 0 }}", "{% for", "{{ a.b.c }}"])
def test_a_template_that_ends_is_left_to_transformers(
    tmp_path: Path, template: str
) -> None:
    write_template(tmp_path, "chat_template.jinja", template)
    try_processor(tmp_path)


def tokenizer_of(**parts: Any) -> dict[str, Any]:
    """A tokenizer.json of one word."""
    model = {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}
    names = ("truncation", "padding", "normalizer", "pre_tokenizer", "post_processor")
    empty = dict.fromkeys((*names, "decoder"))
    return {"version": "1.0", "added_tokens": [], "model": model, **empty, **parts}


def test_a_tokenizer_that_breaks_its_library_is_refused(tmp_path: Path) -> None:
    """A panic is no Exception: nothing in the process that loads it would catch it."""
    wrong = {"type": "Precompiled", "precompiled_charsmap": "AAAA"}
    saved = json.dumps(tokenizer_of(normalizer=wrong))
    (tmp_path / "tokenizer.json").write_text(saved)
    with pytest.raises(InputError, match="found a tokenizer that breaks its library"):
        try_processor(tmp_path)


def test_a_tokenizer_whose_text_never_ends_is_refused(tmp_path: Path) -> None:
    """Replaced again and again, a question becomes longer than memory."""
    steps = [
        {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 99}
        for _ in range(8)
    ]
    more = {"type": "Sequence", "normalizers": steps}
    saved = json.dumps(tokenizer_of(normalizer=more))
    (tmp_path / "tokenizer.json").write_text(saved)
    with pytest.raises(InputError, match=r"more memory needed|no end after"):
        try_processor(tmp_path)


@pytest.mark.parametrize("saved", ["{}", "[1", json.dumps(tokenizer_of())])
def test_a_tokenizer_that_is_plainly_wrong_or_right_passes(
    tmp_path: Path, saved: str
) -> None:
    (tmp_path / "tokenizer.json").write_text(saved)
    try_processor(tmp_path)


def test_the_processor_of_a_folder_is_tried_before_it_is_loaded(
    onnx_folder: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(onnx_folder, folder)
    write_template(folder, "chat_template.jinja", HUGE)
    with pytest.raises(InputError, match="chat template and tokenizer") as refused:
        load_processor(folder)
    assert str(folder) in str(refused.value)


@pytest.mark.parametrize("template", ["{{ 1 / 0 }}", "{% for", "{{ a.b.c }}"])
def test_a_template_that_fails_is_an_error_of_ours(
    onnx_folder: Path, template: str
) -> None:
    processor = load_processor(onnx_folder)
    processor.chat_template = template
    with pytest.raises(InputError, match="chat template of the processor"):
        prompt_inputs(processor, "What is this?", None)
    processor.chat_template = None  # the refusal's advice
    assert "input_ids" in prompt_inputs(processor, "What is this?", None)
