"""The page that ``tests.matrix`` writes has all models and columns that there are."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from tests import matrix
from tests.zoo import ZOO

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

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


def test_families_run_without_their_sliding_windows_are_named() -> None:
    """As released they are refused: the page must not claim more than was run."""
    changed = set()
    for name, kind in ZOO.items():
        run = kind.config().get_text_config()
        if _slides(type(run)()) and not _slides(run):
            changed.add(name)
    text = matrix.PAGE.read_text(encoding="utf-8")
    [said] = re.findall(
        r"^\* (\*\*.+) were run with all layers set to full", text, re.M
    )
    assert set(re.findall(r"\*\*(.+?)\*\*", said)) == changed


def _slides(decoder: PreTrainedConfig) -> bool:
    """Whether a configuration has layers that attend to a window alone."""
    return "sliding_attention" in (getattr(decoder, "layer_types", None) or ())
