"""Passes on hand-built graphs: what they compute, and when a pass changes nothing.

Expected values come from ``tests.plain_scores``: loops over one sample, no fx.
"""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any

import pytest
import torch

from tests.graphs import (
    HEAD,
    HEADS,
    IMAGE,
    SAMPLES,
    TOKENS,
    WIDTH,
    Inputs,
    Ran,
    Sample,
    Spec,
    as_text,
    decoder,
    inputs_for,
    plain_run,
)
from tests.hand_passes import (
    ATEN,
    CUT_OP,
    FORMS,
    PASSES,
    SCORE_OP,
    Case,
    calls,
    earlier,
    keep_node,
    keep_sets,
    new_node,
    node_named,
    roles_node,
    run,
)
from tests.plain_scores import SCORES, expected, stays
from vtprune_fx.errors import PlanError
from vtprune_fx.graph.stamps import STAMP
from vtprune_fx.graph.values import SHORTER

if TYPE_CHECKING:
    from torch.fx import GraphModule

    from vtprune_fx.passes import Form
    from vtprune_fx.recipes.schema import Site

aten = torch.ops.aten

BY_ATTENTION = ("last-token", "fitprune")


def assert_as_plain(case: Case, module: GraphModule, given: Inputs) -> None:
    """A pruned graph gives what plain loops give, and keeps what they keep.

    Rows of padding are not compared: no token attends to them.
    """
    outputs, _ = run(module, given)
    kept = keep_sets(module, given)
    assert set(kept) == set(case.drops)
    for sample in range(len(given["embeds"])):
        ran, stay = expected(
            case.spec, given, sample, case.score, case.drops, case.site
        )
        for layer, positions in kept.items():
            assert positions[sample].tolist() == stay[layer], (layer, sample)
        assert_outputs(case.spec, outputs, ran, given, sample)


def assert_outputs(
    spec: Spec, outputs: Any, ran: Ran, given: Inputs, sample: int
) -> None:
    padding = padding_of(given, sample)
    start = 0 if spec.last_row else padding
    close(outputs[0][sample][start:], ran.out[start:])
    for layer in range(spec.layers if spec.cached else 0):
        close(outputs[1 + 2 * layer][sample][:, padding:], ran.keys[layer][:, padding:])
        close(
            outputs[2 + 2 * layer][sample][:, padding:], ran.values[layer][:, padding:]
        )


def padding_of(given: Inputs, sample: int) -> int:
    """Tokens of padding, all in front."""
    if "mask" not in given:
        return 0
    mask = given["mask"][sample, 0]
    attends = mask if mask.dtype == torch.bool else mask == 0
    return int((~attends.any(dim=0)).sum())


def close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(found, wanted, atol=2e-5, rtol=1e-4)


# --------------------------------------------------------------- the graphs themselves


SPECS = [
    Spec(),
    Spec(layers=2),
    Spec(attention="eager", mask="float"),
    Spec(kv_heads=1),
    Spec(attention="eager", mask="float", kv_heads=1),
    Spec(mask=None),
    Spec(layers=2, rotary=True),
    Spec(last_row=True),
    Spec(layers=2, flat=True),
]


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_the_hand_built_graph_computes_what_the_loops_do(spec: Spec) -> None:
    """Otherwise every comparison below would compare two mistakes."""
    given = inputs_for(spec, padding=2 if spec.mask else 0)
    outputs, _ = run(decoder(spec), given)
    for sample in range(len(given["embeds"])):
        assert_outputs(spec, outputs, plain_run(spec, given, {}, sample), given, sample)


def test_loops_and_torch_agree_on_attention() -> None:
    """The loops' attention against torch's own, on one sample without padding."""
    spec = Spec()
    given = inputs_for(spec, images=(IMAGE,))
    ran = plain_run(spec, given, {}, 0)
    entered = given["embeds"][0].clone()
    entered[given["is_image"][0]] = given["features"]
    query, key, value = (entered @ given[f"w_{name}0"] for name in ("q", "k", "v"))
    attended = torch.nn.functional.scaled_dot_product_attention(
        query[None], key[None], value[None], is_causal=True
    )[0]
    joined = attended.transpose(0, 1).reshape(-1, HEADS * HEAD)
    added = entered + joined @ given["w_o0"].T
    close(ran.out, added + torch.relu(added @ given["w_m0"].T))


