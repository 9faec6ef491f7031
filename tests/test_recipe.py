"""Recipes: the shipped ones are the published ones, and bad ones are refused."""

from __future__ import annotations

import copy
import itertools
import json
from typing import TYPE_CHECKING

import pytest

from vtprune_fx.errors import RecipeError
from vtprune_fx.recipes.counting import LLAVA_1_5_7B, cost
from vtprune_fx.recipes.loading import _read, load_recipe, recipe_names
from vtprune_fx.recipes.rank_rule import DropByRank, KeepByRank
from vtprune_fx.recipes.schedule import aligned_to_tiles

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from vtprune_fx.recipes.schema import Recipe

Fields = dict[str, object]

# Visual tokens that the published recipes delete, all layers together.
DELETED = {
    "fitprune-llava-1.5-7b-10": 66,
    "fitprune-llava-1.5-7b-20": 149,
    "fitprune-llava-1.5-7b-30": 264,
    "fitprune-llava-1.5-7b-40": 336,
    "fitprune-llava-1.5-7b-50": 403,
    "fitprune-llava-1.5-7b-55": 424,
    "fitprune-llava-1.5-7b-60": 449,
    "fitprune-llava-1.5-7b-70": 488,
    "fitprune-llava-1.5-7b-80": 514,
    "fitprune-llava-1.5-7b-90": 539,
}
# The mean over layers of the visual tokens after each, which gives them their names.
SPARSE = {
    f"{method}-llava-1.5-7b-{mean}": mean
    for method in ("sparsevlm", "sparsevlm-plus")
    for mean in (192, 128, 96, 64)
}
# Tokens that stay behind the last cut, and layers that cut.
SIMPLE = {
    "dart-llava-1.5-7b-192": (192, [1]),
    "dart-llava-1.5-7b-128": (128, [1]),
    "dart-llava-1.5-7b-64": (64, [1]),
    "divprune-llava-1.5-7b-64": (64, [0]),
    "fastv-llava-1.5-7b": (288, [1]),
    "pyramiddrop-llava-1.5-7b": (72, [8, 16, 24]),
    "visionzip-llava-1.5-7b-192": (192, [0]),
    "visionzip-llava-1.5-7b-128": (128, [0]),
    "visionzip-llava-1.5-7b-64": (64, [0]),
    "vtw-llava-1.5-7b": (0, [14]),
}
BY_RANK = {
    f"sparsevlm-rank-llava-1.5-7b-{mean}": rule
    for mean, rule in ((192, (13.5, 0)), (128, (9, 6)), (64, (0.8, 0)))
}
"""Tokens that stay for each rank and beside them, in version 1.0 of the code."""
OTHERS = {
    *SPARSE,
    *BY_RANK,
    *SIMPLE,
    "fitprune-llava-hr-7b-40",
    "fitprune-llava-hr-7b-60",
    "fitprune-llava-next-7b-40",
    "fitprune-llava-next-7b-60",
}
VALID: Fields = {
    "schema_version": 1,
    "name": "mine",
    "method": "fitprune",
    "score": "fitprune",
    "positions": "kept",
    "layers": 4,
    "visual_tokens": 10,
    "of": None,
    "cuts": [{"layer": 1, "drop": 3}, {"layer": 2, "drop": 4}],
    "provenance": {"source": "a test"},
}


KEEP: Fields = {"rule": "keep", "scale": 1}


def drop_by_rank(factor: float) -> DropByRank:
    """The paper's rule; its lambda is no name in Python."""
    return DropByRank.model_validate({"lambda": factor})


def write(path: Path, fields: Fields) -> Path:
    path.write_text(json.dumps(fields), encoding="utf-8")
    return path


def changed(**fields: object) -> Fields:
    return copy.deepcopy(VALID) | fields


def test_all_published_recipes_ship() -> None:
    own = {name for name in recipe_names() if "-reference-" in name}
    assert set(recipe_names()) == set(DELETED) | OTHERS | own


@pytest.mark.parametrize("name", SPARSE)
def test_sparsevlm_recipes_leave_what_they_are_named_after(name: str) -> None:
    loaded = load_recipe(name)
    mean = sum(loaded.tokens_per_layer(576, 32)) / 32
    assert int(mean) == SPARSE[name]
    assert [cut.layer for cut in loaded.cuts] == [2, 6, 15]


