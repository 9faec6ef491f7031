"""An export that is not whole, or not safe, does not load."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import onnx_ir
import pytest

from vtprune_fx.errors import ExportError
from vtprune_fx.export import load, manifest
from vtprune_fx.export.folder import check_free, written_at_once


@pytest.fixture
def copy(onnx_folder: Path, tmp_path: Path) -> Path:
    """A copy of a good export, to damage."""
    return shutil.copytree(onnx_folder, tmp_path / "onnx")


def edit_json(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def edit_manifest(folder: Path, **changes: Any) -> None:
    edit_json(folder / manifest.FILE, **changes)


def trust_again(folder: Path) -> None:
    """Bring the manifest's hashes up to date, as whoever wrote the folder can."""
    (folder / manifest.FILE).rename(folder.parent / manifest.FILE)
    found = manifest.hashes(folder)
    (folder.parent / manifest.FILE).rename(folder / manifest.FILE)
    edit_manifest(folder, files=found)


# ------------------------------------------------------------------------ the hashes


def test_a_changed_file_is_refused(copy: Path) -> None:
    weights = copy / "prefill.onnx.data"
    changed = bytearray(weights.read_bytes())
    changed[100] ^= 1
    weights.write_bytes(changed)
    with pytest.raises(ExportError, match=r"prefill.onnx.data as it was written"):
        load(copy)


def test_a_file_that_is_not_listed_is_refused(copy: Path) -> None:
    (copy / "added_tokens.json").write_text("{}")
    with pytest.raises(ExportError, match=r"found added_tokens.json"):
        load(copy)


def test_what_a_repository_has_beside_a_model_does_no_harm(copy: Path) -> None:
    (copy / "README.md").write_text("A model.")
    (copy / ".gitattributes").write_text("")
    assert load(copy).manifest == manifest.read(copy)


# ------------------------------------------------------------------------- the paths


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "a/b", "..", ".x", ""])
def test_a_manifest_with_a_path_is_refused(copy: Path, name: str) -> None:
    (copy.parent / "secret").write_text("secret")
    edit_manifest(copy, files={name: "0" * 64})
    with pytest.raises(ExportError, match=r"found files\..*pattern"):
        load(copy)


def test_a_link_is_refused(copy: Path) -> None:
    elsewhere = copy.parent / "elsewhere"
    shutil.move(copy / "prefill.onnx.data", elsewhere)
    (copy / "prefill.onnx.data").symlink_to(elsewhere)
    with pytest.raises(ExportError, match=r"prefill.onnx.data to be a file, found a l"):
        load(copy)


@pytest.mark.parametrize("location", ["../weights", "/weights", "decode.onnx.data"])
def test_weights_elsewhere_are_refused(copy: Path, location: str) -> None:
    def move(proto: Any) -> None:
        for tensor in proto.graph.initializer:
            for entry in tensor.external_data:
                if entry.key == "location":
                    entry.value = location

    edit_graph(copy / "prefill.onnx", move)
    trust_again(copy)
    with pytest.raises(ExportError, match=rf"found weights in '{location}'"):
        load(copy)


def edit_graph(path: Path, edit: Any) -> None:
    import onnx

    proto = onnx.load(path, load_external_data=False)
    edit(proto)
    path.write_bytes(proto.SerializeToString())


def test_a_graph_elsewhere_is_refused(copy: Path) -> None:
    shutil.copy(copy / "prefill.onnx", copy.parent / "prefill.onnx")
    fields = json.loads((copy / "export.json").read_text())
    fields["components"]["prefill"]["file"] = "../prefill.onnx"
    (copy / "export.json").write_text(json.dumps(fields))
    trust_again(copy)
    with pytest.raises(ExportError, match=r"found .*\.\./prefill.onnx"):
        load(copy)


# -------------------------------------------------------------------------- the code


