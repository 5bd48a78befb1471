"""Table, JSON and picture of rows that are given here."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import matplotlib.image
import pytest
from rich.console import Console

from hf_compress.report.picture import draw_picture
from hf_compress.report.table import HEADINGS, Row, json_rows, markdown_table, rich_table

ROWS = (
    Row("majority class", "labels", 0, 0.0, 0.0001, 0.0, 0.5, 0.5 / 0.98),
    Row("bag of words", "labels", 163, 0.0013, 0.006, 0.4, 0.61, 0.61 / 0.98),
    Row("teacher", "labels", 472_130, 1.8885, 0.21, 43.2, 0.98, 1.0),
    Row("narrow student", "labels", 75_000, 0.3, 0.07, 9.0, 0.75, 0.75 / 0.98),
    Row("narrow student", "distilled", 75_000, 0.3, 0.071, 12.0, 0.82, 0.82 / 0.98),
    Row("narrow student", "from disk", 75_000, 0.3, 0.071, 11.0, 0.81, 0.81 / 0.98, 136_400),
    Row("kept-layer student", "labels", 250_000, 1.0, 0.11, 10.0, 0.9, 0.9 / 0.98),
    Row("kept-layer student", "distilled", 250_000, 1.0, 0.111, 13.0, 0.96, 0.96 / 0.98),
)


def test_markdown_has_every_cell_of_every_row() -> None:
    lines = markdown_table(ROWS).splitlines()
    cells = [tuple(cell.strip() for cell in line.strip("|").split(" | ")) for line in lines]
    assert cells[0] == HEADINGS
    assert cells[2:] == [row.cells() for row in ROWS]
    assert cells[6] == ("narrow student", "distilled", "75,000", "0.300", "0.071", "12.0", "82.0%", "83.7%")
    assert cells[7][1] == "from disk, 136 kB"


def test_json_has_the_same_rows_with_all_digits() -> None:
    assert [Row(**row) for row in json.loads(json.dumps(json_rows(ROWS)))] == list(ROWS)


def test_terminal_table_shows_all_cells() -> None:
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(rich_table(ROWS, title="rows"))
    text = console.export_text()
    for row in ROWS:
        assert all(cell in text for cell in row.cells())


@pytest.mark.parametrize("worse", [False, True])
def test_picture_is_a_png_with_something_in_it(tmp_path: Path, worse: bool) -> None:
    rows = [replace(row, accuracy=1 - row.accuracy) for row in ROWS] if worse else list(ROWS)
    path = tmp_path / "picture.png"
    draw_picture(rows, path, students=("narrow student", "kept-layer student"), lines=("majority class", "bag of words"))
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    image = matplotlib.image.imread(path)
    assert image.shape[:2] == (1000, 1600)
    inked = (image[..., :3].min(-1) < 0.9).mean()
    assert 0.005 < inked < 0.3
