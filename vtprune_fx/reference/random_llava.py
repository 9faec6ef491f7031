"""Builds a small LLaVA checkpoint with random weights.

The geometry is LLaVA-1.5's: a CLIP vision tower on 336 x 336 pixels in patches of 14
(24 x 24 = 576 visual tokens), a two-layer projector, a Llama decoder of 32 layers. Only
the widths are small. All classes are those of transformers, so what runs on this
checkpoint runs on a real one. The answers are meaningless: its weights are
random, drawn so that attention is as uneven as a trained model's.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from vtprune_fx.errors import InputError
from vtprune_fx.models.loading import quiet
from vtprune_fx.reference.tokenizer import (
    BOS_ID,
    EOS_ID,
    IMAGE_ID,
    PAD_ID,
    SPECIAL_TOKENS,
    trained_tokenizer,
)

RECORD = "vtprune_checkpoint.json"
"""File in a built folder that says which checkpoint it holds."""

RECORD_FORMAT = 1
"""Version of that file and of how weights are drawn: raise it if either changes."""

LOGIT_STD = 2.5
"""Standard deviation that the decoder's attention logits are drawn for."""

BRANCH_GAIN = 2.0
"""How much decoder layers add to the embeddings, so that context matters."""

SELF_AVERSION = 0.4
"""Share of its token's embedding over the root of the width that a row lacks."""

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] != 'system' %}{{ message['role'].upper() + ': ' }}"
    "{% endif %}"
    "{% if message['content'] is string %}{{ message['content'] + ' ' }}{% else %}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>\n' }}{% endfor %}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ part['text'] + ' ' }}{% endfor %}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
"""LLaVA-1.5's chat format: ``USER: <image>`` newline, text, ``ASSISTANT:``."""

TRAINING_TEXT = """\
USER: What is in this picture? ASSISTANT: The picture shows a cup of coffee on a
wooden table. A small spoon lies on the saucer beside the cup, and light falls from
a window on the left. USER: Which colours do you see? ASSISTANT: The saucer is dark
red, the table is brown, and the cup is white inside. USER: Describe the image in
one sentence. ASSISTANT: It is a close photograph of a fresh espresso, taken from
above. A model reads an image as a row of small patches, and every patch becomes one
token. Most of those tokens say little: an empty sky, a plain wall, the same grain
of wood again and again. The words of the question look at some patches much more
than at others, so the rest can leave early and nobody misses them. What remains
keeps its order and its place. USER: How many people are standing near the river?
ASSISTANT: There are three people: a man with a green coat, a woman who holds an
umbrella, and a child with a yellow kite. The water is calm, a boat drifts under the
bridge, and behind it you can see old houses with steep roofs. USER: What time of
day is it? ASSISTANT: Probably late afternoon, because the shadows are long and the
sun stands low over the hills. USER: Is there an animal in the photo? ASSISTANT:
Yes, a grey cat sleeps on a chair next to the door, and two birds sit on the fence
outside. USER: What does the sign say? ASSISTANT: The sign says that the shop opens
at nine in the morning and closes at six. USER: Where could this have been taken?
ASSISTANT: Maybe in a quiet street of a northern town: the pavement is wet, bicycles
lean against a brick wall, flowers grow in boxes below every window, and nobody
seems to be in a hurry. USER: Thank you. ASSISTANT: You are welcome, please ask if
anything else in the picture is unclear.
"""
"""Text that the tokenizer is trained on."""


