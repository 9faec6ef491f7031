"""Each pass's golden texts: what it writes, readable as a diff of the graph.

That what is written is also right is shown by computation in ``test_hand_passes``: a
golden text alone only says that nothing changed.
"""

from __future__ import annotations

import pytest

from tests.graph_cases import CASES, FOLDER, before_and_after, golden, path_of
from tests.hand_passes import PASSES


@pytest.mark.parametrize("name", list(CASES))
def test_the_graph_is_the_golden_text(name: str) -> None:
    assert golden(name) == path_of(name).read_text(encoding="utf-8")


def test_every_text_has_a_case_and_every_pass_a_text() -> None:
    assert {path.stem for path in FOLDER.iterdir()} == set(CASES)
    assert {pass_name for pass_name, _ in CASES.values()} == set(PASSES)


def test_a_golden_text_tells_before_from_after() -> None:
    before, after = before_and_after("async_checks")
    lines = path_of("async_checks").read_text(encoding="utf-8").splitlines()
    assert [line[2:] for line in lines if line[0] != "+"] == before.splitlines()
    assert [line[2:] for line in lines if line[0] != "-"] == after.splitlines()
