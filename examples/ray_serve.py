"""Serve an exported model with Ray Serve: one replica for each GPU, or on the CPU.

    pip install ".[onnxruntime,serve]"
    cd examples                                # where replicas look for this file
    python ray_serve.py                        # a small model, one question, and done
    serve run ray_serve:app folder=llava-60    # until it is stopped

A request is JSON, ``{"prompt": "What is it?", "image": "<base64>"}``; without an image
it is a question alone. The answer is ``{"answer": "..."}``.
"""

from __future__ import annotations

import base64
import io
import json
import tempfile
import urllib.request
from pathlib import Path
from typing import Any

from PIL import Image
from ray import serve
from starlette.requests import Request

from vtprune_fx.evaluation.picture import sample_photo
from vtprune_fx.export import load, write_onnx
from vtprune_fx.models import load_processor, open_checkpoint, prompt_inputs
from vtprune_fx.reference import CheckpointSpec, build_checkpoint

NEW_TOKENS = 16


class Answers:
    """An exported model that answers HTTP requests.

    Args:
        folder: What ``vtprune export`` wrote.
    """

    def __init__(self, folder: str) -> None:
        self._model: Any = load(Path(folder))
        self._processor = load_processor(folder)

    def answer(self, prompt: str, image: Image.Image | None) -> str:
        """What the model says."""
        inputs = prompt_inputs(self._processor, prompt, image)
        ids = self._model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
        new = ids[0, inputs["input_ids"].shape[1] :]
        return str(self._processor.decode(new, skip_special_tokens=True)).strip()

    async def __call__(self, request: Request) -> dict[str, str]:
        """Answer one request."""
        asked = await request.json()
        image = None
        if "image" in asked:
            image = Image.open(io.BytesIO(base64.b64decode(asked["image"])))
        return {"answer": self.answer(asked["prompt"], image)}


# A run holds the graphs, so a replica answers one request after another, and Ray sends
# what waits to whichever replica is free. With GPUs: ray_actor_options={"num_gpus": 1}.
deployment: Any = serve.deployment(Answers, num_replicas=1, max_ongoing_requests=1)


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