@dataclass(frozen=True)
class CheckpointSpec:
    """Sizes of the checkpoint. The defaults are LLaVA-1.5's, with smaller widths.

    Attributes:
        image_size: Side of the square that the vision tower sees, in pixels.
        patch_size: Side of a patch. One patch is one visual token.
        layers: Decoder layers.
        hidden: Width of the decoder.
        heads: Attention heads of the decoder.
        intermediate: Width of the decoder's MLP.
        vision_hidden: Width of the vision tower.
        vision_layers: Layers of the vision tower. The last one is not used.
        vision_heads: Attention heads of the vision tower.
        vocab_size: Most tokens that the tokenizer may learn, special ones included. The
            model gets as many rows as the tokenizer has tokens.
        seed: Seed of the weights.
    """

    image_size: int = 336
    patch_size: int = 14
    layers: int = 32
    hidden: int = 256
    heads: int = 8
    intermediate: int = 688
    vision_hidden: int = 64
    vision_layers: int = 3
    vision_heads: int = 4
    vocab_size: int = 2048
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse sizes that no model can have."""
        divided = (
            ("image_size", "patch_size"),
            ("hidden", "heads"),
            ("vision_hidden", "vision_heads"),
        )
        for big, small in divided:
            if getattr(self, small) < 1 or getattr(self, big) % getattr(self, small):
                raise _spec_error(
                    big, f"a multiple of {small}={getattr(self, small)}", self
                )
        if (self.hidden // self.heads) % 2:
            raise _spec_error("hidden", "an even width per head (rotary pairs)", self)
        smallest = {
            "image_size": 1,
            "layers": 1,
            "hidden": 1,
            "intermediate": 1,
            "vision_hidden": 1,
            "vision_layers": 2,
            "vocab_size": 256 + len(SPECIAL_TOKENS),
        }
        for name, least in smallest.items():
            if getattr(self, name) < least:
                raise _spec_error(name, f"at least {least}", self)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        side = self.image_size // self.patch_size
        return side, side

    @property
    def visual_tokens(self) -> int:
        """Visual tokens of one image."""
        return self.grid[0] * self.grid[1]


def _spec_error(name: str, expected: str, spec: CheckpointSpec) -> InputError:
    return InputError(
        f"CheckpointSpec.{name}",
        expected=expected,
        found=str(getattr(spec, name)),
        fix="Choose another size.",
    )


def build_checkpoint(folder: Path, spec: CheckpointSpec | None = None) -> Path:
    """Build the checkpoint in ``folder``, unless it is there already.

    Everything is written to a new folder beside it, which is renamed at the end: an
    interrupted build makes no partial checkpoint.

    Args:
        folder: Where the checkpoint goes. Must be missing, empty, or hold the
            checkpoint that ``spec`` describes.
        spec: What to build; ``CheckpointSpec()`` if left out.

    Returns:
        ``folder``, loadable by ``AutoModelForImageTextToText`` and ``AutoProcessor``.

    Raises:
        InputError: ``folder`` holds something else, or cannot be written.
    """
    spec = spec or CheckpointSpec()
    folder = Path(folder)
    if _holds(folder, spec):
        return folder
    scratch = folder.parent / f".{folder.name}.{uuid.uuid4().hex}"
    try:
        scratch.mkdir(parents=True)
        _write(scratch, spec)
        if folder.is_dir():
            folder.rmdir()  # empty, or _holds would have refused it
        scratch.rename(folder)
    except OSError as error:
        if folder.is_dir() and _holds(folder, spec):  # another process built it
            return folder
        raise InputError(
            f"folder {str(folder)!r}",
            expected="a place where a checkpoint can be written",
            found=error.strerror or str(error),
            fix="Name a folder that can be written to.",
        ) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return folder


def _holds(folder: Path, spec: CheckpointSpec) -> bool:
    """Whether ``folder`` holds this checkpoint; an error if it holds something else."""
    if not os.path.lexists(folder):
        return False
    found = _what_is_wrong(folder, spec)
    if found is None:
        return (folder / RECORD).is_file()
    raise InputError(
        f"folder {str(folder)!r}",
        expected="no such folder, an empty one, or the same checkpoint built before",
        found=found,
        fix="Name another folder, or delete this one. Nothing in it was changed.",
    )


def _what_is_wrong(folder: Path, spec: CheckpointSpec) -> str | None:
    """Why ``folder`` can neither be reused nor filled, or None if it can."""
    if not folder.is_dir():
        return "something that is not a folder"
    try:
        names = sorted(entry.name for entry in folder.iterdir())
    except OSError:
        return "a folder that cannot be read"
    if not names:
        return None
    if RECORD not in names:
        return f"{len(names)} other files or folders ({', '.join(names[:3])} ...)"
    return _what_is_wrong_with_record(folder, spec)


def _what_is_wrong_with_record(folder: Path, spec: CheckpointSpec) -> str | None:
    """Why the checkpoint that ``folder`` records is not the one wanted, or None."""
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        sizes = dict(record["files"])
        same = record["format"] == RECORD_FORMAT and record["spec"] == asdict(spec)
    except (OSError, ValueError, KeyError, TypeError):
        return f"a {RECORD} that cannot be read"
    if not same:
        return "a checkpoint of another size, seed or version"
    bad = [name for name, size in sizes.items() if _size(folder / name) != size]
    return f"an incomplete checkpoint ({bad[0]} is missing or changed)" if bad else None


def _size(file: Path) -> int | None:
    return file.stat().st_size if file.is_file() else None


def _write(folder: Path, spec: CheckpointSpec) -> None:
    text = " ".join(TRAINING_TEXT.split())
    tokenizer = trained_tokenizer([text], spec.vocab_size, longest=4096)
    model = _model(spec, tokenizer)
    with quiet():
        model.save_pretrained(folder)
        _processor(spec, tokenizer).save_pretrained(folder)
    files = {entry.name: entry.stat().st_size for entry in sorted(folder.iterdir())}
    record = {"format": RECORD_FORMAT, "spec": asdict(spec), "files": files}
    lines = json.dumps(record, indent=2) + "\n"
    (folder / RECORD).write_text(lines, encoding="utf-8")


def _processor(
    spec: CheckpointSpec, tokenizer: PreTrainedTokenizerFast
) -> LlavaProcessor:
    """LLaVA-1.5's processor: short edge to ``image_size``, then the square middle."""
    side = spec.image_size
    images = CLIPImageProcessorPil(
        size={"shortest_edge": side}, crop_size={"height": side, "width": side}
    )
    return LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=spec.patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )


