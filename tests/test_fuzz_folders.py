"""Exported folders and recipes, changed at random: loaded, or an error of ours.

In no case is a module of the folder imported, a file outside of it read, more time
taken than ``MOST_SECONDS``, or more memory than ``MOST_BYTES``. A mutation is made of
its number alone, so a failure can be repeated.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import resource
import shutil
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx
import pytest
from onnx import helper

from tests.test_onnx_safety import trust_again
from vtprune_fx.errors import VtpruneError
from vtprune_fx.export import load
from vtprune_fx.models import load_processor
from vtprune_fx.recipes import load_recipe

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

MOST_SECONDS = 10
MOST_BYTES = 2 << 30
"""Memory of the process, libraries included, where only this file is tested."""

SECRET = "fuzz-secret"
"""Begins the names of files outside of the folder."""

MODULE = "fuzz_evil"
"""A module that can be imported, and must not be."""

VALUES: list[Any] = [
    *(None, True, -1, 0, 1, 10**9, 10**30, 0.5, 1e300, "", "x", "a" * 5000, [], {}),
    *(f"{MODULE}.C", f"{MODULE}:E", f"../{SECRET}", "/etc/passwd", "evil/repository"),
    *("\x00", "é", [[]], {"auto_map": {"AutoConfig": f"{MODULE}.C"}}, [f"{MODULE}.C"]),
    {"__enum__": True, "fqn": f"{MODULE}:E", "name": "a"},
]
NAMES = [
    *("auto_map", "audio_tokenizer", "_attn_implementation", "processor_class", "type"),
    *("custom_generate", "dtype", "file", "out_spec", "model_type", "chat_template"),
]
BYTES = [
    b"",
    b"\x00",
    b"{",
    b"[]",
    b"null",
    b'{"a":' * 100_000,
    b"\xff\xfe",
    b"1" * 9999,
]

opened: list[str] = []
"""Paths that were opened since a mutation began; an audit hook cannot be removed."""


def _note(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open" and isinstance(arguments[0], str):
        opened.extend((arguments[0], os.path.realpath(arguments[0])))


@pytest.fixture(scope="module", autouse=True)
def _evil_module(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    folder = tmp_path_factory.mktemp("modules")
    (folder / f"{MODULE}.py").write_text("E = {'a': {}}\nclass C: pass\n")
    sys.path.insert(0, str(folder))
    sys.addaudithook(_note)
    yield
    sys.path.remove(str(folder))


# --------------------------------------------------------------------------- mutations


def places(fields: Any) -> list[tuple[Any, Any]]:
    """All containers in a JSON value, each with one of its keys or indices."""
    found: list[tuple[Any, Any]] = []
    keys = list(fields) if isinstance(fields, dict) else range(len(fields))
    for key in keys:
        found.append((fields, key))
        if isinstance(fields[key], dict | list):
            found += places(fields[key])
    return found


def change_json(path: Path, draw: random.Random) -> None:
    fields = json.loads(path.read_text())
    container, key = draw.choice(places(fields))
    kind = draw.choice(["set", "set", "remove", "add", "text"])
    if kind == "set":
        container[key] = draw.choice(VALUES)
    elif kind == "remove":
        del container[key]
    elif kind == "add" and isinstance(container, dict):
        container[draw.choice(NAMES)] = draw.choice(VALUES)
    elif isinstance(container[key], str):
        container[key] = container[key][::-1]
    path.write_text(json.dumps(fields))


def change_bytes(path: Path, draw: random.Random) -> None:
    content = bytearray(path.read_bytes())
    for _ in range(draw.choice([1, 3, 50])):
        content[draw.randrange(len(content))] = draw.randrange(256)
    cut = draw.choice([len(content), len(content), draw.randrange(len(content))])
    path.write_bytes(content[:cut])


def replace(path: Path, draw: random.Random) -> None:
    path.unlink()
    kind = draw.choice(["bytes", "bytes", "nothing", "link", "pipe", "folder"])
    if kind == "bytes":
        path.write_bytes(draw.choice(BYTES))
    elif kind == "link":
        path.symlink_to(path.parent.parent / SECRET)
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()


def add_file(path: Path, draw: random.Random) -> None:
    names = [f"{MODULE}.py", ".hidden", "adapter_config.json", "model.safetensors"]
    names += ["pytorch_model.bin", "special_tokens_map.json", "additional.jinja"]
    (path.parent / draw.choice(names)).write_bytes(draw.choice(BYTES))


def change_graph(path: Path, draw: random.Random) -> None:
    graph = path.parent / draw.choice(["prefill.onnx", "decode.onnx"])
    proto = onnx.load(graph, load_external_data=False)
    kind = draw.choice(["node", "function", "weights", "remove", "input"])
    nodes = proto.graph.node
    if kind == "node":
        node = draw.choice(nodes)
        node.op_type = draw.choice(["EPContext", "Gelu", "Loop", "NoSuch", "Add"])
        node.domain = draw.choice(["", "com.microsoft", MODULE])
    elif kind == "function":
        inner = helper.make_node("EPContext", ["x"], ["y"], domain="com.microsoft")
        domain = draw.choice(["com.microsoft", "vtprune", MODULE])
        made = helper.make_function(domain, "Gelu", ["x"], ["y"], [inner], [])
        proto.functions.append(made)
    elif kind == "weights":
        tensor = draw.choice([t for t in proto.graph.initializer if t.external_data])
        entry = draw.choice(tensor.external_data)
        entry.value = draw.choice([f"../{SECRET}", "/etc/passwd", "9" * 30, "-1", ""])
    elif kind == "remove":
        del nodes[draw.randrange(len(nodes))]
    else:
        nodes[0].input.append("no such value")
    graph.write_bytes(proto.SerializeToString())


CHANGES: list[Callable[[Path, random.Random], None]] = [
    *(change_json, change_json, change_json, change_bytes, replace, add_file),
    change_graph,
]


def mutate(folder: Path, number: int) -> None:
    """Change a folder; in most cases its hashes agree, as whoever wrote it can."""
    draw = random.Random(number)
    change = draw.choice(CHANGES)
    files = sorted(path for path in folder.iterdir() if path.is_file())
    if change is change_json:
        files = [path for path in files if path.suffix == ".json"]
    chosen = draw.choice(files)
    change(chosen, draw)
    agrees = chosen.name != "vtprune.json" and draw.random() < 0.9
    if agrees and all(path.is_file() for path in folder.iterdir()):
        trust_again(folder)


# --------------------------------------------------------------------------- the checks


def peak_bytes() -> int:
    """The most memory that this process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def tried(action: Callable[[], object]) -> None:
    """Run what must end in time, well or with an error of ours, and stay inside."""
    opened.clear()
    start, most = time.monotonic(), peak_bytes()
    with contextlib.suppress(VtpruneError):
        action()
    seconds = time.monotonic() - start
    # Other tests of the same process may have used more before.
    assert peak_bytes() < max(MOST_BYTES, most + (MOST_BYTES >> 2))
    assert seconds < MOST_SECONDS
    assert MODULE not in sys.modules
    strange = [p for p in opened if SECRET in p or p == "/etc/passwd"]
    assert not strange, strange