# ------------------------------------------------------------------ what is computed


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("score", list(SCORES))
def test_one_cut_in_each_form_is_the_loops(score: str, form: Form) -> None:
    case = Case(Spec(last_row=True), {0: 2}, score=score, form=form)
    assert_as_plain(case, case.pruned(), inputs_for(case.spec, padding=2))


@pytest.mark.parametrize("form", [ATEN, CUT_OP])
@pytest.mark.parametrize("site", ["after_attention", "after_layer", "before_layer"])
def test_two_cuts_at_each_site_are_the_loops(site: Site, form: Form) -> None:
    spec = Spec(layers=2, last_row=True)
    case = Case(spec, {0: 2, 1: 3}, score="fitprune", site=site, form=form)
    assert_as_plain(case, case.pruned(), inputs_for(spec, padding=1))


@pytest.mark.parametrize(
    ("form", "spec"),
    [
        (CUT_OP, Spec(layers=2, attention="eager", mask="float")),
        (ATEN, Spec(layers=2, kv_heads=1)),
        (CUT_OP, Spec(layers=2, kv_heads=1)),
        (ATEN, Spec(layers=2, attention="eager", mask="float", kv_heads=1)),
        (CUT_OP, Spec(layers=2, mask=None)),
        (ATEN, Spec(layers=2, rotary=True)),
        (ATEN, Spec(layers=3, flat=True)),
        (CUT_OP, Spec(layers=3, flat=True)),
        (CUT_OP, Spec(layers=2, rotary=True, kv_heads=1, last_row=True)),
    ],
    ids=str,
)
def test_every_kind_of_graph_is_the_loops(spec: Spec, form: Form) -> None:
    case = Case(spec, {0: 1, 1: 2}, score="last-token", form=form)
    given = inputs_for(spec, padding=2 if spec.mask else 0)
    assert_as_plain(case, case.pruned(), given)


@pytest.mark.parametrize("form", [ATEN, CUT_OP])
def test_after_two_cuts_tokens_still_have_the_prompts_positions(form: Form) -> None:
    """Rotary tables and roles at a later cut are those of the tokens left."""
    case = Case(Spec(layers=3, rotary=True), {0: 2, 1: 1, 2: 2}, form=form)
    assert_as_plain(case, case.pruned(), inputs_for(case.spec, padding=2))


def test_all_visual_tokens_may_leave() -> None:
    case = Case(Spec(layers=2), {0: IMAGE - 1, 1: 1})
    assert_as_plain(case, case.pruned(), inputs_for(case.spec))


def test_a_sample_of_text_alone_loses_padding() -> None:
    """It stands beside samples with images, and becomes as short as they do."""
    case = Case(Spec(layers=2), {0: 2, 1: 1})
    given = inputs_for(case.spec, images=(IMAGE, 0), padding=4)
    kept = keep_sets(case.pruned(), given)
    # Its padding are the first four tokens; two leave, then one of the two left.
    assert kept[0][1].tolist() == list(range(2, 15))
    assert kept[1][1].tolist() == list(range(1, 13))


@pytest.mark.parametrize("images", [(6, 6), (7, 6, 9), (6,)])
@pytest.mark.parametrize("tokens", [13, 16, 31])
def test_a_graph_serves_batches_and_prompts_of_other_sizes(
    images: tuple[int, ...], tokens: int
) -> None:
    case = Case(drops={0: 4}, score="last-token")
    assert (len(images), tokens) != (SAMPLES, TOKENS)
    assert_as_plain(case, case.pruned(), inputs_for(case.spec, images, tokens))


def test_float64_is_the_loops_to_its_own_precision() -> None:
    case = Case(Spec(layers=2, dtype=torch.float64), {0: 2, 1: 1})
    given = inputs_for(case.spec)
    outputs, _ = run(case.pruned(), given)
    for sample in range(3):
        ran, _ = expected(case.spec, given, sample, "uniform", case.drops, case.site)
        torch.testing.assert_close(outputs[0][sample], ran.out, atol=1e-12, rtol=0)


# ----------------------------------------------------------------------- AsyncChecks


CHECKED = Case(Spec(checked=True), {0: 2})