def _config(spec: CheckpointSpec, vocab_size: int) -> LlavaConfig:
    vision = CLIPVisionConfig(
        hidden_size=spec.vision_hidden,
        intermediate_size=4 * spec.vision_hidden,
        num_hidden_layers=spec.vision_layers,
        num_attention_heads=spec.vision_heads,
        image_size=spec.image_size,
        patch_size=spec.patch_size,
        projection_dim=spec.vision_hidden,
    )
    text = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=spec.hidden,
        intermediate_size=spec.intermediate,
        num_hidden_layers=spec.layers,
        num_attention_heads=spec.heads,
        num_key_value_heads=spec.heads,
        max_position_embeddings=4096,
        bos_token_id=BOS_ID,
        eos_token_id=EOS_ID,
        pad_token_id=PAD_ID,
    )
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=IMAGE_ID,
        image_seq_length=spec.visual_tokens,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        dtype="float32",
    )


def _model(
    spec: CheckpointSpec, tokenizer: PreTrainedTokenizerFast
) -> LlavaForConditionalGeneration:
    """The model, with weights that depend on ``spec.seed`` alone."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(spec.seed)
        model = LlavaForConditionalGeneration(_config(spec, len(tokenizer)))
        for name, parameter in model.named_parameters():
            _draw(name, parameter, spec)
        _shape_head(model, tokenizer)
    model.generation_config = GenerationConfig(
        bos_token_id=BOS_ID,
        eos_token_id=EOS_ID,
        pad_token_id=PAD_ID,
        max_new_tokens=32,
        do_sample=False,
    )
    return model


def _draw(name: str, parameter: nn.Parameter, spec: CheckpointSpec) -> None:
    """Draw one parameter: unit variance goes in, unit variance comes out.

    Two exceptions. What a layer adds to the residual stream shrinks with the number
    of layers, so that tokens differ from each other up to the last one. Queries
    and keys of the decoder are larger: with unit inputs their products, over the root
    of the head's width, have the standard deviation ``LOGIT_STD``.
    """
    if parameter.dim() == 1:  # norms stay 1, biases 0
        if name.endswith("class_embedding"):
            parameter.normal_()
        return
    if name.endswith(("embed_tokens.weight", "position_embedding.weight")):
        parameter.normal_()
        return
    std = parameter[0].numel() ** -0.5
    decoder = ".language_model." in name
    if name.endswith(("o_proj.weight", "down_proj.weight", "out_proj.weight")):
        layers = spec.layers if decoder else spec.vision_layers
        std *= (BRANCH_GAIN if decoder else 1.0) * (2 * layers) ** -0.5
    elif decoder and name.endswith(("q_proj.weight", "k_proj.weight")):
        std *= LOGIT_STD**0.5
    parameter.normal_(std=std)


def _shape_head(
    model: LlavaForConditionalGeneration, tokenizer: PreTrainedTokenizerFast
) -> None:
    """Make greedy decoding readable: complete words, no word twice in a row.

    Rows of special tokens and of parts of words are zero, so decoding always runs to
    the number of tokens that was asked for. The others have a part of their
    token's embedding subtracted.
    """
    head, embedding = model.lm_head, model.model.language_model.embed_tokens
    head.weight -= SELF_AVERSION / head.in_features**0.5 * embedding.weight
    words = set(TRAINING_TEXT.split())
    for token in range(len(tokenizer)):
        text = str(tokenizer.decode([token]))
        if not (text.startswith(" ") and text[1:] in words):
            head.weight[token] = 0.0
