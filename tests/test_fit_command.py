"""``vtprune fit``: prompts in, recipes, pictures and statistics out."""

from __future__ import annotations

import importlib.util
import itertools
import json
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.nn.functional import pad
from transformers import LlavaForConditionalGeneration

from tests.test_cli_recipes import Run, io, run
from tests.test_distributed import in_two_processes
from vtprune_fx.errors import InputError, MissingDependencyError
from vtprune_fx.fitting import attention_statistics, job
from vtprune_fx.fitting.by_latency import enough_time
from vtprune_fx.fitting.calibration import Calibration, open_calibration
from vtprune_fx.fitting.coalesce import coalesced, mean_kept
from vtprune_fx.fitting.collect import PARTS, STATISTICS
from vtprune_fx.fitting.job import fit_recipes
from vtprune_fx.fitting.options import Fitted, Options
from vtprune_fx.fitting.search import Account, Prompts
from vtprune_fx.models.loading import open_checkpoint
from vtprune_fx.models.pictures import open_image
from vtprune_fx.oracle import prefill, split_batch
from vtprune_fx.recipes.counting import Geometry, cost
from vtprune_fx.recipes.loading import load_recipe
from vtprune_fx.recipes.schema import Recipe
from vtprune_fx.reference import CHECKPOINT
from vtprune_fx.reference.random_llava import CheckpointSpec, build_checkpoint

__all__ = ["io"]  # a fixture

