"""The server example, with Ray and starlette replaced: what it says to bad requests."""

from __future__ import annotations

import asyncio
import base64
import io
import runpy
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from vtprune_fx.errors import InputError

SERVER = Path(__file__).parent.parent / "examples" / "ray_serve.py"


class Response:
    def __init__(self, content: dict[str, str], status_code: int) -> None:
        self.content, self.status = content, status_code


class Asked:
    """A request of starlette: its headers, and what it says after some seconds."""

    def __init__(self, says: object, seconds: float = 0, /, **headers: str) -> None:
        self.says, self.seconds = says, seconds
        self.headers = {k.replace("_", "-"): v for k, v in headers.items()}

    async def json(self) -> object:
        await asyncio.sleep(self.seconds)
        if isinstance(self.says, Exception):
            raise self.says
        return self.says


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The names of the example, without Ray."""
    modules: dict[str, dict[str, Any]] = {
        "ray": {"serve": types.SimpleNamespace(deployment=lambda *a, **k: None)},
        "starlette": {"__path__": []},
        "starlette.requests": {"Request": Asked},
        "starlette.responses": {"JSONResponse": Response},
    }
    for name, content in modules.items():
        module = types.ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    return runpy.run_path(str(SERVER))


@pytest.fixture
def server(names: dict[str, Any]) -> Any:
    """The example's class, answering every question with it and its image's size."""

    base: Any = names["Answers"]

    class Answers(base):  # type: ignore[misc] # found when it runs
        def __init__(self) -> None:
            pass

        def answer(self, prompt: str, image: Image.Image | None) -> str:
            if prompt == "refuse":
                raise InputError("prompt", expected="x", found="y", fix="Z.")
            return f"{prompt} {image.size if image else None}"

    return Answers()


def picture(**options: Any) -> str:
    file = io.BytesIO()
    Image.new("RGB", (40, 20)).save(file, "JPEG", **options)
    return base64.b64encode(file.getvalue()).decode()


def test_questions_are_answered(server: Any) -> None:
    upright = Image.Exif()
    upright[0x112] = 6
    for fields, expected in (
        ({"prompt": "a"}, "a None"),
        ({"prompt": "a", "image": picture()}, "a (40, 20)"),
        ({"prompt": "a", "image": picture(exif=upright)}, "a (20, 40)"),
    ):
        assert asyncio.run(server(Asked(fields))) == {"answer": expected}


@pytest.mark.parametrize(
    ("says", "reason"),
    [
        (ValueError("no JSON"), "no JSON"),
        (RecursionError(), "no JSON"),
        ([], "an object"),
        ("a", "an object"),
        (None, "an object"),
        ({}, "prompt"),
        ({"prompt": 1}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": "a" * 10_001}, "prompt"),
        ({"prompt": "a", "other": 1}, "an object"),
        ({"prompt": "a", "image": 1}, "image"),
        ({"prompt": "a", "image": "%%%"}, "image"),
        ({"prompt": "a", "image": "é"}, "image"),
        ({"prompt": "a", "image": ""}, "readable image"),
        ({"prompt": "a", "image": "aaaa"}, "readable image"),
        ({"prompt": "refuse"}, "Z."),
    ],
)
def test_a_bad_request_gets_400_and_a_reason(
    server: Any, says: object, reason: str
) -> None:
    refused = asyncio.run(server(Asked(says)))
    assert refused.status == 400
    assert reason in refused.content["error"]


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"content_length": "20971521"}, 413),
        ({"content_length": "9" * 5000}, 413),
        ({"content_length": "many"}, 411),
        ({"transfer_encoding": "chunked"}, 411),
    ],
)
def test_a_body_without_a_bound_is_not_read(
    server: Any, headers: dict[str, str], status: int
) -> None:
    request = Asked(AssertionError("it is read"), 0, **headers)
    assert asyncio.run(server(request)).status == status


def test_a_slow_client_keeps_nobody_waiting(
    server: Any, names: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(names["body"].__globals__, "BODY_SECONDS", 0.2)

    async def both() -> tuple[Any, bool, Any]:
        slow = asyncio.create_task(server(Asked({"prompt": "slow"}, 60)))
        await asyncio.sleep(0)
        quick = await server(Asked({"prompt": "quick"}))
        waits = not slow.done()
        return quick, waits, await slow

    quick, waits, slow = asyncio.run(both())
    assert quick == {"answer": "quick None"}
    assert waits
    assert slow.status == 408
