"""What is said where a package that a family's processor needs does not load."""

from __future__ import annotations

import json
import shutil
import sys
from typing import TYPE_CHECKING

import pytest
from transformers import AutoProcessor
from transformers.utils import import_utils

import vtprune_fx
from vtprune_fx import cli
from vtprune_fx.cli import entry
from vtprune_fx.errors import InputError, MissingDependencyError, first_sentence
from vtprune_fx.models.loading import load_processor
from vtprune_fx.reference import CHECKPOINT

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

EXTRA = 'pip install "vtprune-fx[families]"'


class _VideoProcessor:
    """Stands for one of transformers in the messages that are made of its name."""


def _no_backend(name: str) -> None:
    """Raise what transformers raises where a package that a class needs is missing."""
    import_utils.requires_backends(_VideoProcessor, [name])


def _no_num2words() -> None:
    raise ImportError(  # as the constructor of SmolVLM's processor
        "Package `num2words` is required to run SmolVLM processor. Install it with "
        "`pip install num2words`."
    )


def _no_video_class() -> None:
    raise ValueError(  # as AutoVideoProcessor, for a folder that names no class
        "/models/qwen requires `torchvision` to be installed. Please install "
        "`torchvision` and try again."
    )


def _other_build() -> None:
    """As transformers' lazy imports, with a torchvision for another torch."""
    raise ModuleNotFoundError(
        "Could not import module 'PreTrainedModel'. Are this object's requirements "
        "defined correctly? Set the logging verbosity to DEBUG."
    ) from RuntimeError("operator torchvision::nms does not exist")


@pytest.fixture(autouse=True)
def _no_package(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither package can be imported, wherever the test runs."""
    for name in ("torchvision", "num2words"):
        monkeypatch.setitem(sys.modules, name, None)
    _, message = import_utils.BACKENDS_MAPPING["torchvision"]
    missing = (lambda: False, message)
    monkeypatch.setitem(import_utils.BACKENDS_MAPPING, "torchvision", missing)


def _opening(monkeypatch: pytest.MonkeyPatch, fails: Callable[[], None]) -> str:
    """What is said of a processor that cannot be opened for want of a package."""
    monkeypatch.setattr(AutoProcessor, "from_pretrained", lambda *_, **__: fails())
    with pytest.raises(MissingDependencyError) as caught:
        load_processor(CHECKPOINT)
    assert caught.value.where == f"model '{CHECKPOINT}'"
    return str(caught.value)


@pytest.mark.parametrize(
    ("fails", "found"),
    [
        (
            lambda: _no_backend("torchvision"),
            (
                "_VideoProcessor requires the Torchvision library but it was not found "
                "in your environment"
            ),
        ),
        (_no_video_class, "/models/qwen requires `torchvision` to be installed"),
        (_other_build, "operator torchvision::nms does not exist"),
        (_no_num2words, "Package `num2words` is required to run SmolVLM processor"),
    ],
)
def test_the_package_is_named_in_a_sentence_that_ends(
    monkeypatch: pytest.MonkeyPatch, fails: Callable[[], None], found: str
) -> None:
    said = _opening(monkeypatch, fails)
    package = "num2words" if "num2words" in found else "torchvision"
    assert f"expected the package {package} for a processor, found " in said
    assert f"Error: {found}. Run `{EXTRA}`." in said
    assert ("CPU build of torch" in said) == (package == "torchvision")
    assert "save_pretrained" not in said


def test_packages_of_no_extra_of_ours_are_named_by_the_library(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    missing = (lambda: False, import_utils.SENTENCEPIECE_IMPORT_ERROR)
    monkeypatch.setitem(import_utils.BACKENDS_MAPPING, "sentencepiece", missing)
    said = _opening(monkeypatch, lambda: _no_backend("sentencepiece"))
    assert "_VideoProcessor requires the SentencePiece library but" in said
    assert EXTRA not in said
    assert "save_pretrained" not in said


def test_a_package_that_loads_is_not_to_blame(monkeypatch: pytest.MonkeyPatch) -> None:
    """The message names it, but it is there: the folder is."""
    monkeypatch.setitem(sys.modules, "torchvision", sys)  # any module
    monkeypatch.setattr(
        AutoProcessor, "from_pretrained", lambda *_, **__: _no_video_class()
    )
    with pytest.raises(InputError, match="save_pretrained"):
        load_processor(CHECKPOINT)


def test_a_folder_of_such_a_family_names_the_package(tmp_path: Path) -> None:
    """As transformers itself fails, where torchvision is really missing."""
    if import_utils.is_torchvision_available():
        pytest.skip("torchvision is installed")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(CHECKPOINT / name, tmp_path / name)
    parts = {
        "config.json": {"model_type": "qwen2_vl"},
        "preprocessor_config.json": {
            "processor_class": "Qwen2VLProcessor",
            "image_processor_type": "Qwen2VLImageProcessor",
        },
    }
    for name, fields in parts.items():
        (tmp_path / name).write_text(json.dumps(fields), encoding="utf-8")
    with pytest.raises(MissingDependencyError, match=r"torchvision for a processor"):
        load_processor(tmp_path)


def test_a_build_for_another_torch_is_named_when_a_name_is_first_used(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It keeps transformers from being imported, so nothing was opened yet."""
    monkeypatch.setattr("importlib.import_module", lambda _: _other_build())
    with pytest.raises(MissingDependencyError, match="for the installed torch"):
        vtprune_fx.compile  # noqa: B018 # looking it up is what is tested


def test_the_command_line_names_it_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(entry, "app", lambda **_: _other_build())
    with pytest.raises(SystemExit, match="1"):
        cli.main()
    assert (
        "expected the package torchvision for the installed torch"
        in capsys.readouterr().err
    )


def test_other_failures_to_import_keep_their_traceback(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(entry, "app", lambda **_: _no_backend("jieba"))
    missing = (lambda: False, "{0} requires jieba.")
    monkeypatch.setitem(import_utils.BACKENDS_MAPPING, "jieba", missing)
    with pytest.raises(ImportError, match="requires jieba"):
        cli.main()


@pytest.mark.parametrize(
    ("message", "sentence"),
    [
        ("\nX requires the Y library but\nit was not found. See\nthere.\n", None),
        ("It ends here.", "It ends here"),
        ("No stop\n  an indented detail", "No stop"),
        ("No stop\n\nanother paragraph", "No stop"),
        ("Wrong for A:\n\n\tsize of b\n\tsize of c", "Wrong for A: size of b"),
        # At most 300 characters: 59 * 5 - 1 and the mark, with a space, of 6.
        ("word " * 99, " ".join(["word"] * 59 + ["[...]"])),
        ("Version 5.24 is new. Take 5.23.", "Version 5.24 is new"),
        ("", "ValueError"),
    ],
)
def test_the_first_sentence_is_whole(message: str, sentence: str | None) -> None:
    expected = sentence or "X requires the Y library but it was not found"
    assert first_sentence(ValueError(message)) == expected