def test_another_format_is_refused(copy: Path) -> None:
    # Whose files are read in other ways.
    edit_json(copy / "export.json", export_format="dynamo")
    trust_again(copy)
    with pytest.raises(ExportError, match=r"found .*dynamo"):
        load(copy)


@pytest.mark.parametrize("name", ["config.json", "processor_config.json"])
def test_code_of_the_folders_own_never_runs(copy: Path, name: str) -> None:
    ran = copy.parent / "ran"
    (copy / "own.py").write_text(f"open({str(ran)!r}, 'w')\nclass C: pass\n")
    edit_json(copy / name, auto_map={"AutoConfig": "own.C", "AutoProcessor": "own.C"})
    trust_again(copy)
    with pytest.raises(ExportError, match=r"expected no code, found .*(auto_map|own)"):
        load(copy)
    assert not ran.exists()


def test_an_operator_that_reads_files_is_refused(copy: Path) -> None:
    def add(proto: Any) -> None:
        node = proto.graph.node.add(op_type="EPContext", domain="com.microsoft")
        node.output.append("context")

    edit_graph(copy / "decode.onnx", add)
    trust_again(copy)
    with pytest.raises(ExportError, match=r"operator com.microsoft::EPContext"):
        load(copy)


def test_a_file_that_is_no_onnx_is_refused(copy: Path) -> None:
    (copy / "decode.onnx").write_bytes(b"not a graph")
    trust_again(copy)
    with pytest.raises(ExportError, match=r"decode.onnx to be ONNX"):
        load(copy)


def test_exported_graphs_hold_what_loading_allows(onnx_folder: Path) -> None:
    for name in ("prefill", "decode"):
        model = onnx_ir.load(onnx_folder / f"{name}.onnx")
        assert {node.domain for node in model.graph.all_nodes()} == {""}


# ------------------------------------------------------------------- half an export


def test_an_export_that_fails_half_way_leaves_nothing(tmp_path: Path) -> None:
    def write() -> None:
        with written_at_once(tmp_path / "onnx") as scratch:
            (scratch / "prefill.onnx").write_bytes(b"half of it")
            raise RuntimeError("no space")

    with pytest.raises(RuntimeError, match="no space"):
        write()
    assert list(tmp_path.iterdir()) == []


def test_an_export_that_fails_half_way_leaves_an_earlier_one(copy: Path) -> None:
    def write() -> None:
        with written_at_once(copy):
            raise RuntimeError("no space")

    with pytest.raises(RuntimeError, match="no space"):
        write()
    manifest.check_whole(copy, manifest.read(copy))


_KILLED = """
import os, signal, sys
from transformers.exporters import OnnxExporter
from vtprune_fx.cli import main
write = OnnxExporter.save_program
def write_and_die(*arguments):
    write(*arguments)
    os.kill(os.getpid(), signal.SIGKILL)
OnnxExporter.save_program = staticmethod(write_and_die)
sys.argv = ["vtprune", "export", "onnx", *sys.argv[1:]]
main()
"""
"""The whole command, killed as soon as the first of its graphs is on the disk."""


@pytest.mark.slow
def test_an_export_that_is_killed_half_way_does_not_load(
    onnx_folder: Path, tmp_path: Path
) -> None:
    """Engines are written by the same ``write_export``."""
    checkpoint, output = onnx_folder.parent / "checkpoint", tmp_path / "onnx"
    arguments = [str(checkpoint), "--output", str(output)]
    command = [sys.executable, "-c", _KILLED, *arguments]
    run = subprocess.run(command, check=False, capture_output=True, env=os.environ)
    assert run.returncode == -signal.SIGKILL, run.stderr.decode()
    assert not output.exists()
    [scratch] = tmp_path.iterdir()
    [graph] = scratch.rglob("prefill.onnx")
    for left in (scratch, graph.parent):
        with pytest.raises(ExportError, match=r"a readable vtprune.json"):
            load(left)
    # What is left does not stand in the way of another try.
    check_free(output)
