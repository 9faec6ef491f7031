"""Loading runs nothing and reads nothing outside, at any depth; no tracebacks."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx
import pytest
from onnx import helper

from tests.test_onnx_safety import edit_graph, edit_json, edit_manifest, trust_again
from vtprune_fx.errors import ExportError, InputError
from vtprune_fx.export import load, trust
from vtprune_fx.export.manifest import check_whole
from vtprune_fx.export.verify import verify
from vtprune_fx.models import load_processor, prompt_inputs
from vtprune_fx.models.fields import refused_field

if TYPE_CHECKING:
    from collections.abc import Callable


@pytest.fixture
def copy(onnx_folder: Path, tmp_path: Path) -> Path:
    """A copy of a good export, to damage."""
    return shutil.copytree(onnx_folder, tmp_path / "onnx")


def refuses(folder: Path, match: str) -> None:
    trust_again(folder)
    with pytest.raises(ExportError, match=match):
        load(folder)


# --------------------------------------------------------------------------- the graphs


def local_function(domain: str, name: str) -> Any:
    node = helper.make_node("Identity", ["x"], ["y"])
    opsets = [helper.make_opsetid("", 20)]
    return helper.make_function(domain, name, ["x"], ["y"], [node], opsets)


@pytest.mark.parametrize(
    ("domain", "name"),
    [
        ("com.microsoft", "Gelu"),
        ("", "Relu"),
        ("org.other", "Own"),
        ("ai.onnx", "Relu"),
    ],
)
def test_a_function_in_an_operators_place_is_refused(
    copy: Path, domain: str, name: str
) -> None:
    def add(proto: Any) -> None:
        proto.functions.append(local_function(domain, name))

    edit_graph(copy / "decode.onnx", add)
    refuses(copy, f"found a function {domain}::{name}")


def evil_graph() -> Any:
    node = helper.make_node("EPContext", [], ["z"], domain="com.microsoft")
    return helper.make_graph([node], "inner", [], [])


def in_a_branch(proto: Any) -> None:
    proto.graph.node.append(
        helper.make_node("If", ["c"], ["z"], then_branch=evil_graph())
    )


def two_deep(proto: Any) -> None:
    inner = helper.make_node("If", ["c"], ["z"], then_branch=evil_graph())
    outer = helper.make_graph([inner], "outer", [], [])
    proto.graph.node.append(helper.make_node("If", ["c"], ["z"], then_branch=outer))


def in_a_list_of_graphs(proto: Any) -> None:
    node = proto.graph.node.add(op_type="Identity")
    attribute = node.attribute.add(name="g", type=onnx.AttributeProto.GRAPHS)
    attribute.graphs.append(evil_graph())


def in_a_function(proto: Any) -> None:
    function = local_function("vtprune", "Own")
    function.node.append(
        helper.make_node("EPContext", [], ["z"], domain="com.microsoft")
    )
    proto.functions.append(function)


def in_a_default(proto: Any) -> None:
    function = local_function("vtprune", "Own")
    attribute = function.attribute_proto.add(name="g", type=onnx.AttributeProto.GRAPH)
    attribute.g.CopyFrom(evil_graph())
    proto.functions.append(function)


@pytest.mark.parametrize(
    "add", [in_a_branch, two_deep, in_a_list_of_graphs, in_a_function, in_a_default]
)
def test_an_operator_is_refused_at_every_depth(
    copy: Path, add: Callable[[Any], None]
) -> None:
    edit_graph(copy / "decode.onnx", add)
    refuses(copy, "operator com.microsoft::EPContext")


@pytest.mark.parametrize("name", ["NoSuch", "AttentionRank"])
def test_an_operator_that_nobody_has_is_refused(copy: Path, name: str) -> None:
    domain = "vtprune" if name == "AttentionRank" else ""

    def add(proto: Any) -> None:
        proto.graph.node.append(helper.make_node(name, [], ["z"], domain=domain))

    edit_graph(copy / "decode.onnx", add)
    refuses(copy, f"operator {domain}::{name}")


def elsewhere(tensor: Any, location: str = "../weights", **more: str) -> None:
    tensor.data_location = onnx.TensorProto.EXTERNAL
    del tensor.external_data[:]
    for key, value in ({"location": location} | more).items():
        tensor.external_data.add(key=key, value=value)


def default_weights(proto: Any) -> None:
    function = local_function("vtprune", "Own")
    default = function.attribute_proto.add(name="t", type=onnx.AttributeProto.TENSOR)
    elsewhere(default.t)
    proto.functions.append(function)


def sparse_values(proto: Any) -> None:
    elsewhere(proto.graph.sparse_initializer.add().values)


def sparse_indices(proto: Any) -> None:
    elsewhere(proto.graph.sparse_initializer.add().indices)


def constant_weights(proto: Any) -> None:
    node = proto.graph.node.add(op_type="Constant")
    attribute = node.attribute.add(name="value", type=onnx.AttributeProto.TENSOR)
    elsewhere(attribute.t)


def branch_weights(proto: Any) -> None:
    graph = helper.make_graph([], "inner", [], [])
    elsewhere(graph.initializer.add(name="w"))
    proto.graph.node.append(helper.make_node("If", ["c"], ["z"], then_branch=graph))


@pytest.mark.parametrize(
    "add",
    [default_weights, sparse_values, sparse_indices, constant_weights, branch_weights],
)
def test_weights_elsewhere_are_refused_at_every_depth(
    copy: Path, add: Callable[[Any], None]
) -> None:
    edit_graph(copy / "decode.onnx", add)
    refuses(copy, r"found weights in '\.\./weights'")


@pytest.mark.parametrize(
    "place",
    [{"offset": "9" * 12}, {"length": "x"}, {"offset": "-1"}, {"basepath": "/"}],
)
def test_a_strange_place_of_weights_is_refused(
    copy: Path, place: dict[str, str]
) -> None:
    def add(proto: Any) -> None:
        elsewhere(proto.graph.initializer.add(name="w"), "decode.onnx.data", **place)

    edit_graph(copy / "decode.onnx", add)
    refuses(copy, "found (a strange place of 'w'|'w' beyond)")


# ---------------------------------------------------------------------------- the names


@pytest.mark.parametrize(
    "name", [".h", ".git", "weights.bin", "own.pyc", "adapter_config.json", "x.so"]
)
def test_a_name_that_no_export_has_is_refused(copy: Path, name: str) -> None:
    (copy / name).write_bytes(b"{}")
    with pytest.raises(ExportError, match=f"found {name}"):
        load(copy)


def test_a_hidden_folder_is_refused(copy: Path) -> None:
    (copy / ".h").mkdir()
    with pytest.raises(ExportError, match=r"\.h to be a file"):
        load(copy)


@pytest.mark.parametrize("kind", ["link", "pipe", "folder"])
def test_a_manifest_that_is_no_file_is_refused(copy: Path, kind: str) -> None:
    manifest = copy / "vtprune.json"
    manifest.rename(copy.parent / "elsewhere")
    if kind == "link":
        manifest.symlink_to(copy.parent / "elsewhere")
    elif kind == "pipe":
        os.mkfifo(manifest)
    else:
        manifest.mkdir()
    with pytest.raises(ExportError, match=r"a readable vtprune\.json"):
        load(copy)


@pytest.mark.parametrize("name", ["decode.onnx.data", "config.json", "prefill.onnx"])
def test_what_is_hashed_is_what_is_loaded(
    copy: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    whole = check_whole

    def change_after(folder: Path, contents: Any) -> None:
        whole(folder, contents)
        stat = (folder / name).stat()
        content = bytearray((folder / name).read_bytes())
        content[-1:] = b" "
        (folder / name).write_bytes(content)
        os.utime(folder / name, ns=(stat.st_atime_ns, stat.st_mtime_ns))

    monkeypatch.setattr(trust, "check_whole", change_after)
    with pytest.raises(ExportError):
        load(copy)


# --------------------------------------------------------------------------- the fields


def set_spec(spec: object) -> Callable[[Any], None]:
    def change(fields: Any) -> None:
        fields["components"]["prefill"]["metadata"]["out_spec"] = json.dumps(spec)

    return change


ENUM = json.dumps({"__enum__": True, "fqn": "evil:E", "name": "a"})
RECORDS: dict[str, Callable[[Any], Any]] = {
    "a type": set_spec([1, {"type": "evil.C", "context": None, "children_spec": []}]),
    "an enum": set_spec([1, {"type": "builtins.dict", "context": ENUM}]),
    "a context": set_spec([1, {"type": None, "context": json.dumps({"p": "evil:C"})}]),
    "no JSON": lambda j: j["components"]["decode"]["metadata"].update(in_spec="zzz"),
    "no metadata": lambda j: j["components"]["decode"].pop("metadata"),
    "version text": lambda j: j.update(schema_version="x"),
    "version true": lambda j: j.update(schema_version=True),
    "more": lambda j: j.update(more=1),
    "more of a graph": lambda j: j["components"]["decode"].update(more=1),
    "more metadata": lambda j: j["components"]["decode"]["metadata"].update(more=1),
    "kwargs": lambda j: j["components"]["decode"]["metadata"].update(kwargs=[]),
}


@pytest.mark.parametrize("name", RECORDS)
def test_a_record_names_no_module(copy: Path, name: str) -> None:
    fields = json.loads((copy / "export.json").read_text())
    RECORDS[name](fields)
    (copy / "export.json").write_text(json.dumps(fields))
    refuses(copy, r"export\.json")


FIELDS: list[tuple[str, dict[str, Any]]] = [
    ("config.json", {"text_config": {"auto_map": {"AutoConfig": "evil.C"}}}),
    ("config.json", {"_attn_implementation": "evil/kernel"}),
    ("config.json", {"attn_implementation": {"": "flash_attention_2"}}),
    ("config.json", {"dtype": "os.system"}),
    ("config.json", {"model_type": "a/b"}),
    ("config.json", {"vision_config": {"backbone": "timm/evil"}}),
    ("processor_config.json", {"image_processor": {"auto_map": {"A": "evil.C"}}}),
    ("processor_config.json", {"audio_tokenizer": {"audio_tokenizer_class": "C"}}),
    ("processor_config.json", {"image_processor_type": "evil--C"}),
    ("tokenizer_config.json", {"tokenizer_class": "evil.C"}),
    ("generation_config.json", {"logits_processor": ["x"]}),
    ("generation_config.json", {"custom_generate": "evil/x"}),
    ("generation_config.json", {"penalty_alpha": 0.5}),
    ("generation_config.json", {"max_new_tokens": -1}),
]


@pytest.mark.parametrize(("name", "fields"), FIELDS)
def test_a_field_that_leads_elsewhere_is_refused(
    copy: Path, name: str, fields: dict[str, Any]
) -> None:
    edit_json(copy / name, **fields)
    refuses(copy, name)


CONTENTS = {
    "deep": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    "digits": b'{"a": ' + b"1" * 10_000 + b"}",
    "twice": b'{"a": 1, "a": 2}',
    "half a character": b'{"a": "\\ud800"}',
    "not a number": b'{"a": NaN}',
    "a list": b"[]",
    "empty": b"",
    "not text": b"\xff\xfe",
}


@pytest.mark.parametrize("kind", CONTENTS)
@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "export.json"])
def test_what_is_not_one_json_is_refused(copy: Path, name: str, kind: str) -> None:
    (copy / name).write_bytes(CONTENTS[kind])
    refuses(copy, name)


def test_words_may_be_named_like_fields() -> None:
    """In ``tokenizer.json`` they are not looked at; numbers harm nowhere else."""
    assert refused_field({"model": {"vocab": {"my_type": 5}}}) is None
    assert refused_field({"a": [{"b": [{"auto_map": "x"}]}]}) == (
        "a[0].b[0].auto_map",
        "which names Python code",
    )


@pytest.mark.parametrize(
    "change",
    [
        {"model_type": "zzz"},
        {"text_config": {"model_type": "llama", "num_attention_heads": 0}},
        {"text_config": {"model_type": "llama", "num_hidden_layers": 10**9}},
    ],
)
def test_a_whole_but_wrong_folder_is_an_error_of_ours(
    copy: Path, change: dict[str, Any]
) -> None:
    edit_json(copy / "config.json", **change)
    refuses(copy, "export .*onnx")


@pytest.mark.parametrize("name", ["decode.onnx", "prefill.onnx.data"])
def test_an_empty_file_is_an_error_of_ours(copy: Path, name: str) -> None:
    (copy / name).write_bytes(b"")
    refuses(copy, "export .*onnx")


# ---------------------------------------------------------------- verify and processors


def test_verify_takes_no_tolerance_from_the_folder(copy: Path) -> None:
    weights = copy / "prefill.onnx.data"
    content = bytearray(weights.read_bytes())
    content[: len(content) // 2] = bytes(len(content) // 2)
    weights.write_bytes(content)
    trust_again(copy)
    edit_manifest(copy, tolerance=1e9)
    result = verify(copy)
    assert not result.passed
    assert {outcome.tolerance for outcome in result.outcomes} == {1e-4}


@pytest.mark.parametrize(
    "fields",
    [
        {"image_processor": {"auto_map": {"AutoImageProcessor": "evil.C"}}},
        {"audio_tokenizer": {"audio_tokenizer_name_or_path": "/elsewhere"}},
        {"processor_class": "evil--C"},
    ],
)
def test_a_processor_that_leads_elsewhere_is_refused(
    copy: Path, monkeypatch: pytest.MonkeyPatch, fields: dict[str, Any]
) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    edit_json(copy / "processor_config.json", **fields)
    with pytest.raises(InputError, match=r"processor_config\.json"):
        load_processor(copy)


def test_a_processor_with_code_of_its_own_is_not_asked_about(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    (copy / "evil.py").write_text("raise SystemExit")
    auto_map = {"AutoProcessor": "evil.C"}
    edit_json(copy / "processor_config.json", auto_map=auto_map, processor_class=None)
    with contextlib.suppress(InputError):
        load_processor(copy)  # transformers' own, or none


def test_half_a_character_in_a_prompt_is_refused(onnx_folder: Path) -> None:
    processor = load_processor(onnx_folder)
    for text in ("a\udcff", "\ud800 b"):
        with pytest.raises(InputError, match="half a character"):
            prompt_inputs(processor, text, None)
    assert len(prompt_inputs(processor, "é 🙂", None)["input_ids"])