def test_a_check_stays_on_the_device_and_still_fails() -> None:
    module, _ = CHECKED.run("AsyncChecks")
    given = inputs_for(CHECKED.spec)
    run(module, given)
    given["is_image"] = torch.zeros_like(given["is_image"])
    with pytest.raises(RuntimeError, match=r"check\(is_image\.any\(\)\)"):
        module(*given.values())


def test_the_check_before_the_pass_failed_too() -> None:
    module, _ = CHECKED.planned()
    given = inputs_for(CHECKED.spec)
    given["is_image"] = torch.zeros_like(given["is_image"])
    with pytest.raises(RuntimeError, match="no image"):
        module(*given.values())


def test_a_number_that_something_computes_with_is_no_check() -> None:
    module, plan = CHECKED.planned()
    [item] = calls(module, aten.item.default)
    with module.graph.inserting_after(item):
        module.graph.call_function(operator.not_, (item,))
    text = as_text_without_new(module)
    assert not PASSES["AsyncChecks"](plan, ATEN)(module).modified
    assert as_text_without_new(module) == text


def as_text_without_new(module: GraphModule) -> str:
    return str(module.graph)


# ---------------------------------------------------------------------- InsertScores


@pytest.mark.parametrize("form", FORMS)
def test_scores_change_no_output(form: Form) -> None:
    case = Case(Spec(layers=2), {0: 2, 1: 1}, score="fitprune", form=form)
    before, _ = case.planned()
    given = inputs_for(case.spec, padding=2)
    wanted, _ = run(before, given)
    after, _ = case.run("InsertScores")
    found, _ = run(after, given)
    for one, other in zip(found, wanted, strict=True):
        assert torch.equal(one, other)


def test_roles_say_what_each_token_is_there_for() -> None:
    module, _ = Case(drops={0: 2}).run("InsertScores")
    given = inputs_for(Spec(), tokens=13, padding=3)
    _, values = run(module, given)
    # 0 text, 1 visual, 2 text after the image, 3 padding.
    assert values[roles_node(module)].tolist() == [
        [0, 1, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2],
        [0, 0, 1, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2],
        [3, 3, 3, 0, 1, 1, 1, 1, 1, 1, 2, 2, 2],
    ]


def test_uniform_keeps_what_the_hash_says_by_hand() -> None:
    """i * 40503 mod 65536 for i = 0..5: 0, 40503, 15470, 55973, 30940, 5907."""
    module, _ = Case(drops={0: 3}).run("InsertScores")
    given = inputs_for(Spec(), images=(IMAGE,), tokens=9)
    # The image is at 1 to 6: numbers 0, 5 and 2 score lowest and leave.
    assert keep_sets(module, given)[0].tolist() == [[0, 2, 4, 5, 7, 8]]


def test_images_and_videos_are_both_visual() -> None:
    case = Case(Spec(video=True, mask=None), {0: 3})
    module, _ = case.run("InsertScores")
    given = inputs_for(case.spec, images=(IMAGE,), tokens=10)
    _, values = run(module, given)
    # The image at 1 to 6, the video at 8.
    assert values[roles_node(module)].tolist() == [[0, 1, 1, 1, 1, 1, 1, 0, 1, 2]]


def test_before_a_layer_its_queries_are_computed_twice() -> None:
    """Once to rate by, with all tokens; once by the layer, with those left."""
    case = Case(Spec(layers=2), {1: 2}, score="fitprune", site="before_layer")
    before, _ = case.planned()
    module, _ = case.run("InsertScores")
    weights = node_named(module, "w_q1").users, node_named(before, "w_q1").users
    assert (len(weights[0]), len(weights[1])) == (2, 1)
    # What no score reads is not computed again.
    assert len(node_named(module, "w_v1").users) == 1


def test_by_rank_as_many_stay_as_the_matrix_has_ranks() -> None:
    case = Case(
        Spec(last_row=True), rules={0: {"rule": "keep", "scale": 1.0, "bias": 1.0}}
    )
    module, _ = case.run("InsertScores", "CheckTokens", "GatherTokens")
    given = inputs_for(case.spec, images=(IMAGE,), tokens=10)
    found = keep_sets(module, given)[0][0].tolist()
    stay: list[list[int]] = []

    def cut(at: Sample) -> list[int]:
        asking, visual = (at.roles == 2), (at.roles == 1)
        mean = at.shares.mean(dim=0)
        # Three rows of text ask: at most three ranks.
        rank = int(torch.linalg.matrix_rank(mean[asking][:, visual]))
        assert rank == 3
        stay.append(stays(at, SCORES["uniform"](at), IMAGE - (rank + 1)))
        return stay[0]

    ran = plain_run(case.spec, given, {0: cut}, 0)
    assert found == stay[0]
    assert len(found) == 10 - 2
    outputs, _ = run(module, given)
    close(outputs[0][0], ran.out)