def check_folder(onnx_folder: Path, scratch: Path, number: int) -> None:
    folder = shutil.copytree(onnx_folder, scratch / f"export-{number}")
    (scratch / SECRET).write_text("{}")
    mutate(folder, number)
    tried(lambda: load(folder))
    if not any(path.is_symlink() for path in folder.iterdir()):  # as in hub caches
        tried(lambda: load_processor(folder))
    shutil.rmtree(folder)


def check_recipe(scratch: Path, number: int) -> None:
    draw = random.Random(number)
    recipe = scratch / "recipe.json"
    recipe.write_text(load_recipe("sparsevlm-llava-1.5-7b-64").to_json())
    (scratch / SECRET).write_text("{}")
    change = draw.choice([change_json, change_json, change_bytes, replace])
    change(recipe, draw)
    if not recipe.is_symlink():  # a user may name a link
        tried(lambda: load_recipe(str(recipe)))


@pytest.mark.parametrize("number", range(40))
def test_a_changed_folder_loads_or_is_refused(
    onnx_folder: Path, tmp_path: Path, number: int
) -> None:
    check_folder(onnx_folder, tmp_path, number)


@pytest.mark.parametrize("number", range(40))
def test_a_changed_recipe_is_read_or_refused(tmp_path: Path, number: int) -> None:
    check_recipe(tmp_path, number)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(40, 500))
def test_many_changed_folders_load_or_are_refused(
    onnx_folder: Path, tmp_path: Path, number: int
) -> None:
    check_folder(onnx_folder, tmp_path, number)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(40, 500))
def test_many_changed_recipes_are_read_or_refused(tmp_path: Path, number: int) -> None:
    check_recipe(tmp_path, number)
