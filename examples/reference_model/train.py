"""Train the reference model from scratch.

    python -m examples.reference_model.train runs/reference

Two stages, each seeded, on pictures drawn as training goes on:

1. *See*: the vision tower learns to name what each patch shows (noun, colour, size,
   centre of a thing) and where it is, from linear readouts. It stands for the
   pretrained tower that a LLaVA starts from.
2. *Talk*: projector and decoder learn to answer, many questions a picture
   (``batches``), the tower frozen. The projector starts from the readouts, in words:
   that stands for the captions by which a LLaVA learns to align the two.

The folder holds the state after every few minutes; the same command goes on from it. At
the end it holds ``checkpoint/``, the curve of the losses among it.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, IterableDataset
from transformers.utils.output_capturing import maybe_install_capturing_hooks

from examples.reference_model.batches import (
    IGNORED,
    NOUNS,
    Batch,
    PatchBatch,
    PatchBatches,
    QuestionBatches,
)
from examples.reference_model.model import (
    PATCH,
    WIDTH,
    build_model,
    build_processor,
    build_tokenizer,
)
from vtprune_fx.errors import InputError
from vtprune_fx.models.loading import quiet
from vtprune_fx.optional import optional
from vtprune_fx.reference.pictures import COLOURS, SIDE
from vtprune_fx.reference.questions import COLUMNS, ROWS

AnyBatch = TypeVar("AnyBatch", Batch, PatchBatch)
Optimizers = list[torch.optim.Optimizer]

WARM_UP = 100
"""Steps over which the learning rate of a stage rises."""
COOL_DOWN = 0.3
"""Share of a stage, its end, over which the learning rate falls to nothing."""
WEIGHT_DECAY = 0.05
QUIETER = 4.0
"""Readouts are so much louder than hidden units should be."""
CLIP = 1.0
"""Largest norm of a step's gradient."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """What decides the result, all of it. The defaults made the shipped checkpoint.

    Attributes:
        see_steps: Steps of the first stage.
        talk_steps: Steps of the second.
        see_rows: Pictures a step of the first stage.
        talk_rows: Rows a step of the second; half as many where each has two pictures.
        rate: Peak learning rate of the matrices inside of layers; a third of it for
            everything else.
        seed: Of the weights and of all pictures and questions.
    """

    see_steps: int = 1500
    talk_steps: int = 13100
    see_rows: int = 64
    talk_rows: int = 12
    rate: float = 4e-3
    seed: int = 0


class Readouts(nn.Module):
    """What the first stage reads off each patch."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.nouns = nn.Linear(WIDTH, len(NOUNS))
        self.colours = nn.Linear(WIDTH, len(COLOURS))
        self.sizes = nn.Linear(WIDTH, 2)
        self.centres = nn.Linear(WIDTH, 2)
        self.rows = nn.Linear(WIDTH, SIDE // PATCH)
        self.columns = nn.Linear(WIDTH, SIDE // PATCH)

    def loss(self, features: Tensor, batch: PatchBatch) -> Tensor:
        """Sum of the cross entropies. ``features`` is [n, VISUAL_TOKENS, WIDTH].

        Nouns count twice, over things alone and over everything: most patches are
        background, and which digit a few of them show would hardly count.
        """
        features = self.norm(features)
        things = batch.nouns.masked_fill(batch.nouns == 0, IGNORED)
        pairs = (
            (self.nouns, batch.nouns),
            (self.nouns, things),
            (self.colours, batch.colours),
            (self.sizes, batch.sizes),
            (self.centres, batch.centres),
            (self.rows, batch.rows),
            (self.columns, batch.columns),
        )
        losses = [
            cross_entropy(
                head(features).float().flatten(0, 1),
                labels.flatten(),
                ignore_index=IGNORED,
            )
            for head, labels in pairs
        ]
        return torch.stack(losses).sum()

    @torch.no_grad()
    def hand_over(
        self, projector: Any, features: Tensor, words: dict[str, Tensor]
    ) -> None:
        """Let a projector turn readouts into words' embeddings.

        Its hidden units become the readouts, and each adds the embedding of its word:
        a patch of a red star starts as the sum of what "red" and "star" start as. A
        linear layer has no norm: the mean spread of some features stands for the
        spread of each. Units that are left keep their weights, over that spread.

        Args:
            projector: From WIDTH features by way of WIDTH units.
            features: [n, VISUAL_TOKENS, WIDTH].
            words: The embedding of each word, [width of the decoder].
        """
        first, second = projector.linear_1, projector.linear_2
        heads = [self.nouns, self.colours, self.sizes, self.rows, self.columns]
        said = [*NOUNS, *COLOURS, "small", "large", *_thirds(ROWS), *_thirds(COLUMNS)]
        weight = torch.cat([head.weight for head in heads])
        bias = torch.cat([head.bias for head in heads]) + weight @ self.norm.bias
        weight = weight * self.norm.weight
        weight = weight - weight.mean(dim=1, keepdim=True)
        count, spread = len(said), features.float().std(dim=2).mean()
        first.weight /= spread
        first.weight[:count] = weight / spread / QUIETER
        first.bias[:count] = bias / QUIETER
        for unit, word in enumerate(said):
            second.weight[:, unit] = words.get(word, torch.tensor(0.0)) / QUIETER


def _thirds(names: tuple[str, str, str]) -> list[str]:
    """The name of each row, or column, of patches."""
    side = SIDE // PATCH
    return [names[3 * index // side] for index in range(side)]


class Training:
    """Model, optimisers and log of one run, written to a folder and read from it.

    Args:
        folder: Where the run lives. What is there is gone on from.
        plan: Must be the plan of what is there.
        device: Where to compute.
        compiled: Whether to compile the model for the second stage: a few minutes at
            first, a fifth of the time saved from then on.
    """

    def __init__(
        self, folder: Path, plan: Plan, device: torch.device, compiled: bool = False
    ) -> None:
        self.folder, self.plan, self.device = folder, plan, device
        self.tokenizer = build_tokenizer()
        self.model = build_model(len(self.tokenizer), plan.seed).train()
        torch.nn.Module.to(self.model, device)  # transformers' has another type
        torch.manual_seed(plan.seed)
        self.readouts = Readouts().to(device)
        self.done = {"see": 0, "talk": 0}
        self.log: list[tuple[str, int, float]] = []
        llava: Any = self.model.model
        self.tower, decoder = llava.vision_tower, llava.language_model
        talking = [llava.multi_modal_projector, decoder]  # whose embeddings also speak
        self.see = _optimizers([self.tower, self.readouts], plan.rate)
        self.talk = _optimizers(talking, plan.rate)
        maybe_install_capturing_hooks(decoder)
        maybe_install_capturing_hooks(self.tower)
        dense: Callable[..., Any] = llava
        # One graph for one picture a row and one for two, each with fixed sizes.
        self.decoder = torch.compile(dense, dynamic=False) if compiled else dense
        images = build_processor(self.tokenizer).image_processor
        self.mean, self.std = (
            torch.tensor(values, device=device)[:, None, None]
            for values in (images.image_mean, images.image_std)
        )
        self._resume()

    def run(self) -> Path:
        """Do what is left of each stage; the folder of the checkpoint."""
        plan, columns = self.plan, [TextColumn("{task.description}"), BarColumn()]
        columns += [MofNCompleteColumn(), TimeRemainingColumn()]
        with Progress(*columns, TextColumn("loss {task.fields[loss]:.3f}")) as progress:
            left = range(self.done["see"], plan.see_steps)
            pictures = PatchBatches(plan.seed, left, plan.see_rows)
            self._stage("see", pictures, self._see_loss, self.see, progress)
            # A decoder that cannot answer yet would make the tower forget what it saw.
            self.tower.requires_grad_(requires_grad=False)
            if not self.done["talk"]:
                self._start_projector()
            left = range(self.done["talk"], plan.talk_steps)
            questions = QuestionBatches(self.tokenizer, plan.seed, left, plan.talk_rows)
            self._stage("talk", questions, self._talk_loss, self.talk, progress)
        return self._finish()

    def _stage(
        self,
        name: str,
        batches: IterableDataset[AnyBatch],
        loss_of: Callable[[AnyBatch], Tensor],
        optimizers: Optimizers,
        progress: Progress,
    ) -> None:
        steps: range = batches.steps  # type: ignore[attr-defined]
        bar = progress.add_task(
            name, total=steps.stop, completed=steps.start, loss=math.nan
        )
        saved, smooth = time.monotonic(), None
        for step, batch in zip(steps, _loaded(batches), strict=True):
            _set_rates(optimizers, step, steps.stop)
            loss = _descend(loss_of(_moved(batch, self.device)), optimizers)
            smooth = loss if smooth is None else 0.98 * smooth + 0.02 * loss
            self.done[name] = step + 1
            progress.update(bar, advance=1, loss=smooth)
            if step + 1 in (1, steps.stop) or (step + 1) % 20 == 0:
                self.log.append((name, step + 1, smooth))
            if time.monotonic() - saved > 120 or step + 1 == steps.stop:
                self._save()
                saved = time.monotonic()

    def _start_projector(self) -> None:
        [pictures] = PatchBatches(self.plan.seed, range(1), self.plan.see_rows)
        with torch.no_grad():
            seen = self.tower(self._pixel_values(pictures.pixels.to(self.device)))
        llava: Any = self.model.model
        table = llava.language_model.embed_tokens.weight
        words = {
            word: table[self.tokenizer.convert_tokens_to_ids(f"\u0120{word}")]
            for word in (*NOUNS[1:], *COLOURS, "small", "large", *ROWS, *COLUMNS)
        }
        features = seen.last_hidden_state[:, 1:]
        self.readouts.hand_over(llava.multi_modal_projector, features, words)

    def _see_loss(self, batch: PatchBatch) -> Tensor:
        with _half_precision(self.device):
            seen = self.tower(self._pixel_values(batch.pixels))
            return self.readouts.loss(seen.last_hidden_state[:, 1:], batch)

    def _talk_loss(self, batch: Batch) -> Tensor:
        answers = batch.labels != IGNORED
        with _half_precision(self.device):
            hidden = self.decoder(
                input_ids=batch.ids,
                pixel_values=self._pixel_values(batch.pixels),
                attention_mask=batch.attention_mask(),
                position_ids=batch.positions,
                use_cache=False,
            ).last_hidden_state
            logits = self.model.lm_head(hidden[answers])
        return cross_entropy(logits.float(), batch.labels[answers])

    def _pixel_values(self, pixels: Tensor) -> Tensor:
        """What the processor makes of pictures: [n, H, W, 3] to [n, 3, H, W] float."""
        values = pixels.permute(0, 3, 1, 2).float() / 255
        return (values - self.mean) / self.std

    def _resume(self) -> None:
        """Read the state that an earlier run left, if one did."""
        if not self._state.is_file():
            return
        with safe_open(self._state, "pt") as file:
            state = json.loads(file.metadata()["training"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        if state["plan"] != dataclasses.asdict(self.plan):
            raise InputError(
                str(self._state),
                expected=f"a run of {self.plan}",
                found=f"a run of {state['plan']}",
                fix="Name another folder, or repeat the options of that run.",
            )
        self.done, self.log = state["done"], [tuple(entry) for entry in state["log"]]
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                parameter.copy_(tensors[f"model.{name}"])
        self.readouts.load_state_dict(_under("readouts", tensors))
        for name, optimizers in (("see", self.see), ("talk", self.talk)):
            for index, optimizer in enumerate(optimizers):
                _load_optimizer(optimizer, _under(f"{name}{index}", tensors))

    def _save(self) -> None:
        """Write the state beside the old one, then put it in its place."""
        # Not the state dict, which holds the tied embeddings twice.
        tensors = _named("model", dict(self.model.named_parameters()))
        tensors |= _named("readouts", self.readouts.state_dict())
        for name, optimizers in (("see", self.see), ("talk", self.talk)):
            for index, optimizer in enumerate(optimizers):
                tensors |= _named(f"{name}{index}", _optimizer_tensors(optimizer))
        state = {
            "plan": dataclasses.asdict(self.plan),
            "done": self.done,
            "log": self.log,
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        scratch = self._state.with_suffix(".part")
        save_file(tensors, scratch, {"training": json.dumps(state)})
        scratch.rename(self._state)

    @property
    def _state(self) -> Path:
        return self.folder / "state.safetensors"

    def _finish(self) -> Path:
        checkpoint = self.folder / "checkpoint"
        with quiet():
            self.model.eval().save_pretrained(checkpoint)
            build_processor(self.tokenizer).save_pretrained(checkpoint)
        with (checkpoint / "training.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(("stage", "step", "loss"))
            writer.writerows((name, at, f"{loss:.4f}") for name, at, loss in self.log)
        draw_losses(self.log, checkpoint / "training.png")
        return checkpoint


def draw_losses(log: list[tuple[str, int, float]], file: Path) -> None:
    """Draw the smoothed loss of each stage over its steps."""
    plots = optional("matplotlib.figure", "matplotlib", "the curve of the losses")
    figure = plots.Figure(figsize=(8, 3.5), layout="constrained")
    for place, stage in enumerate(("see", "talk")):
        axes = figure.add_subplot(1, 2, place + 1, title=stage, xlabel="step")
        line = [(at, loss) for name, at, loss in log if name == stage]
        axes.plot(*zip(*line, strict=True))
        axes.set_yscale("log")
        axes.grid(alpha=0.3)
    figure.savefig(file, dpi=100)


def _optimizers(modules: list[nn.Module], rate: float) -> Optimizers:
    """Muon for the matrices inside of layers, AdamW for everything else."""
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for module in modules:
        for name, parameter in module.named_parameters():
            inside = "layers." in name and parameter.dim() == 2
            (matrices if inside else others).append(parameter)
    return [
        torch.optim.Muon(
            matrices, rate, weight_decay=WEIGHT_DECAY, adjust_lr_fn="match_rms_adamw"
        ),
        torch.optim.AdamW(others, rate / 3, (0.9, 0.98), weight_decay=WEIGHT_DECAY),
    ]


def _set_rates(optimizers: Optimizers, step: int, steps: int) -> None:
    """Rise, stay, fall: the learning rate of one step of a stage."""
    factor = min((step + 1) / WARM_UP, 1.0, (steps - step) / (COOL_DOWN * steps))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group.setdefault("peak", group["lr"]) * factor


def _descend(loss: Tensor, optimizers: Optimizers) -> float:
    """One step downhill; the loss before it."""
    torch.autograd.backward(loss)
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    parameters = [parameter for group in groups for parameter in group["params"]]
    nn.utils.clip_grad_norm_(parameters, CLIP)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
    return loss.item()


def _loaded(batches: IterableDataset[AnyBatch]) -> Iterator[AnyBatch]:
    """Batches, drawn in advance by a separate process."""
    yield from DataLoader(batches, batch_size=None, num_workers=1, prefetch_factor=4)


def _moved(batch: AnyBatch, device: torch.device) -> AnyBatch:
    tensors = {
        field.name: getattr(batch, field.name).to(device)
        for field in dataclasses.fields(batch)
    }
    return dataclasses.replace(batch, **tensors)


def _half_precision(device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16)


def _named(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}.{name}": tensor for name, tensor in tensors.items()}


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    start = f"{prefix}."
    return {n.removeprefix(start): t for n, t in tensors.items() if n.startswith(start)}


def _optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The state of an optimiser, by parameter and name; empty before its first step."""
    state: dict[int, dict[str, Tensor]] = optimizer.state_dict()["state"]
    return {
        f"{i}.{name}": value for i, of in state.items() for name, value in of.items()
    }


def _load_optimizer(
    optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]
) -> None:
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        index, _, field = name.partition(".")
        state.setdefault(int(index), {})[field] = value
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def main() -> None:
    """Read the command line and train."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="where the run lives")
    parser.add_argument("--compile", action="store_true", help="compile stage 2")
    parser.add_argument(
        "--device", default=str(torch.accelerator.current_accelerator() or "cpu")
    )
    for field in dataclasses.fields(Plan):
        option = f"--{field.name.replace('_', '-')}"
        kind: Any = type(field.default)
        parser.add_argument(option, type=kind, default=field.default)
    given = vars(parser.parse_args())
    folder, device = given.pop("folder"), torch.device(given.pop("device"))
    compiled = given.pop("compile")
    print(Training(folder, Plan(**given), device, compiled).run())


if __name__ == "__main__":
    main()