LAYERS, TOKENS, SAMPLES = 3, 16, 20
SPEC = CheckpointSpec(
    image_size=56, layers=LAYERS, hidden=32, heads=4, intermediate=48, vision_layers=2
)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a checkpoint, and photographs with questions."""
    folder = tmp_path_factory.mktemp("fit")
    build_checkpoint(folder / "checkpoint", SPEC)
    write_data(folder / "data", SAMPLES)
    return folder


def write_data(folder: Path, count: int) -> None:
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    lines = []
    for index in range(count):
        pixels = torch.randint(0, 256, (56, 56, 3), generator=generator)
        Image.fromarray(pixels.byte().numpy()).save(folder / f"{index}.png")
        prompt = "What is it?" + " Tell me more." * (index % 3)
        lines.append(json.dumps({"file_name": f"{index}.png", "prompt": prompt}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")


def command(root: Path, output: Path, *more: str) -> list[str]:
    data = ["--data", str(root / "data"), "--output", str(output)]
    return ["fit", str(root / "checkpoint"), *data, *more]


def fitted(root: Path, output: Path, *budgets: float, **options: Any) -> list[Fitted]:
    calibration = open_calibration(str(root / "data"), SAMPLES)
    opened = open_checkpoint(root / "checkpoint")
    return fit_recipes(*opened, calibration, output, Options(budgets, **options))


@pytest.mark.parametrize("mode", [(), ("--exact",)])
def test_recipes_meet_their_budgets_and_fit_the_model(
    root: Path, tmp_path: Path, io: Run, mode: tuple[str, ...]
) -> None:
    budgets = ("--budget", "0.2", "--budget", "0.3")
    status, out, err = run(*io, *command(root, tmp_path / "out", *budgets, *mode))
    assert status == 0, err
    end = "-exact" * bool(mode)
    model, processor = open_checkpoint(root / "checkpoint")
    data = open_calibration(str(root / "data"), SAMPLES)
    inputs = data.inputs(processor, range(1), torch.device("cpu"))
    for share in (20, 30):
        name = f"fitprune-checkpoint-{share}{end}"
        recipe = load_recipe(tmp_path / "out" / f"{name}.json")
        assert recipe.name == name
        assert (recipe.layers, recipe.visual_tokens) == (LAYERS, TOKENS)
        assert saved(model, processor, recipe, data) >= share / 100
        assert f"budget {share}.0%" in recipe.provenance.note
        assert f"{SAMPLES} samples" in recipe.provenance.note
        assert recipe.provenance.source.startswith("vtprune fit ")
        assert recipe.provenance.model == str(root / "checkpoint")
        assert name in out
        with Image.open(tmp_path / "out" / f"{name}.png") as picture:
            assert picture.width > 500
        assert isinstance(model, LlavaForConditionalGeneration)
        [sample] = split_batch(model, **inputs)
        left = prefill(model, recipe, sample).kept[-1]
        dropped = sum(recipe.drops(TOKENS).values())
        assert len(sample.input_ids) - len(left) == dropped > 0
    status, out, _ = run(*io, "recipes", "show", str(tmp_path / "out" / f"{name}.json"))
    assert status == 0
    assert "Alpha" in out


def timed(root: Path, speed: float, per_cut: float) -> Callable[..., Fitted]:
    """Stands for a machine on which MACs and cuts take so much time."""
    [one] = fitted(root, root / "timed", 0.2)

    def time(share: float, cuts: int | None) -> Fitted:
        count = 10 if cuts is None else cuts
        kept = 1 - share - 0.01 * (10 - count)
        time = speed * share - per_cut * count
        return replace(one, budget=share, kept=kept, saved_time=time)

    return time


def test_what_keeps_most_attention_of_what_is_fast_enough_is_chosen(root: Path) -> None:
    dear = enough_time(timed(root, 1.0, 0.03), 0.3, (None, 6, 3))
    free = enough_time(timed(root, 0.8, 0.0), 0.3, (None, 6, 3))
    for chosen in (dear, free):
        assert chosen.saved_time is not None
        assert 0.3 <= chosen.saved_time <= 0.33
        assert chosen.budget == 0.3
    assert dear.kept == pytest.approx(0.93 - (0.31 + 0.09), abs=0.02)  # 3 cuts
    assert free.kept == pytest.approx(1 - 0.31 / 0.8, abs=0.02)  # 10 cuts


def test_time_that_no_recipe_saves_is_an_error(root: Path) -> None:
    with pytest.raises(InputError, match=r"18\.0% saved by the fastest"):
        enough_time(timed(root, 0.2, 0.0), 0.3, (None,))


def test_time_is_not_measured_in_an_exact_search(root: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="an exact search"):
        fitted(root, tmp_path / "out", 0.2, exact=True, latency="torch")
    assert not (tmp_path / "out").exists()


def test_time_is_not_measured_on_a_target_that_is_not_there(
    root: Path, tmp_path: Path, io: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Refused ahead of everything: data and model are not even looked for."""
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, package=None: None if name == "onnx" else find(name, package),
    )
    arguments = command(root / "nowhere", tmp_path / "out", "--budget", "0.2")
    status, _, err = run(*io, *arguments, "--latency", "onnx")
    assert status == 1
    err = " ".join(err.split())
    assert "expected the package onnx, found it is not installed" in err
    assert "vtprune-fx[onnxruntime]" in err
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("target", ["torch", "onnx"])
def test_recipes_are_timed_on_a_target(
    root: Path, tmp_path: Path, io: Run, monkeypatch: pytest.MonkeyPatch, target: str
) -> None:
    shares: list[float] = []

    def first(
        timed: Callable[..., Fitted], budget: float, limits: Sequence[int | None]
    ) -> Fitted:
        assert (budget, limits) == (0.2, (2,))
        one = timed(budget, 2)
        assert one.saved_time is not None
        shares.append(one.saved_time)
        return one

    # So small a model may well be slower pruned: whatever it takes is taken.
    monkeypatch.setattr(job, "enough_time", first)
    more = ("--budget", "0.2", "--latency", target, "--max-cuts", "2")
    status, out, err = run(*io, *command(root, tmp_path / "out", *more))
    assert status == 0, err
    name = f"fitprune-checkpoint-20-{target}-2-cuts"
    recipe = load_recipe(tmp_path / "out" / f"{name}.json")
    assert len(recipe.cuts) <= 2
    assert f"Measured: {shares[0]:.1%} of the time saved" in recipe.provenance.note
    assert shares[0] < 1
    assert name in out.replace("\n", "")