RECYCLED = Case(
    Spec(layers=2),
    {0: 4},
    site="after_layer",
    fields={"recycle": {"tau": 0.5, "theta": 0.5}},
)


def test_two_new_tokens_stand_after_the_last_visual_one() -> None:
    """4 leave, int(2) + 1 = 3 are clustered into int(1.5) + 1 = 2."""
    module, _ = RECYCLED.run("InsertScores")
    given = inputs_for(RECYCLED.spec, images=(IMAGE,), tokens=9)
    _, values = run(module, given)
    # Of the image at 1 to 6 the numbers 1 and 3 stay: they score highest.
    assert values[keep_node(module, 0)].tolist() == [[0, 2, 4, -2, -1, 7, 8]]
    assert values[new_node(module, 0)].shape == (1, 2, WIDTH)


def test_recycled_tokens_are_what_clusters_mean() -> None:
    """Clusters by loops: density peaks, nearest centre, mean (SparseVLM's code)."""
    module = RECYCLED.pruned()
    given = inputs_for(RECYCLED.spec, images=(IMAGE,), tokens=9)
    outputs, values = run(module, given)
    made: list[torch.Tensor] = []

    def cut(at: Sample) -> list[int]:
        # Scores by hand, lowest first: numbers 0, 5, 2, 4 leave, the best three
        # of them, best first, are 4, 2, 5; the image starts at 1.
        at.new = clustered(at.stream[[5, 3, 6]].double(), 2).float()
        made.append(at.new)
        return [0, 2, 4, -2, -1, 7, 8]

    ran = plain_run(RECYCLED.spec, given, {0: cut}, 0, "after_layer")
    close(values[new_node(module, 0)][0], made[0])
    assert_outputs(RECYCLED.spec, outputs, ran, given, 0)


def clustered(tokens: torch.Tensor, clusters: int) -> torch.Tensor:
    """[C, E]: the means of clusters around density peaks."""
    count, width = tokens.shape
    apart = [
        [float((a - b).square().sum() / width) ** 0.5 for b in tokens] for a in tokens
    ]
    density = []
    for row in apart:
        nearest = sorted(row)[:clusters]
        density.append(-sum(distance**2 for distance in nearest) / clusters)
    peaks = []
    for i in range(count):
        denser = [
            apart[i][j]
            for j in range(count)
            if density[j] > density[i] or (density[j] == density[i] and j < i)
        ]
        far = min(denser) if denser else max(map(max, apart))
        peaks.append(far * 2.718281828459045 ** density[i])
    centres = sorted(range(count), key=lambda i: -peaks[i])[:clusters]
    members: list[list[int]] = [[] for _ in centres]
    for i in range(count):
        if i in centres:
            members[centres.index(i)].append(i)
        else:
            near = min(range(clusters), key=lambda c: apart[i][centres[c]])
            members[near].append(i)
    return torch.stack([tokens[each].mean(dim=0) for each in members])


# ----------------------------------------------------------------------- CheckTokens


@pytest.mark.parametrize(
    ("case", "images", "padding", "message"),
    [
        (Case(drops={0: 4}), (6, 3), 0, "at least 4 visual tokens"),
        (Case(drops={0: 4}), (6, 4), 0, None),
        (Case(drops={0: 4}), (6, 0), 3, "or none and 4 tokens of padding"),
        (Case(drops={0: 4}), (6, 0), 4, None),
        (Case(drops={0: 2}, fields={"of": 6}), (6, 5), 0, "exactly 6 visual tokens"),
        (Case(drops={0: 2}, fields={"of": 6}), (6, 7), 0, "exactly 6 visual tokens"),
        (Case(drops={0: 2}, fields={"of": 6}), (6, 6), 0, None),
    ],
    ids=str,
)
def test_a_sample_with_too_few_tokens_fails_and_another_runs(
    case: Case, images: tuple[int, ...], padding: int, message: str | None
) -> None:
    module, _ = case.run("InsertScores", "CheckTokens")
    given = inputs_for(case.spec, images, padding=padding)
    if message is None:
        module(*given.values())
        return
    with pytest.raises(RuntimeError, match=message):
        module(*given.values())


