"""`hf-compress student --init pca`, from folder to folder."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from hf_compress.cli.app import main
from hf_compress.projection_file import read_projections
from hf_compress.students.from_teacher import load_teacher
from hf_compress.students.warm_record import recorded_warm_start
from tests.students.conftest import tokenizer
from tests.tiny_models import tiny_model

__all__ = ["tokenizer"]
WORDS = ("one", "two", "three", "four", "five")


@pytest.fixture
def teacher(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> str:
    folder = tmp_path / "teacher"
    tiny_model("bert", num_layers=2).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def texts(tmp_path: Path) -> str:
    path = tmp_path / "train.csv"
    with path.open("w", newline="", encoding="utf-8") as out:
        writer = csv.writer(out)
        writer.writerow(["sentence", "label"])
        for row in range(60):
            writer.writerow([" ".join(WORDS[(row * 3 + place * (row + 1)) % 5] for place in range(3 + row % 6)), row % 2])
    return str(path)


def test_a_student_is_written_with_its_projection(tmp_path: Path, teacher: str, texts: str, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "student"
    assert (
        main(["student", teacher, "-o", str(out), "--num_hidden_layers", "1", "--hidden-size", "8", "--init", "pca", "--train_file", texts])
        == 0
    )
    printed = capsys.readouterr().out
    assert "1:2 (student:teacher)" in printed
    assert "random weights" not in printed
    student = load_teacher(str(out))
    record = recorded_warm_start(student.config)
    assert record is not None
    assert record.head
    assert read_projections(out)["layers_shared.weight"].shape == (16, 8)
    size = sum(parameter.numel() for parameter in student.parameters())
    assert f"{size / 1e6:.2f}M" in printed


def test_fewer_examples_are_refused_where_the_basis_needs_more(
    tmp_path: Path, teacher: str, texts: str, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--hidden_size", "8", "--init", "pca", "--train_file", texts, "--num_examples", "4"]
    assert main(["student", teacher, "-o", str(tmp_path / "student"), *flags]) != 0
    assert "tokens at least" in capsys.readouterr().err
    assert not (tmp_path / "student").exists()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--hidden_size", "8", "--task_name", "mrpc"], "Add --init pca"),
        (["--hidden_size", "8", "--init", "pca"], "--task_name or --train_file"),
        (["--hidden_size", "8", "--init", "pca", "--task_name", "mrpc", "--train_file", "x.csv"], "give one of them"),
        (["--hidden_size", "8", "--init", "pca", "--task_name", "nothing"], "no GLUE task"),
        (["--hidden_size", "8", "--init", "pca", "--train_file", "not_there.csv"], "no such file"),
        (["--num_hidden_layers", "1", "--init", "pca", "--train_file", "x.csv"], "another width"),
    ],
)
def test_what_contradicts_itself_is_refused(
    tmp_path: Path, teacher: str, flags: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["student", teacher, "-o", str(tmp_path / "student"), *flags]) != 0
    assert words in capsys.readouterr().err
    assert not (tmp_path / "student").exists()
