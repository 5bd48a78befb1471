"""`hf-compress student` and `hf-compress drop`, from folder to folder."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoModelForSequenceClassification

from hf_compress.cli.app import main
from tests.tiny_models import tiny_model


@pytest.fixture
def teacher(tmp_path: Path) -> str:
    folder = tmp_path / "teacher"
    tiny_model("bert", num_layers=6, id2label={0: "no", 1: "yes"}, label2id={"no": 0, "yes": 1}).save_pretrained(folder)
    return str(folder)


def test_a_student_of_kept_layers(tmp_path: Path, teacher: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["student", teacher, "-o", str(tmp_path / "student"), "--layers_to_keep", "1-2,6"]) == 0
    student = AutoModelForSequenceClassification.from_pretrained(tmp_path / "student")
    assert student.config.num_hidden_layers == 3
    assert student.config.id2label == {0: "no", 1: "yes"}
    shown = capsys.readouterr().out
    assert shown.splitlines()[0] == "kept 1-2 and 6 of 6, dropped 3-5"
    assert [line.split()[0] for line in shown.splitlines()[2:5]] == ["teacher", "student", "share"]
    assert "no tokenizer was found" in shown


def test_a_student_of_another_width_the_same_for_the_same_seed(tmp_path: Path, teacher: str, capsys: pytest.CaptureFixture[str]) -> None:
    width = ["--num-hidden-layers", "2", "--hidden_size", "8", "--num_attention_heads", "4", "--intermediate_size", "10"]
    for name in ("first", "second"):
        assert main(["student", teacher, "--output_dir", str(tmp_path / name), *width, "--seed", "7"]) == 0
    assert (tmp_path / "first" / "model.safetensors").read_bytes() == (tmp_path / "second" / "model.safetensors").read_bytes()
    config = AutoModelForSequenceClassification.from_pretrained(tmp_path / "first").config
    shown = capsys.readouterr()
    assert shown.out.startswith("random weights: the student knows nothing yet")
    assert "warning" not in shown.err
    assert (config.num_hidden_layers, config.hidden_size, config.num_attention_heads, config.intermediate_size) == (2, 8, 4, 10)


def test_dropping_by_strategy(tmp_path: Path, teacher: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["drop", teacher, "-o", str(tmp_path / "small"), "--strategy", "symmetric", "--num_layers_to_drop", "2"]) == 0
    assert AutoModelForSequenceClassification.from_pretrained(tmp_path / "small").config.num_hidden_layers == 4
    assert "kept 1-2 and 5-6 of 6, dropped 3-4" in capsys.readouterr().out


def test_dropping_by_number_with_the_long_name(tmp_path: Path, teacher: str) -> None:
    assert main(["drop", teacher, "-o", str(tmp_path / "small"), "--layers-to-drop", "6"]) == 0
    assert main(["drop", teacher, "-o", str(tmp_path / "smaller"), "--layer_drop_strategy", "top"]) == 0
    assert AutoModelForSequenceClassification.from_pretrained(tmp_path / "small").config.num_hidden_layers == 5
    assert AutoModelForSequenceClassification.from_pretrained(tmp_path / "smaller").config.num_hidden_layers == 4


def test_a_model_that_cannot_lose_them_leaves_nothing(tmp_path: Path, teacher: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["drop", teacher, "-o", str(tmp_path / "small"), "--strategy", "top", "--num_layers_to_drop", "6"]) == 2
    assert not (tmp_path / "small").exists()
    assert "hf-compress: error: num_layers_to_drop is 6" in capsys.readouterr().err


@pytest.mark.parametrize("head", ["base", "masked_lm"])
def test_a_teacher_without_a_task_is_pointed_out(tmp_path: Path, capsys: pytest.CaptureFixture[str], head: str) -> None:
    tiny_model("bert", head=head).save_pretrained(tmp_path / "untaught")
    assert main(["student", str(tmp_path / "untaught"), "-o", str(tmp_path / "student"), "--num_hidden_layers", "2"]) == 0
    assert "it was not fine-tuned on a task" in capsys.readouterr().err


@pytest.mark.parametrize(("command", "flags"), [("student", ["--num_hidden_layers", "2"]), ("drop", ["--strategy", "top"])])
def test_a_folder_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str, flags: list[str]) -> None:
    assert main([command, "/no/such", "-o", str(tmp_path / "out"), *flags]) == 2
    assert "error: /no/such: there is no such folder." in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "flags", "what"), [("student", ["--num_hidden_layers", "2"], "teacher"), ("drop", ["--strategy", "top"], "model")]
)
def test_the_source_is_not_overwritten(teacher: str, capsys: pytest.CaptureFixture[str], command: str, flags: list[str], what: str) -> None:
    assert main([command, teacher, "-o", teacher, *flags]) == 2
    assert f"is where the {what} is; name another folder, or the {what} would be overwritten" in capsys.readouterr().err


def test_the_sizes_are_the_models_own(tmp_path: Path, teacher: str, capsys: pytest.CaptureFixture[str]) -> None:
    from hf_compress.cli.sizes import size_table

    before, after = tiny_model("bert", num_layers=4), tiny_model("bert", num_layers=2)
    table = size_table(before, after, names=("before", "after")).splitlines()
    share = after.num_parameters() / before.num_parameters()
    assert table[3].split()[1] == f"{share:.1%}"
    assert table[1].split()[1] == f"{before.num_parameters() / 1e6:.2f}M"
