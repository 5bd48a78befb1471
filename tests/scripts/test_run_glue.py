"""The packaged run_glue on one's own files: text labels, and files that cannot be learnt from."""

from __future__ import annotations

import json
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hf_compress.scripts.run_glue import main
from tests.kept_logging import logging_as_it_was as logging_as_it_was
from tests.tiny_models import tiny_model

WORDS = ["the", "room", "was", "clean", "quiet", "dirty", "loud", "and", "bad", "good"]
ROWS = [("the room was clean", "good"), ("the room was dirty", "bad"), ("quiet and clean", "good"), ("loud and dirty", "bad")] * 2


@pytest.fixture
def model(tmp_path: Path) -> str:
    vocabulary = {word: number for number, word in enumerate(["[PAD]", "[UNK]", *WORDS])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    folder = str(tmp_path / "model")
    tiny_model("bert", num_layers=2).save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]", model_max_length=16).save_pretrained(folder)
    return folder


def write_csv(path: Path, rows: list[tuple[str, ...]], header: str = "sentence,label") -> str:
    path.write_text("\n".join([header, *(",".join(row) for row in rows)]) + "\n")
    return str(path)


def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str, *flags: str, script: Callable[[], None] = main) -> None:
    fixed = ["--output_dir", str(tmp_path / "out"), "--use_cpu", "True", "--max_steps", "1", "--report_to", "none", "--save_strategy", "no"]
    monkeypatch.setattr(
        sys,
        "argv",
        ["run_glue.py", "--model_name_or_path", model, "--cache_dir", str(tmp_path / "cache"), "--disable_tqdm", "True", *fixed, *flags],
    )
    script()


def test_text_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str) -> None:
    train, test = write_csv(tmp_path / "train.csv", list(ROWS)), write_csv(tmp_path / "test.csv", [(text,) for text, _ in ROWS], "sentence")
    run(
        tmp_path, monkeypatch, model, "--train_file", train, "--validation_file", train, "--test_file", test,
        "--do_train", "--do_eval", "--do_predict",
    )  # fmt: skip
    results = json.loads((tmp_path / "out" / "eval_results.json").read_text())
    assert 0 <= results["eval_accuracy"] <= 1
    assert json.loads((tmp_path / "out" / "config.json").read_text())["label2id"] == {"bad": 0, "good": 1}
    lines = (tmp_path / "out" / "predict_results_test.txt").read_text().splitlines()
    assert len(lines) == 9
    assert {line.split("\t")[1] for line in lines[1:]} <= {"good", "bad"}


def test_labels_that_are_numbers_keep_their_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str) -> None:
    numbers = [(text, "7" if label == "good" else "3") for text, label in ROWS]
    train = write_csv(tmp_path / "train.csv", list(numbers))
    run(tmp_path, monkeypatch, model, "--train_file", train, "--do_train")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["label2id"] == {"3": 0, "7": 1}


@pytest.mark.parametrize(
    ("header", "rows", "words"),
    [
        ("sentence,answer", ROWS, "--train_file .*train.csv has no column 'label'; its columns are: sentence, answer"),
        ("sentence,label", [], "--train_file .*train.csv.*nothing below its header"),
        ("sentence,label", [*ROWS, ("", "good")], "the column 'sentence' is empty in example 9"),
        ("sentence,label", [*ROWS, ("the room", "")], "the column 'label' is empty in example 9"),
        ("sentence,label", [("1", "good"), ("2", "bad")], "the column 'sentence' holds 1, which is no text"),
        ("label", [("good",), ("bad",)], "no column 'sentence'"),
    ],
)
def test_a_file_that_cannot_be_learnt_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str, header: str, rows: list[tuple[str, ...]], words: str
) -> None:
    train = write_csv(tmp_path / "train.csv", rows, header)
    with pytest.raises(ValueError, match=words) as refused:
        run(tmp_path, monkeypatch, model, "--train_file", train, "--do_train")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--do_eval"], "--do_eval needs data, and no --validation_file is given"),
        (["--do_predict"], "no --test_file is given"),
        (["--do_train", "--eval_strategy", "epoch"], "leave --do_eval and --eval_strategy, which turns it on, out"),
        (["--validation_file", "nowhere.csv"], "no such file: --validation_file nowhere.csv"),
    ],
)
def test_a_file_that_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str, flags: list[str], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        run(tmp_path, monkeypatch, model, "--train_file", write_csv(tmp_path / "train.csv", list(ROWS)), *flags)


def test_a_label_that_only_the_validation_file_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str) -> None:
    train = write_csv(tmp_path / "train.csv", list(ROWS))
    other = write_csv(tmp_path / "other.csv", [("the room", "so-so")])
    with pytest.raises(ValueError, match="--validation_file has the label 'so-so'"):
        run(tmp_path, monkeypatch, model, "--train_file", train, "--validation_file", other, "--do_train", "--do_eval")


def example() -> None:
    runpy.run_path(str(Path(__file__).parents[2] / "examples" / "run_glue.py"), run_name="__main__")


@pytest.mark.parametrize("named", [[], ["--trainer_class", "Trainer"]])
def test_the_example_drops_layers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str, named: list[str]) -> None:
    train = write_csv(tmp_path / "train.csv", list(ROWS))
    run(tmp_path, monkeypatch, model, "--train_file", train, "--do_train", "--layer_drop_strategy", "top", *named, script=example)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_hidden_layers"] == 1


def test_the_example_distils(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str) -> None:
    train = write_csv(tmp_path / "train.csv", [(text, label) for text, label in ROWS])
    flags = ["--trainer_class", "DistillTrainer", "--teacher_model_name_or_path", model, "--layers_to_drop", "1", "--logging_steps", "1"]
    run(tmp_path, monkeypatch, model, "--train_file", train, "--do_train", *flags, script=example)
    history = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    assert "loss_logits" in history[0]