def saved(model: Any, processor: Any, recipe: Recipe, data: Calibration) -> float:
    """Share of all MACs, each prompt counted by itself."""
    geometry, dense, pruned = Geometry.from_config(model.config), 0, 0
    for index in range(len(data)):
        inputs = data.inputs(processor, range(index, index + 1), torch.device("cpu"))
        text = inputs["input_ids"].shape[1] - TOKENS
        work = cost(recipe, geometry, TOKENS, text).total
        dense, pruned = dense + work.dense_macs, pruned + work.pruned_macs
    return 1 - pruned / dense


def test_a_second_budget_takes_the_statistics_that_are_there(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    [first] = fitted(root, tmp_path / "out", 0.3)
    monkeypatch.setattr(job, "observe", None)  # the model does not run again
    [second] = fitted(root, tmp_path / "out", 0.4)
    file = tmp_path / "out" / STATISTICS
    [third] = fitted(root, tmp_path / "other", 0.3, statistics=file)
    assert third.recipe.cuts == first.recipe.cuts
    names = {path.name for path in (tmp_path / "out").iterdir()}
    told = json.loads((tmp_path / "out" / "fit.json").read_text())["recipes"]
    assert [fields["budget"] for fields in told] == [0.3, 0.4]
    for one in (first, second):
        assert {f"{one.recipe.name}.json", f"{one.recipe.name}.png"} <= names


@pytest.mark.parametrize("exact", [False, True])
def test_a_run_that_was_cut_short_goes_on(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exact: bool
) -> None:
    whole = fitted(root, tmp_path / "whole", 0.3, exact=exact)
    calls = interrupted(monkeypatch, 3)
    with pytest.raises(KeyboardInterrupt):
        fitted(root, tmp_path / "out", 0.3, exact=exact)
    parts = tmp_path / "out" / PARTS
    assert len(list(parts.iterdir())) == 2
    again = fitted(root, tmp_path / "out", 0.3, exact=exact)
    assert len(calls) == 4  # three batches in all: the third was begun twice
    assert again == whole
    assert not parts.exists()
    assert_same_folders(tmp_path / "out", tmp_path / "whole")


def interrupted(monkeypatch: pytest.MonkeyPatch, batch: int) -> list[int]:
    """Stop the first run while it takes a batch; an entry for each that was begun."""
    observe, calls = attention_statistics.observe, list[int]()

    def dying(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == batch:
            raise KeyboardInterrupt
        return observe(*arguments)

    monkeypatch.setattr(job, "observe", dying)
    return calls


def test_what_another_run_began_is_not_gone_on_with(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its batches stay: the other run may still go on with them."""
    interrupted(monkeypatch, 3)
    with pytest.raises(KeyboardInterrupt):
        fitted(root, tmp_path / "out", 0.3)
    begun = sorted((tmp_path / "out" / PARTS).iterdir())
    few = open_calibration(str(root / "data"), SAMPLES - 1)
    opened = open_checkpoint(root / "checkpoint")
    with pytest.raises(InputError, match=r"those of data .* or another folder"):
        fit_recipes(*opened, few, tmp_path / "out", Options([0.3]))
    assert sorted((tmp_path / "out" / PARTS).iterdir()) == begun


def assert_same_folders(one: Path, other: Path) -> None:
    """The same recipes, from the same statistics to the last bit."""
    texts = [{f.name: f.read_text() for f in d.glob("*.json")} for d in (one, other)]
    assert texts[0] == texts[1]
    mine, theirs = (load_file(folder / STATISTICS) for folder in (one, other))
    assert mine.keys() == theirs.keys()
    for name, value in mine.items():
        assert torch.equal(value, theirs[name]), name


def short(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def flipped(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-100] ^= 1
    file.write_bytes(content)


def reshaped(file: Path) -> None:
    """One sample less, and everything else as it was."""
    with safe_open(file, framework="pt") as opened:
        told = opened.metadata()
    save_file({k: v[1:] for k, v in load_file(file).items()}, file, told)


def incomplete(file: Path) -> None:
    with safe_open(file, framework="pt") as opened:
        told = opened.metadata()
    left = {k: v for k, v in load_file(file).items() if k != "own"}
    save_file(left, file, told)


@pytest.mark.parametrize(
    ("harm", "found"),
    [
        (lambda file: file.write_bytes(b""), "found "),
        (lambda file: file.write_bytes(b"no statistics"), "found "),
        (short, "found "),
        (incomplete, "own"),
        (flipped, "not match its checksum"),
        (reshaped, "not match its checksum"),
    ],
)
def test_broken_statistics_are_one_message(
    root: Path, tmp_path: Path, harm: Callable[[Path], None], found: str
) -> None:
    fitted(root, tmp_path / "out", 0.3)
    file = tmp_path / "out" / STATISTICS
    harm(file)
    message = rf"statistics .*{STATISTICS}: expected .*{found}.*Delete it"
    with pytest.raises(InputError, match=message):
        fitted(root, tmp_path / "out", 0.3)
    with pytest.raises(InputError, match=message):
        fitted(root, tmp_path / "new", 0.3, statistics=file)


def test_statistics_of_something_else_are_refused(root: Path, tmp_path: Path) -> None:
    fitted(root, tmp_path / "out", 0.3)
    calibration = open_calibration(str(root / "data"), SAMPLES - 1)
    model, processor = open_checkpoint(root / "checkpoint")
    with pytest.raises(InputError, match="those of data"):
        fit_recipes(model, processor, calibration, tmp_path / "out", Options([0.3]))
    with torch.no_grad():
        next(model.parameters()).add_(1)
    calibration = open_calibration(str(root / "data"), SAMPLES)
    with pytest.raises(InputError, match="those of model"):
        fit_recipes(model, processor, calibration, tmp_path / "out", Options([0.3]))


@pytest.mark.parametrize("name", ["notes.txt", "photo.png"])
def test_a_folder_with_something_else_is_left_alone(
    root: Path, tmp_path: Path, io: Run, name: str
) -> None:
    (tmp_path / name).write_text("mine")
    status, _, err = run(*io, *command(root, tmp_path, "--budget", "0.3"))
    assert status == 1
    assert f"found {name}. Choose another folder" in " ".join(err.split())
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("budget", ["0", "1", "1.5", "-0.2", "60"])
def test_a_wrong_budget_is_refused_at_once(
    root: Path, tmp_path: Path, io: Run, budget: str
) -> None:
    out = tmp_path / "out"
    arguments = command(root, out, "--budget", budget)
    status, _, err = run(*io, *arguments)
    assert status == 1
    assert "between 0 and 1" in " ".join(err.split())
    assert not out.exists()


@pytest.mark.parametrize("device", ["abacus", "cuda:99"])
def test_a_device_that_is_not_there_is_refused_at_once(
    root: Path, tmp_path: Path, io: Run, device: str
) -> None:
    arguments = command(root / "nowhere", tmp_path / "out", "--budget", "0.3")
    status, _, err = run(*io, *arguments, "--device", device)
    assert status == 1
    said = " ".join(err.split())
    assert "--device: expected cpu, or cuda" in said
    assert f"found {device!r}" in said
    assert not (tmp_path / "out").exists()


def test_a_budget_out_of_reach_keeps_the_statistics(root: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="at most"):
        fitted(root, tmp_path / "out", 0.99)
    assert [path.name for path in (tmp_path / "out").iterdir()] == [STATISTICS]


def test_visual_tokens_alone(root: Path, tmp_path: Path) -> None:
    [one] = fitted(root, tmp_path / "out", 0.4, count="visual")
    assert one.saved_visual >= 0.4 > one.saved
    model = open_checkpoint(root / "checkpoint")[0]
    work = cost(one.recipe, Geometry.from_config(model.config), TOKENS, 0).visual
    assert work.saved == pytest.approx(one.saved_visual)
    assert one.recipe.name == "fitprune-model-40-visual"


@pytest.mark.parametrize("cuts", [1, 3])
def test_cuts_are_merged_within_the_budget(tmp_path: Path, cuts: int) -> None:
    opened, data = open_checkpoint(CHECKPOINT), open_calibration("reference", 8)
    [plain, merged] = [
        fit_recipes(*opened, data, tmp_path / "out", Options([0.4], max_cuts=most))[0]
        for most in (None, cuts)
    ]
    assert len(plain.recipe.cuts) > cuts
    assert 0 < len(merged.recipe.cuts) <= cuts
    dropped = [sum(one.recipe.drops(144).values()) for one in (plain, merged)]
    assert dropped[0] == dropped[1]
    assert merged.saved >= 0.4
    assert merged.kept_before == plain.kept
    assert f"{merged.kept:.1%} of the attention kept" in merged.recipe.provenance.note


def test_merged_cuts_are_near_the_best_there_are() -> None:
    """Against all ways to merge seven cuts into at most three, one by one."""
    generator = torch.Generator().manual_seed(0)
    drops, layers, usual = (3, 2, 0, 4, 1, 2, 3, 5), 8, 24
    geometry = Geometry(layers, 32, 48, 4, 4, 8)
    prompts = Prompts(torch.tensor([usual, usual]), torch.tensor([9, 12]))
    held = torch.rand(layers, usual, generator=generator, dtype=torch.float64)
    # The strongest token holds most, hence shares of a few grow fast.
    held = held.sort(dim=1, descending=True).values ** 3
    kept = pad((held / held.sum(dim=1, keepdim=True)).cumsum(dim=1), (1, 0))
    budget = saved_by(geometry, prompts, drops)
    found = coalesced(drops, 3, kept, geometry, prompts, budget)
    assert sum(found) == sum(drops)
    assert sum(map(bool, found)) <= 3
    assert saved_by(geometry, prompts, found) >= budget
    best = max(
        mean_kept(kept, way)
        for way in ways(drops, 3)
        if saved_by(geometry, prompts, way) >= budget
    )
    assert mean_kept(kept, found) >= best - 0.01
    assert coalesced(drops, 7, kept, geometry, prompts, budget) == drops


def saved_by(geometry: Geometry, prompts: Prompts, drops: Sequence[int]) -> float:
    account = Account(geometry, prompts)
    for drop in drops:
        account.cut(drop)
    return account.saved()


def ways(drops: Sequence[int], most: int) -> Iterator[list[int]]:
    """Neighbours merged, wherever in their layers the merged cut may be."""
    at = [layer for layer, drop in enumerate(drops) if drop]
    for count in range(1, most + 1):
        for ends in itertools.combinations(range(1, len(at)), count - 1):
            bounds = itertools.pairwise((0, *ends, len(at)))
            groups = [at[first:last] for first, last in bounds]
            places = (range(group[0], group[-1] + 1) for group in groups)
            for chosen in itertools.product(*places):
                merged = [0] * len(drops)
                for layer, group in zip(chosen, groups, strict=True):
                    merged[layer] = sum(drops[own] for own in group)
                yield merged


def bad_line(line: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        write_data(folder, 2)
        with (folder / "metadata.jsonl").open("a") as file:
            file.write(line + "\n")

    return write


def no_image(folder: Path) -> None:
    write_data(folder, 2)
    (folder / "1.png").write_text("no image")


def no_lines(folder: Path) -> None:
    write_data(folder, 0)


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (no_lines, "found no samples"),
        (Path.mkdir, "a folder without metadata.jsonl"),
        (Path.touch, "found a file"),
        (lambda _: None, "no such folder"),
        (no_image, "not a readable image"),
        (bad_line("{"), "metadata.jsonl, line 3"),
        (bad_line("[]"), "found list"),
        (bad_line('{"prompt": "Why?"}'), "found no file_name"),
        (bad_line('{"file_name": "0.png"}'), "found no prompt"),
        (bad_line('{"file_name": "x.png", "prompt": "Why?"}'), "no file x.png"),
    ],
)
def test_prompts_that_are_not_usable(
    tmp_path: Path, write: Callable[[Path], None], message: str
) -> None:
    folder = tmp_path / "data"
    write(folder)
    with pytest.raises(InputError, match=message):
        open_calibration(str(folder), 8).fingerprint()


def test_limit_takes_the_first_samples(root: Path) -> None:
    few = open_calibration(str(root / "data"), 3)
    assert len(few) == 3
    assert few.fingerprint() != open_calibration(str(root / "data"), 4).fingerprint()


def test_prompts_of_like_length_run_together() -> None:
    """No prompt with one image is padded to the length of one with two."""
    data = open_calibration("reference", 20)
    batches = data.batches()
    assert sorted(itertools.chain(*batches)) == list(range(20))
    images = [{len(data.openers[i]()[1]) for i in batch} for batch in batches]
    assert images == [{1}, {1}, {2}]
    assert max(map(len, batches)) == 8


def test_a_data_set_needs_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingDependencyError, match=r"vtprune-fx\[datasets\]"):
        open_calibration("owner/photos", 8)


def test_rows_of_a_data_set(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of what the package gives, what is read: a column of images, one of prompts."""
    images = [open_image(root / "data" / f"{i}.png") for i in range(3)]
    rows: list[dict[str, Any]] = [{"image": im, "prompt": "Why?"} for im in images]
    fake = types.SimpleNamespace(load_from_disk=lambda _: rows)
    monkeypatch.setitem(sys.modules, "datasets", fake)
    (tmp_path / "state.json").write_text("{}")
    assert len(open_calibration(str(tmp_path), 2)) == 2
    rows[1]["image"] = None
    with pytest.raises(InputError, match=r"row 2: expected .* found no image"):
        open_calibration(str(tmp_path), 2)


def test_images_of_other_sizes_are_shares(root: Path, tmp_path: Path) -> None:
    """Prompts with one and with two images: recipes count in those of most."""
    data = open_calibration(str(root / "data"), SAMPLES)

    def doubled(index: int) -> Any:
        text, images = data.openers[index]()
        return text, images * (2 if index % 4 == 0 else 1)

    openers = [lambda index=index: doubled(index) for index in range(SAMPLES)]
    opened = open_checkpoint(root / "checkpoint")
    for exact in (False, True):
        [one] = fit_recipes(
            *opened,
            Calibration("mixed", openers),
            tmp_path / "out",
            Options([0.3], exact=exact),
        )
        assert (one.recipe.visual_tokens, one.recipe.of) == (TOKENS, TOKENS)
        assert one.saved >= 0.3


@pytest.mark.slow
def test_two_processes_find_what_one_finds(root: Path, tmp_path: Path) -> None:
    (tmp_path / "root").symlink_to(root)
    fitted(tmp_path / "root", tmp_path / "one", 0.2, 0.3, exact=True)
    in_two_processes(_fit_together, tmp_path)
    assert_same_folders(tmp_path / "two", tmp_path / "one")


def _fit_together(_: int, folder: Path) -> None:
    fitted(folder / "root", folder / "two", 0.2, 0.3, exact=True)


def test_help_shows_an_example(io: Run) -> None:
    status, out, _ = run(*io, "fit", "--help")
    assert status == 0
    assert "Example: vtprune fit" in out