@pytest.mark.parametrize(("padding", "fails"), [(0, True), (1, True), (2, False)])
def test_samples_that_lose_fewer_need_padding(padding: int, *, fails: bool) -> None:
    """Half of 6 leave; a sample of 2 loses one, and two of padding beside it."""
    case = Case(drops={0: 3}, per_sample=True, fields={"of": 6})
    module, _ = case.run("InsertScores", "CheckTokens")
    given = inputs_for(case.spec, images=(6, 2), padding=padding)
    if not fails:
        module(*given.values())
        return
    with pytest.raises(RuntimeError, match="visual tokens and padding, 3 to drop"):
        module(*given.values())


# ---------------------------------------------------------------------- GatherTokens


def test_what_is_read_by_the_output_alone_is_not_gathered() -> None:
    """Keys go into the cache at the length at which they were made."""
    case = Case(Spec(layers=2), {0: 2})
    outputs, _ = run(case.pruned(), inputs_for(case.spec, tokens=15))
    lengths = [outputs[0].shape[1]] + [each.shape[2] for each in outputs[1:]]
    assert lengths == [13, 15, 15, 13, 13]


def test_later_cuts_gather_masks_from_the_prompt() -> None:
    """In plain ATen nothing is gathered of a gathered mask; as operators it is."""
    drops = {0: 2, 1: 1, 2: 1}
    spec = Spec(layers=3)
    module, _ = Case(spec, drops).run("InsertScores", "CheckTokens", "GatherTokens")
    assert len(node_named(module, "mask").users) == 1 + 1 + 2  # roles, layer 0, cuts
    module, _ = Case(spec, drops, form=CUT_OP).run(
        "InsertScores", "CheckTokens", "GatherTokens"
    )
    assert len(node_named(module, "mask").users) == 1 + 1 + 1


def test_per_sample_counts_keep_a_share_of_each() -> None:
    """Half leave: 3 of 6, and 1 of 2, which keeps its row as long by padding."""
    case = Case(Spec(layers=2), {0: 3}, per_sample=True, fields={"of": 6})
    module = case.pruned()
    given = inputs_for(case.spec, images=(6, 2), tokens=15, padding=4)
    outputs, _ = run(module, given)
    kept = keep_sets(module, given)[0]
    for sample, (drop, count) in enumerate([(3, 15), (1, 15)]):
        ran, stay = expected(case.spec, given, sample, "uniform", {0: drop}, case.site)
        padding = padding_of(given, sample)
        wanted = [n for n in stay[0] if n >= padding]
        rows = kept[sample].tolist()
        assert [n for n in rows if n >= padding] == wanted
        assert len(rows) == count - 3
        real = [at for at, n in enumerate(rows) if n >= padding]
        close(outputs[0][sample][real], ran.out[-len(real) :])


def compacted(spec: Spec, form: Form = ATEN, **drops: int) -> Case:
    """A recipe after whose cuts tokens take the first positions."""
    by_layer = {int(name[1:]): drop for name, drop in drops.items()}
    return Case(spec, by_layer, form=form, fields={"positions": "compacted"})


@pytest.mark.parametrize("form", [ATEN, CUT_OP])
def test_compacted_positions_are_the_first_of_the_row(form: Form) -> None:
    """The second layer, with rotary tables for the tokens left, by hand."""
    case = compacted(Spec(layers=2, rotary=True), form, l0=2)
    module, _ = case.run("InsertScores", "CheckTokens", "GatherTokens")
    given = inputs_for(case.spec, images=(IMAGE,), tokens=12)
    outputs, _ = run(module, given)

    def cut(at: Sample) -> list[int]:
        return stays(at, SCORES["uniform"](at), 2)

    # The first layer, then the second on ten tokens at positions 0 to 9.
    first = plain_run(Spec(1, rotary=True), given, {0: cut}, 0)
    rest: Inputs = {"embeds": first.out[None]}
    rest["is_image"] = torch.zeros(1, 10, dtype=torch.bool)
    rest["mask"] = torch.ones(1, 1, 10, 10, dtype=torch.bool).tril()
    rest |= {name: given[name] for name in ("features", "cos", "sin")}
    rest |= {f"w_{n}0": given[f"w_{n}1"] for n in "qkvom"}
    second = plain_run(Spec(1, rotary=True), rest, {}, 0)
    close(outputs[0][0], second.out)
    close(outputs[3][0], second.keys[0])