def test_recycling_leaves_what_was_recorded() -> None:
    """The published code at "64" has 576, 82, 32 and 18 visual tokens."""
    left = load_recipe("sparsevlm-llava-1.5-7b-64").tokens_per_layer(576, 32)
    assert [left[layer] for layer in (1, 2, 6, 15)] == [576, 82, 32, 18]


@pytest.mark.parametrize("name", BY_RANK)
def test_version_1_0_counts_by_rank(name: str) -> None:
    loaded = load_recipe(name)
    assert loaded.adaptive
    assert [cut.layer for cut in loaded.cuts] == [2, 6, 15, 19]
    for rule in (cut.by_rank for cut in loaded.cuts):
        assert isinstance(rule, KeepByRank)
        assert (rule.scale, rule.bias) == BY_RANK[name]


@pytest.mark.parametrize(
    ("rule", "rank", "visual", "dropped"),
    [
        (KeepByRank(scale=13.5), 23, 576, 576 - 310),  # 310.5
        (KeepByRank(scale=9, bias=6), 23, 576, 576 - 213),
        (KeepByRank(scale=9, bias=6), 23, 213, 1),  # all but one stay at most
        (KeepByRank(scale=0.8), 1, 576, 576),  # 0.8
        (KeepByRank(scale=1, bias=-5), 3, 20, 20),
        (KeepByRank(scale=1), 3, 0, 0),
        (drop_by_rank(0.5), 23, 576, 276),  # 276.5
        (drop_by_rank(1), 23, 576, 553),
        (drop_by_rank(0.5), 22, 23, 0),
        (drop_by_rank(1), 23, 23, 0),
    ],
)
def test_counts_follow_the_rank(
    rule: KeepByRank | DropByRank, rank: int, visual: int, dropped: int
) -> None:
    assert rule.drop(rank, visual) == dropped


@pytest.mark.parametrize(
    "asked",
    [
        lambda r: r.drops(576),
        lambda r: r.needed(576),
        lambda r: r.tokens_per_layer(576, 32),
        lambda r: r.bound(576),
        lambda r: cost(r, LLAVA_1_5_7B, 576, 75),
    ],
)
def test_counts_by_rank_are_no_numbers(asked: Callable[[Recipe], object]) -> None:
    loaded = load_recipe("sparsevlm-rank-llava-1.5-7b-64")
    message = r"rank of each sample's attention\. Calibrate it first: `vtprune calib"
    with pytest.raises(RecipeError, match=message):
        asked(loaded)


def test_recycling_as_in_the_paper() -> None:
    """Of 100 dropped int(0.3 * 100) = 30 form int(0.1 * 30) = 3 clusters."""
    fields = {"tau": 0.3, "theta": 0.1, "form": "paper"}
    cuts = [{"layer": 0, "drop": 100, "site": "after_layer"}]
    mine = changed(visual_tokens=200, cuts=cuts, recycle=fields)
    loaded = load_recipe(mine)
    assert loaded.recycle is not None
    assert loaded.recycle.counts(100) == (30, 3)
    assert loaded.recycle.counts(2) == (1, 1)  # one at least
    assert load_recipe(json.loads(loaded.to_json())) == loaded
    published = load_recipe("sparsevlm-llava-1.5-7b-64").recycle
    assert published is not None
    assert published.counts(100) == (31, 4)  # int(30) + 1, int(3.1) + 1


@pytest.mark.parametrize("name", SIMPLE)
def test_other_recipes_cut_where_published(name: str) -> None:
    loaded = load_recipe(name)
    left, layers = SIMPLE[name]
    assert loaded.tokens_per_layer(576, 32)[-1] == left
    assert [cut.layer for cut in loaded.cuts] == layers


def test_a_recipe_needs_what_every_cut_finds() -> None:
    """8 leave and become 3 * 0.5 + 1 = 2 new ones, of 5 clustered; then 6 leave."""
    cuts = [
        {"layer": at, "drop": n, "site": "after_layer"} for at, n in ((0, 8), (1, 6))
    ]
    loaded = load_recipe(
        changed(cuts=cuts, visual_tokens=12, recycle={"tau": 0.5, "theta": 0.3})
    )
    assert loaded.new_tokens(8) == 2
    assert loaded.needed(12) == 8 - 2 + 6
    assert loaded.tokens_per_layer(12, 2) == [6, 6 - 6 + 2]


