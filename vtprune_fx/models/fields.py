"""What the JSON files of a folder may say: nothing that runs code or reads elsewhere.

transformers follows some fields of these files to Python code, to models on the hub, or
to kernels. At every depth they are refused here, before transformers reads them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vtprune_fx.files import parse_json, read_whole

CODE = frozenset({"auto_map", "custom_generate", "custom_pipelines"})
"""Fields that name Python code."""

ELSEWHERE = frozenset(
    {
        *("audio_tokenizer", "audio_tokenizer_name_or_path", "adapter_config"),
        *("backbone", "use_timm_backbone", "use_pretrained_backbone", "peft_config"),
        *("base_model_name_or_path", "quantization_config", "hub_kernels"),
    }
)
"""Fields that name models, or code that reads them, outside of the folder."""

_IMPLEMENTATIONS = re.compile(r"_?(attn|experts)_implementation(_\w+)?")
_KNOWN_IMPLEMENTATIONS = (None, "eager", "sdpa")
_DTYPES = ("float32", "float16", "bfloat16", None)
_NAME = re.compile(r"(\w+(-\w+)*)?")


def read_fields(path: Path) -> Any:
    """What a JSON file says.

    Raises:
        OSError: It cannot be read, or is no regular file.
        ValueError: It is no JSON that ``parse_json`` takes.
    """
    return parse_json(read_whole(path))


def refused_field(fields: object) -> tuple[str, str] | None:
    """The first field, at any depth, that would run code or read elsewhere.

    Args:
        fields: What ``parse_json`` returned.

    Returns:
        Where it stands, and what is wrong with it; None where nothing is.
    """
    for place, name, value in walk(fields):
        if value in (None, False, [], {}):
            continue
        short = str(value)[:80]
        if name in CODE:
            return place, "which names Python code"
        if name in ELSEWHERE:
            return place, "which is read from elsewhere"
        if _IMPLEMENTATIONS.fullmatch(name) and not _is_known(value):
            return place, f"{short!r}, which is code from elsewhere"
        if name.endswith(("_class", "_type")) and not _is_name(value):
            return place, f"{short!r}, which is no name"
        if name in ("dtype", "torch_dtype") and value not in _DTYPES:
            return place, f"{short!r}, which is no type of weights"
    return None


def walk(fields: object, place: str = "") -> Iterator[tuple[str, str, Any]]:
    """Where each field at any depth stands, its name, and its value."""
    if isinstance(fields, dict):
        for name, value in fields.items():
            here = f"{place}.{name}" if place else name
            yield here, name, value
            yield from walk(value, here)
    elif isinstance(fields, list):
        for index, value in enumerate(fields):
            if isinstance(value, dict | list):
                yield from walk(value, f"{place}[{index}]")


def _is_known(value: object) -> bool:
    if isinstance(value, dict):
        return all(_is_known(part) for part in value.values())
    return value in _KNOWN_IMPLEMENTATIONS


def _is_name(value: object) -> bool:
    """Whether a class or kind is a name, or a list of names."""
    parts = value if isinstance(value, list) else [value]
    return all(
        part is None
        or isinstance(part, int | float)
        or (isinstance(part, str) and _NAME.fullmatch(part))
        for part in parts
    )