# ------------------------------------------------------------------------- ShiftKeys


@pytest.mark.parametrize("form", [ATEN, CUT_OP])
def test_cached_keys_are_moved_to_where_the_prompt_ends(form: Form) -> None:
    """Ten tokens at 0 to 9 are handed out as if at 2 to 11: turned by two more."""
    case = compacted(Spec(layers=2, rotary=True), form, l0=2)
    before, _ = case.run("InsertScores", "CheckTokens", "GatherTokens")
    after, _ = case.run("InsertScores", "CheckTokens", "GatherTokens", "ShiftKeys")
    given = inputs_for(case.spec, images=(IMAGE,), tokens=12)
    own, _ = run(before, given)
    moved, _ = run(after, given)
    for same in (0, 1, 2, 4):
        close(moved[same], own[same])
    angles = 2 * torch.tensor([1.0, 0.1])
    first, second = own[3][..., :2], own[3][..., 2:]
    turned = (
        first * angles.cos() - second * angles.sin(),
        second * angles.cos() + first * angles.sin(),
    )
    close(moved[3], torch.cat(turned, dim=-1))


def test_a_sample_without_image_keeps_its_keys() -> None:
    case = compacted(Spec(layers=2, rotary=True), l0=2)
    given = inputs_for(case.spec, images=(IMAGE, 0), tokens=12, padding=3)
    before, _ = case.run("InsertScores", "CheckTokens", "GatherTokens")
    after, _ = case.run("InsertScores", "CheckTokens", "GatherTokens", "ShiftKeys")
    own, moved = run(before, given)[0][3], run(after, given)[0][3]
    close(moved[1], own[1])
    assert not torch.allclose(moved[0], own[0], atol=1e-3)


def test_one_view_of_the_tables_for_all_layers_is_refused_by_name() -> None:
    """After the cut each layer would need the tables of its tokens."""
    case = compacted(Spec(layers=2, rotary=True, one_view=True), l0=2)
    with pytest.raises(PlanError, match=r"rotary positions of layer 1.*a factor that"):
        case.run("InsertScores", "CheckTokens", "GatherTokens", "ShiftKeys")


# -------------------------------------------------------------------------- ReadRows


def test_the_last_row_alone_is_computed_and_is_the_same() -> None:
    case = Case(Spec(last_row=True), {0: 2})
    given = inputs_for(case.spec, tokens=15)
    module = case.pruned()
    outputs, values = run(module, given)
    assert_as_plain(case, module, given)
    for name in ("added0", "out0", "relu_default", "linear_default"):
        assert values[node_named(module, name)].shape[1] == 1, name
    # Attention, keys and values still are of all tokens.
    assert values[node_named(module, "attended0")].shape[2] == 15
    assert outputs[1].shape[2] == 15


def test_a_layer_that_is_attended_to_computes_all_rows() -> None:
    case = Case(Spec(layers=2, last_row=True), {0: 2})
    module = case.pruned()
    _, values = run(module, inputs_for(case.spec, tokens=15))
    assert values[node_named(module, "out0")].shape[1] == 13
    assert values[node_named(module, "out1")].shape[1] == 1


# -------------------------------------------------------------------- ShareAttention


@pytest.mark.parametrize("spec", [Spec(), Spec(mask=None), Spec(layers=2)], ids=str)
def test_attention_and_choice_in_one_are_the_loops(spec: Spec) -> None:
    case = Case(spec, {0: 2}, score="fitprune", form=CUT_OP)
    module, _ = case.run(*list(PASSES)[:7])
    both = torch.ops.vtprune.attend_and_choose.default
    assert len(calls(module, both)) == 1
    given = inputs_for(spec, padding=2 if spec.mask else 0)
    assert_as_plain(case, module, given)


# -------------------------------------------------- OwnLengths, RefreshValues, and all