def test_recycling_asks_for_cuts_behind_layers() -> None:
    with pytest.raises(RecipeError, match="field cuts: expected cuts after_layer"):
        load_recipe(changed(recycle={"tau": 0.5, "theta": 0.3}))


def test_merging_by_the_towers_keys_asks_for_a_cut_ahead_of_all_layers() -> None:
    recycle = {"tau": 1.0, "theta": 0.3, "form": "contextual"}
    with pytest.raises(RecipeError, match="field cuts: expected one cut before_layer"):
        load_recipe(changed(recycle=recycle))
    cut = {"layer": 0, "drop": 7, "site": "before_layer"}
    loaded = load_recipe(changed(recycle=recycle, cuts=[cut]))
    assert loaded.new_tokens(7) == 2  # 0.3 * 7, rounded down
    assert loaded.sees_tower
    assert not load_recipe(VALID).sees_tower


def test_a_seed_is_written_where_it_matters(tmp_path: Path) -> None:
    drawn = load_recipe(changed(score="random", method="baseline", seed=3))
    path = tmp_path / "drawn.json"
    path.write_text(drawn.to_json(), encoding="utf-8")
    assert load_recipe(path) == drawn
    assert "seed" not in json.loads(load_recipe(VALID).to_json())


def test_baselines_keep_the_cuts() -> None:
    mine = load_recipe(VALID)
    assert [b.score for b in mine.baselines()] == ["random", "uniform", "inverted"]
    for baseline in mine.baselines():
        assert baseline.cuts == mine.cuts
        assert load_recipe(json.loads(baseline.to_json())) == baseline


def test_bound_shares_are_counts() -> None:
    shares = load_recipe(changed(of=10))
    bound = shares.bound(25)  # 3 and 4 of 10 are 7.5 and 10 of 25
    assert (bound.of, bound.visual_tokens) == (None, 25)
    assert bound.drops(25) == bound.drops(30) == {1: 7, 2: 10}


def test_aligned_recipes_leave_whole_tiles() -> None:
    """Of 128 tokens 98, 68 and 48 would be left: in tiles of 32, 128, 96 and 64."""
    cuts = [{"layer": at, "drop": drop} for at, drop in ((1, 30), (3, 30), (5, 20))]
    plain = load_recipe(changed(visual_tokens=100, layers=8, cuts=cuts))
    aligned = aligned_to_tiles(plain, 32, 28)
    assert aligned.drops(100) == {3: 32, 5: 32}
    assert aligned.name == "mine-tile-32"
    assert aligned_to_tiles(plain, 1, 28).drops(100) == plain.drops(100)


def test_shares_are_aligned_as_counts() -> None:
    shares = load_recipe("fitprune-llava-next-7b-60")
    aligned = aligned_to_tiles(shares, 64, 64)
    assert aligned.of is None
    gone = itertools.accumulate(aligned.drops(2880).values())
    assert all((2880 + 64 - count) % 64 == 0 for count in gone)


def test_recipes_with_new_tokens_are_not_aligned() -> None:
    with pytest.raises(RecipeError, match=r"cuts that make new tokens\. Omit"):
        aligned_to_tiles(load_recipe("sparsevlm-llava-1.5-7b-64"), 64, 75)


def test_keep_all_drops_nothing() -> None:
    assert load_recipe(VALID).keep_all().drops(10) == {}


@pytest.mark.parametrize("name", sorted(DELETED))
def test_shipped_recipe_deletes_as_many_tokens_as_published(name: str) -> None:
    loaded = load_recipe(name)
    assert (loaded.layers, loaded.visual_tokens, loaded.of) == (32, 576, None)
    assert sum(loaded.drops(576).values()) == DELETED[name]
    assert loaded.tokens_per_layer(576, 32)[-1] == 576 - DELETED[name]


def test_shipped_recipe_deletes_at_the_published_layers() -> None:
    published = {0: 262, 1: 153, 2: 80, 3: 19, 4: 13, 5: 1, 6: 2}
    published |= {15: 1, 16: 1, 17: 2, 18: 1, 19: 2, 21: 1, 27: 1}
    assert load_recipe("fitprune-llava-1.5-7b-90").drops(576) == published


