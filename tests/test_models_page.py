"""The page that ``tests.matrix`` writes has all models and columns that there are."""

from __future__ import annotations

from tests import matrix
from tests.zoo import ZOO

CELLS = {"yes", "-", "refused", "fails", matrix.NOT_RUN}


def test_every_model_has_a_row_and_every_column_a_cell() -> None:
    rows, _ = matrix.written()
    assert list(rows) == list(ZOO)
    text = matrix.PAGE.read_text(encoding="utf-8")
    assert text.startswith(matrix.HEAD), "run `python -m tests.matrix` again"
    assert f"\n| {' | '.join(['model', *matrix.COLUMNS])} |\n" in text
    for name, cells in rows.items():
        cell = dict(zip(matrix.COLUMNS, cells, strict=True))
        assert set(cells) <= CELLS, name
        assert (cell["video"] == "-") == (ZOO[name].video is None), name


def test_whatever_is_not_well_has_a_reason() -> None:
    rows, reasons = matrix.written()
    for name, cells in rows.items():
        for column, cell in zip(matrix.COLUMNS, cells, strict=True):
            found = [r for r in reasons if r.startswith(f"* {name}, {column}: ")]
            assert len(found) == (cell in {"refused", "fails"}), f"{name}, {column}"