def test_lengths_of_their_own_change_no_value() -> None:
    case = Case(Spec(layers=2), {0: 2, 1: 1}, form=CUT_OP)
    module, _ = case.run(*list(PASSES)[:8])
    assert_as_plain(case, module, inputs_for(case.spec, padding=2))


def test_refreshed_values_are_the_shapes_that_a_run_gives() -> None:
    case = Case(Spec(layers=2, rotary=True), {0: 2, 1: 1})
    module, _ = case.run(*list(PASSES)[:6], "RefreshValues")
    # Sizes of the example that the graph was made with.
    given = inputs_for(case.spec, images=(IMAGE,) * SAMPLES, tokens=TOKENS)
    _, values = run(module, given)
    compared = 0
    for node, value in values.items():
        recorded: Any = node.meta.get("val")
        assert SHORTER not in node.meta, node.name
        if isinstance(value, torch.Tensor):
            sizes = [hint(size) for size in recorded.shape]
            assert sizes == list(value.shape), node.name
            assert recorded.dtype == value.dtype, node.name
            compared += 1
    assert compared > 80


def hint(size: Any) -> int:
    return size if isinstance(size, int) else int(size.node.hint)


TWO = Spec(layers=2, last_row=True)
ROTATED = Case(
    Spec(layers=3, rotary=True), {0: 2, 1: 1}, "sparsevlm-plus", "after_layer", CUT_OP
)
"""The second choice reads rotary tables that all samples shared before the first."""


@pytest.mark.parametrize(
    "case",
    [*(Case(TWO, {0: 2, 1: 1}, form=form) for form in FORMS), ROTATED],
    ids=[*FORMS, "shared tables"],
)
def test_recorded_values_say_how_many_tokens_a_run_has(case: Case) -> None:
    """A ``Shorter`` is the value at full length, less what was dropped."""
    module = case.pruned()
    given = inputs_for(case.spec, images=(IMAGE,) * SAMPLES, tokens=TOKENS)
    _, values = run(module, given)
    tokens = module.graph.find_nodes(op="placeholder")[0].meta["val"].shape[1]
    compared = 0
    for node, value in values.items():
        short = node.meta.get(SHORTER)
        if short is None or short.dropped is None or not hasattr(value, "shape"):
            continue
        sizes = [
            hint(size) - (short.dropped if same(size, tokens) else 0)
            for size in short.full.shape
        ]
        assert sizes == list(value.shape), node.name
        compared += 1
    assert compared > 20


def same(size: Any, tokens: Any) -> bool:
    return not isinstance(size, int) and size.node.expr == tokens.node.expr


# -------------------------------------------------------- ``modified``, in both cases


CHANGES: dict[str, Case] = {
    "AsyncChecks": CHECKED,
    "InsertScores": Case(drops={0: 2}),
    "CheckTokens": Case(drops={0: 2}),
    "GatherTokens": Case(drops={0: 2}),
    "ShiftKeys": compacted(Spec(layers=2, rotary=True), l0=2),
    "ReadRows": Case(Spec(last_row=True), {0: 2}),
    "ShareAttention": Case(drops={0: 2}, score="fitprune", form=CUT_OP),
    "OwnLengths": Case(drops={0: 2}, form=CUT_OP),
    "RefreshValues": Case(drops={0: 2}),
}

NOTHING: list[tuple[str, str, Case]] = [
    ("AsyncChecks", "no check", Case(drops={0: 2})),
    ("InsertScores", "no cuts", Case()),
    ("CheckTokens", "no cuts", Case()),
    (
        "CheckTokens",
        "counts by rank",
        Case(rules={0: {"rule": "keep", "scale": 1.0}}),
    ),
    ("GatherTokens", "no cuts", Case()),
    ("ShiftKeys", "no cuts", compacted(Spec(layers=2, rotary=True))),
    ("ShiftKeys", "positions kept", Case(Spec(layers=2, rotary=True), {0: 2})),
    ("ReadRows", "no cuts", Case(Spec(last_row=True))),
    ("ReadRows", "all rows come out", Case(drops={0: 2})),
    ("ShareAttention", "no cuts", Case(form=CUT_OP)),
    (
        "ShareAttention",
        "a score that reads no attention",
        Case(drops={0: 2}, form=CUT_OP),
    ),
    (
        "ShareAttention",
        "attention written out",
        Case(
            Spec(attention="eager", mask="float"),
            {0: 2},
            score="fitprune",
            form=CUT_OP,
        ),
    ),
    (
        "ShareAttention",
        "a mask that is added",
        Case(Spec(mask="float"), {0: 2}, score="fitprune", form=CUT_OP),
    ),
    (
        "ShareAttention",
        "a cut after the layer",
        Case(Spec(layers=2), {0: 2}, score="fitprune", site="after_layer", form=CUT_OP),
    ),
    (
        "ShareAttention",
        "double precision",
        Case(Spec(dtype=torch.float64), {0: 2}, score="fitprune", form=CUT_OP),
    ),
    (
        "ShareAttention",
        "score and choice in many operators",
        Case(drops={0: 2}, score="fitprune", form=SCORE_OP),
    ),
    ("OwnLengths", "no cuts", Case()),
    (
        "OwnLengths",
        "counts by rank",
        Case(Spec(last_row=True), rules={0: {"rule": "keep", "scale": 1.0}}),
    ),
    ("RefreshValues", "no cuts", Case()),
]