@pytest.mark.parametrize("name", recipe_names())
def test_shipped_file_is_what_to_json_writes(name: str, tmp_path: Path) -> None:
    loaded = load_recipe(name)
    path = tmp_path / "copy.json"
    path.write_text(loaded.to_json(), encoding="utf-8")
    assert loaded.name == name
    assert load_recipe(path) == loaded
    assert _read(name) == loaded.to_json()


def test_shares_round_down() -> None:
    # Published: layer 0 deletes 7, layer 1 deletes 73 of 2880.
    loaded = load_recipe("fitprune-llava-next-7b-40")
    assert loaded.of == loaded.visual_tokens == 2880
    assert loaded.drops(2880)[0] == 7
    halved = loaded.drops(1440)
    assert (halved[0], halved[1]) == (3, 36)
    assert 24 not in halved  # 1 of 2880 is none of 1440


def test_sample_with_few_visual_tokens_loses_those_it_has() -> None:
    loaded = load_recipe(VALID)
    assert loaded.tokens_per_layer(5, 4) == [5, 2, 0, 0]
    assert loaded.tokens_per_layer(0, 4) == [0, 0, 0, 0]


def test_load_takes_a_name_a_file_fields_or_a_recipe(tmp_path: Path) -> None:
    loaded = load_recipe(VALID)
    assert load_recipe(loaded) is loaded
    assert load_recipe(write(tmp_path / "mine.json", VALID)) == loaded
    assert load_recipe(str(tmp_path / "mine.json")) == loaded


def test_recipe_without_cuts_is_valid() -> None:
    assert load_recipe(changed(cuts=[])).tokens_per_layer(10, 4) == [10] * 4


# What is wrong, the place named, what was expected, what was found.
WRONG: dict[str, tuple[Fields, str, str, str]] = {
    "type of a field": (
        changed(layers="four"),
        "field layers",
        "a valid integer",
        "'four'",
    ),
    "type of a nested field": (
        changed(cuts=[{"layer": 1, "drop": 2.5}]),
        "field cuts.0.drop",
        "a valid integer",
        "2.5",
    ),
    "true is not a number": (
        changed(layers=True),
        "field layers",
        "a valid integer",
        "True",
    ),
    "negative count": (
        changed(cuts=[{"layer": 1, "drop": -1}]),
        "field cuts.0.drop",
        "greater than or equal to 0",
        "-1",
    ),
    "unknown field": (changed(colour="red"), "field colour", "no such field", "'red'"),
    "unknown nested field": (
        changed(cuts=[{"layer": 1, "drop": 1, "keep": 2}]),
        "field cuts.0.keep",
        "no such field",
        "2",
    ),
    "missing field": (
        {key: value for key, value in VALID.items() if key != "method"},
        "field method",
        "field required",
        "nothing",
    ),
    "unknown method": (
        changed(method="magic"),
        "field method",
        "'fitprune'",
        "'magic'",
    ),
    "newer format": (changed(schema_version=2), "field schema_version", "1", "2"),
    "name with a slash": (changed(name="a/b"), "field name", "match pattern", "'a/b'"),
    "unordered cuts": (
        changed(cuts=[{"layer": 2, "drop": 1}, {"layer": 1, "drop": 1}]),
        "field cuts",
        "cuts in the order of their layers, at most one a layer",
        "layer 1 after layer 2",
    ),
    "two cuts in a layer": (
        changed(cuts=[{"layer": 2, "drop": 1}, {"layer": 2, "drop": 1}]),
        "field cuts",
        "at most one a layer",
        "layer 2 after layer 2",
    ),
    "layer beyond the layers": (
        changed(cuts=[{"layer": 4, "drop": 1}]),
        "field cuts",
        "cuts in layers 0 to 3 ('layers' is 4)",
        "a cut in layer 4",
    ),
    "more dropped than there are": (
        changed(cuts=[{"layer": 1, "drop": 6}, {"layer": 2, "drop": 5}]),
        "field cuts",
        "cuts that drop at most the 10 visual tokens there are",
        "11 dropped",
    ),
    "an unknown rule": (
        changed(cuts=[{"layer": 1, "by_rank": {"rule": "halve"}}]),
        "field cuts.0.by_rank",
        "a field 'rule' that is 'keep' or 'drop'",
        "'halve'",
    ),
    "a rule without its name": (
        changed(cuts=[{"layer": 1, "by_rank": {"lambda": 0.5}}]),
        "field cuts.0.by_rank",
        "a field 'rule' that is 'keep' or 'drop'",
        "{'lambda': 0.5}",
    ),
    "lambda out of range": (
        changed(cuts=[{"layer": 1, "by_rank": {"rule": "drop", "lambda": 1.5}}]),
        "field cuts.0.by_rank.drop.lambda",
        "less than or equal to 1",
        "1.5",
    ),
    "lambda that drops none": (
        changed(cuts=[{"layer": 1, "by_rank": {"rule": "drop", "lambda": 0}}]),
        "field cuts.0.by_rank.drop.lambda",
        "greater than 0",
        "0",
    ),
    "a scale that is no number": (
        changed(cuts=[{"layer": 1, "by_rank": KEEP | {"scale": "nan"}}]),
        "field cuts.0.by_rank.keep.scale",
        "finite number",
        "'nan'",
    ),
    "a count and a rule": (
        changed(cuts=[{"layer": 1, "drop": 1, "by_rank": KEEP}]),
        "field cuts.0",
        "a number 'drop' or a rule 'by_rank'",
        "both",
    ),
    "no count": (
        changed(cuts=[{"layer": 1}]),
        "field cuts.0",
        "a number 'drop' or a rule 'by_rank'",
        "neither",
    ),
    "counts and rules": (
        changed(cuts=[{"layer": 1, "drop": 1}, {"layer": 2, "by_rank": KEEP}]),
        "field cuts",
        "either counts or rules by rank",
        "both",
    ),
    "shares and rules": (
        changed(of=10, cuts=[{"layer": 2, "by_rank": KEEP}]),
        "field cuts",
        "either counts or rules by rank",
        "'of' is 10",
    ),
    "an unknown form of recycling": (
        changed(recycle={"tau": 0.3, "theta": 0.1, "form": "cosine"}),
        "field recycle.form",
        "'code', 'paper' or 'contextual'",
        "'cosine'",
    ),
    "more dropped than the share's whole": (
        changed(of=5),
        "field cuts",
        "at most the 5 visual tokens",
        "7 dropped",
    ),
}


