"""The demo end to end: in miniature, and (slow) whole, with the words and sentences of another grammar seed."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from hf_compress.cache.reader import TeacherCache
from hf_compress.errors import ArgumentError
from hf_compress.report.corpus import LABELS
from hf_compress.report.demo import KEPT, NARROW, STUDENTS, TEACHER, WORDS, run_demo
from hf_compress.report.settings import DemoSettings
from hf_compress.report.table import Row, markdown_table

ALL_ROWS = [("majority class", "labels"), (WORDS, "labels"), (TEACHER, "labels")]
ALL_ROWS += [(student, how) for student in STUDENTS for how in ("labels", "distilled")] + [(NARROW, "from disk")]


def silent() -> Console:
    return Console(file=io.StringIO(), width=160)


def test_a_scale_out_of_range_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=r"scale of the demo is 0; it must be above 0"):
        run_demo(tmp_path / "demo", scale=0, console=silent())
    assert not (tmp_path / "demo").exists()


def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "demo"
    file.write_text("mine")
    with pytest.raises(ArgumentError, match="is a file; the demo needs a folder"):
        run_demo(file, scale=0.01, console=silent())
    assert file.read_text() == "mine"


def test_a_smaller_scale_keeps_the_models_and_shortens_the_rest() -> None:
    whole, part = DemoSettings(), DemoSettings().scaled(0.1)
    assert part.student_schedule.steps == round(0.1 * whole.student_schedule.steps)
    assert part.teacher_examples == round(0.1 * whole.teacher_examples)
    assert (part.hidden_size, part.layers_to_keep) == (whole.hidden_size, whole.layers_to_keep)
    assert whole.scaled(1.0) == whole


@pytest.mark.slow
def test_a_miniature_demo_writes_table_picture_and_models(tmp_path: Path) -> None:
    buffer = io.StringIO()
    console = Console(file=buffer, width=160)
    threads = torch.get_num_threads()
    report = run_demo(tmp_path / "demo", scale=0.005, console=console)
    assert torch.get_num_threads() == threads
    assert [(row.name, row.training) for row in report.rows] == ALL_ROWS

    written = json.loads(report.files["report.json"].read_text())
    assert [Row(**row) for row in written["rows"]] == list(report.rows)
    assert markdown_table(report.rows) in report.files["report.md"].read_text()
    first_line = report.files["report.md"].read_text().splitlines()[0]
    assert first_line == "# hf-compress demo at scale 0.005, which is too short to claim anything"
    assert report.files["picture.png"].stat().st_size > 20_000
    printed = buffer.getvalue()
    for row in report.rows:
        assert all(cell in printed for cell in row.cells())
    for path in (*report.files.values(), *report.models.values()):
        assert str(path) in printed

    assert len(report.models) == 6
    cache = TeacherCache(tmp_path / "demo" / "teacher_on_disk")
    stored = report.row(NARROW, "from disk")
    assert stored.stored_bytes == cache.manifest.bytes > 0
    assert str(cache.selection) == DemoSettings().stored
    assert f"from {stored.stored_bytes / 1e3:.0f} kB on disk" in report.files["report.md"].read_text()
    for name, folder in report.models.items():
        model, tokenizer = AutoModelForSequenceClassification.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
        assert tuple(model.config.id2label.values()) == LABELS, name
        assert model(**tokenizer("the bed was not clean .", "i agree .", return_tensors="pt")).logits.shape == (1, 2)
    teacher, narrow, kept = report.row(TEACHER), report.row(NARROW), report.row(KEPT)
    assert narrow.parameters < kept.parameters < teacher.parameters
    assert teacher.teacher_share == 1.0
    for row in report.rows:
        assert row.teacher_share == pytest.approx(row.accuracy / teacher.accuracy)
        assert row.milliseconds > 0
    for student in STUDENTS:
        assert report.row(student, "distilled").parameters == report.row(student).parameters


@pytest.mark.slow
def test_distilled_beats_labels_only_with_another_grammar(tmp_path: Path) -> None:
    report = run_demo(tmp_path / "demo", seed=7, grammar_seed=7, console=silent())
    assert report.row(TEACHER).accuracy > report.row(WORDS).accuracy + 0.10
    gains = {student: report.gain(student) for student in STUDENTS}
    assert min(gains.values()) > 0, gains
    assert report.row(NARROW, "from disk").accuracy > report.row(NARROW).accuracy