def ready(name: str, case: Case) -> tuple[GraphModule, Any]:
    """A graph that all passes before ``name`` have written to, and the plan."""
    return case.run(*earlier(name))


@pytest.mark.parametrize("name", list(PASSES))
def test_a_pass_says_that_it_changed_something(name: str) -> None:
    case = CHANGES[name]
    module, plan = ready(name, case)
    text = as_text(module)
    result = PASSES[name](plan, case.form)(module)
    assert result.module is module
    assert result.modified
    assert as_text(module) != text


@pytest.mark.parametrize(
    ("name", "case"),
    [(name, case) for name, _, case in NOTHING],
    ids=[f"{name}: {why}" for name, why, _ in NOTHING],
)
def test_a_pass_with_nothing_to_do_changes_nothing(name: str, case: Case) -> None:
    module, plan = ready(name, case)
    text, nodes = as_text(module), list(module.graph.nodes)
    meta = [dict(node.meta) for node in nodes]
    code = module.code
    result = PASSES[name](plan, case.form)(module)
    assert result.module is module
    assert not result.modified
    assert as_text(module) == text
    assert list(module.graph.nodes) == nodes
    assert [dict(node.meta) for node in nodes] == meta
    assert module.code == code


def test_every_pass_is_among_those_with_nothing_to_do() -> None:
    assert {name for name, _, _ in NOTHING} == set(PASSES)


@pytest.mark.parametrize(
    "name", ["AsyncChecks", "ReadRows", "ShareAttention", "RefreshValues"]
)
def test_a_second_run_finds_nothing_left_to_do(name: str) -> None:
    """Those that look for what they rewrite; the others insert anew at each run."""
    case = CHANGES[name]
    module, plan = ready(name, case)
    pass_ = PASSES[name](plan, case.form)
    assert pass_(module).modified
    text = as_text(module)
    assert not pass_(module).modified
    assert as_text(module) == text


@pytest.mark.parametrize("name", list(PASSES))
def test_a_pass_keeps_inputs_outputs_and_the_origin_of_nodes(name: str) -> None:
    case = CHANGES[name]
    module, plan = ready(name, case)
    [output] = module.graph.find_nodes(op="output")
    returned = [node.name for node in output.all_input_nodes]
    taken = module.graph.find_nodes(op="placeholder")
    before = {node: node.meta.get("nn_module_stack") for node in module.graph.nodes}
    PASSES[name](plan, case.form)(module)
    assert [node.name for node in output.all_input_nodes] == returned
    assert module.graph.find_nodes(op="placeholder") == taken
    for node in module.graph.nodes:
        if node in before:
            assert node.meta.get("nn_module_stack") == before[node]
        else:
            assert node.meta[STAMP].layer in {-1, 0, 1}
            assert "val" in node.meta or SHORTER in node.meta, node.name


@pytest.mark.parametrize("name", list(PASSES))
def test_the_module_runs_what_its_graph_says(name: str) -> None:
    """A pass recompiles the module that it wrote to."""
    case = CHANGES[name]
    module, plan = ready(name, case)
    PASSES[name](plan, case.form)(module)
    given = inputs_for(case.spec)
    by_graph, _ = run(module, given)
    with torch.no_grad():
        by_module = module(*given.values())
    for one, other in zip(by_graph, by_module, strict=True):
        assert torch.equal(one, other)