@pytest.mark.parametrize("case", list(WRONG))
def test_bad_field_is_named_with_expected_found_and_fix(
    case: str, tmp_path: Path
) -> None:
    fields, place, expected, found = WRONG[case]
    path = write(tmp_path / "bad.json", fields)
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    error = caught.value
    assert error.where == f"recipe {path}, {place}"
    assert expected in error.expected
    assert error.found == found
    assert error.fix == "`vtprune recipes show NAME --json` prints a valid recipe."
    for part in (error.where, error.expected, error.found, error.fix):
        assert part in str(error)


def test_fields_are_checked_like_a_file() -> None:
    with pytest.raises(RecipeError, match="recipe, field layers: expected"):
        load_recipe(changed(layers=0))


def test_long_wrong_value_is_cut_short() -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(changed(method="x" * 5000))
    assert len(str(caught.value)) < 500


def test_a_list_is_not_a_recipe(tmp_path: Path) -> None:
    path = tmp_path / "list.json"
    path.write_text("[]", encoding="utf-8")
    with pytest.raises(RecipeError, match=r"valid dictionary .* found \[\]"):
        load_recipe(path)


def test_not_json_names_the_line(tmp_path: Path) -> None:
    path = tmp_path / "broken.json"
    path.write_text('{\n  "name": oops\n}', encoding="utf-8")
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    assert caught.value.where == f"recipe {path}, line 2"
    assert caught.value.expected == "JSON"
    assert caught.value.found == "Expecting value"
    assert "vtprune recipes show" in caught.value.fix


@pytest.mark.parametrize("content", [None, b"\xff\xfe\x00", "folder"])
def test_no_such_name_or_file(content: bytes | str | None, tmp_path: Path) -> None:
    path = tmp_path / "nowhere.json"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content:
        path.mkdir()
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    assert caught.value.where == f"recipe {str(path)!r}"
    assert caught.value.expected == "the name of a shipped recipe or a recipe file"
    assert caught.value.found
    assert caught.value.fix == "`vtprune recipes` lists the shipped recipes."
