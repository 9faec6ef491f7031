"""Serve an exported model with Ray Serve: one replica for each GPU, or on the CPU.

    pip install ".[onnxruntime,serve]"
    cd examples                                # where replicas look for this file
    python ray_serve.py                        # a small model, one question, and done
    serve run ray_serve:app folder=llava-60    # until it is stopped

A request is JSON, ``{"prompt": "What is it?", "image": "<base64>"}``; without an image
it is a question alone. The answer is ``{"answer": "..."}``. A request that cannot be
answered gets status 400, or 408, 411 or 413 for its body, and ``{"error": "..."}``.
"""

from __future__ import annotations

import asyncio
import base64
import functools
import io
import json
import tempfile
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray import serve
from starlette.requests import Request

from vtprune_fx.errors import VtpruneError
from vtprune_fx.evaluation.picture import sample_photo
from vtprune_fx.export import load, write_onnx
from vtprune_fx.models import load_processor, open_checkpoint, open_image, prompt_inputs
from vtprune_fx.reference import CheckpointSpec, build_checkpoint

if TYPE_CHECKING:
    from PIL import Image

NEW_TOKENS = 16
MOST_BYTES = 20 * 2**20  # of a request
MOST_CHARACTERS = 10_000  # of a question
BODY_SECONDS = 10.0  # in which a request must have arrived


class BadRequestError(Exception):
    """A request that is not answered.

    Args:
        status: Its HTTP status.
        reason: What is wrong with it.
    """

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


class Answers:
    """An exported model that answers HTTP requests.

    Args:
        folder: What ``vtprune export`` wrote.
    """

    def __init__(self, folder: str) -> None:
        self._model: Any = load(Path(folder))
        self._processor = load_processor(folder)

    @functools.cached_property
    def _turn(self) -> asyncio.Lock:
        """Held by the request that is being answered: a graph has one run at a time."""
        return asyncio.Lock()

    def answer(self, prompt: str, image: Image.Image | None) -> str:
        """What the model says."""
        inputs = prompt_inputs(self._processor, prompt, image)
        ids = self._model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
        new = ids[0, inputs["input_ids"].shape[1] :]
        return str(self._processor.decode(new, skip_special_tokens=True)).strip()

    async def __call__(self, request: Request) -> Any:
        """Answer one request."""
        try:
            prompt, picture = question(await body(request))
            async with self._turn:
                said = await asyncio.to_thread(self._answered, prompt, picture)
        except BadRequestError as error:
            return refusal(error.status, str(error))
        except VtpruneError as error:  # about this prompt or image
            return refusal(400, str(error))
        return {"answer": said}

    def _answered(self, prompt: str, picture: bytes | None) -> str:
        image = None if picture is None else open_image(picture)
        return self.answer(prompt, image)


async def body(request: Request) -> Any:
    """What a request says, if it is not too long and arrives in time."""
    headers = getattr(request, "headers", {})
    length = headers.get("content-length", "0")
    if "transfer-encoding" in headers or not length.isdecimal():
        raise BadRequestError(411, "Say how long the request is.")
    if len(length) > len(str(MOST_BYTES)) or int(length) > MOST_BYTES:
        raise BadRequestError(413, f"A request has at most {MOST_BYTES:,} bytes.")
    try:
        async with asyncio.timeout(BODY_SECONDS):
            return await request.json()
    except TimeoutError:
        seconds = f"{BODY_SECONDS:g} seconds"
        raise BadRequestError(408, f"It did not arrive in {seconds}.") from None
    except (ValueError, RecursionError) as error:
        raise BadRequestError(400, "The request is no JSON.") from error


def question(asked: Any) -> tuple[str, bytes | None]:
    """The prompt of a request, and the content of its image file."""
    if not isinstance(asked, dict) or not set(asked) <= {"prompt", "image"}:
        raise BadRequestError(400, "Send an object with prompt, and image if wanted.")
    prompt, image = asked.get("prompt"), asked.get("image")
    if not isinstance(prompt, str) or not 0 < len(prompt) <= MOST_CHARACTERS:
        found = f"prompt: send text of 1 to {MOST_CHARACTERS:,} characters."
        raise BadRequestError(400, found)
    if image is None:
        return prompt, None
    try:
        return prompt, base64.b64decode(image, validate=True)
    except (TypeError, ValueError) as error:
        found = "image: send the content of an image file in base64."
        raise BadRequestError(400, found) from error


def refusal(status: int, reason: str) -> Any:
    """The answer to a request that is not answered."""
    from starlette.responses import JSONResponse  # noqa: PLC0415 - refusals alone

    return JSONResponse({"error": reason}, status_code=status)


# Requests arrive side by side, so that one that is slow to arrive keeps no other
# waiting; a run holds the graphs, so a replica answers one after another. With GPUs:
# ray_actor_options={"num_gpus": 1}.
deployment: Any = serve.deployment(
    Answers, num_replicas=1, max_ongoing_requests=64, max_queued_requests=256
)


def app(arguments: dict[str, str]) -> Any:
    """What ``serve run`` starts."""
    # A replica may run in another folder.
    return deployment.bind(str(Path(arguments["folder"]).resolve()))


def main() -> str:
    """Export a small model with random weights, serve it, and ask once."""
    with tempfile.TemporaryDirectory() as scratch:
        spec = CheckpointSpec(image_size=56, layers=2, hidden=32, heads=4)
        checkpoint = build_checkpoint(Path(scratch) / "checkpoint", spec)
        folder = Path(scratch) / "export"
        write_onnx(*open_checkpoint(checkpoint), None, folder)
        serve.run(deployment.bind(str(folder)))
        try:
            return ask("What is it?", sample_photo())
        finally:
            serve.shutdown()


def ask(prompt: str, image: Image.Image | None) -> str:
    """Send one request."""
    fields = {"prompt": prompt}
    if image is not None:
        file = io.BytesIO()
        image.save(file, "PNG")
        fields["image"] = base64.b64encode(file.getvalue()).decode()
    request = urllib.request.Request(
        "http://127.0.0.1:8000/", json.dumps(fields).encode(), method="POST"
    )
    with urllib.request.urlopen(request) as response:
        answer: str = json.load(response)["answer"]
    return answer


if __name__ == "__main__":
    print(main())
