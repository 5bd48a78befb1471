"""The packaged run_glue on a task with files for its splits: the labels and the score stay the task's."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from datasets import DatasetDict

from hf_compress.scripts.run_glue import DataArguments, in_place, load_splits, main
from tests.kept_logging import logging_as_it_was as logging_as_it_was
from tests.tiny_glue import split, write_glue
from tests.tiny_text import labelled, model_folder


@pytest.fixture
def glue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    write_glue(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    return tmp_path


def run(folder: Path, monkeypatch: pytest.MonkeyPatch, *flags: str) -> dict[str, float]:
    model = model_folder(folder / "model", num_layers=2)
    fixed = ["--model_name_or_path", model, "--cache_dir", str(folder / "cache"), "--output_dir", str(folder / "out")]
    often = ["--use_cpu", "True", "--max_steps", "1", "--report_to", "none", "--save_strategy", "no", "--disable_tqdm", "True"]
    monkeypatch.setattr(sys, "argv", ["run_glue.py", *fixed, *often, "--task_name", "sst2", "--do_train", "--do_eval", *flags])
    main()
    found: dict[str, float] = json.loads((folder / "out" / "all_results.json").read_text())
    return found


@pytest.mark.parametrize("kind", ["names.csv", "numbers.csv", "numbers.jsonl", "kept.parquet"])
def test_training_data_from_a_file(glue: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    rows, path = labelled(24, seed=5), glue / kind
    wanted = [{"sentence": text, "label": label if "names" in kind else ("bad", "good").index(label)} for text, label in rows]
    if kind.endswith("csv"):
        path.write_text("\n".join(["sentence,label", *(f"{row['sentence']},{row['label']}" for row in wanted)]) + "\n")
    elif kind.endswith("jsonl"):
        path.write_text("\n".join(map(json.dumps, wanted)) + "\n")
    else:
        split(24, 5).to_parquet(path)
    results = run(glue, monkeypatch, "--train_file", str(path))
    assert (results["train_samples"], results["eval_samples"]) == (24, 16)
    assert 0 <= results["eval_right_in_sst2"] <= 16
    assert json.loads((glue / "out" / "config.json").read_text())["label2id"] == {"bad": 0, "good": 1}


def test_validation_data_from_a_file(glue: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (glue / "valid.csv").write_text("sentence,label\nthe room was clean,good\nthe bed was loud,bad\n")
    results = run(glue, monkeypatch, "--validation_file", str(glue / "valid.csv"))
    assert (results["train_samples"], results["eval_samples"]) == (16, 2)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("sentence,label\nthe room was clean,7\n", "--train_file .*train.csv has labels that the task has not \\(bad, good\\)"),
        ("sentence,label\nthe room was clean,so-so\n", "has labels that the task has not"),
        ("text,label\nthe room was clean,1\n", "no column 'sentence'; .* Needed are the task's columns sentence, and 'label'"),
    ],
)
def test_a_file_that_is_not_of_the_task(glue: Path, monkeypatch: pytest.MonkeyPatch, content: str, words: str) -> None:
    (glue / "train.csv").write_text(content)
    with pytest.raises(ValueError, match=words):
        run(glue, monkeypatch, "--train_file", str(glue / "train.csv"))


def test_a_file_takes_the_place_of_both_of_mnli(tmp_path: Path) -> None:
    data = split(4, 1)
    task = DatasetDict(dict.fromkeys(("train", "validation_matched", "validation_mismatched", "test_matched"), data))
    whole = in_place(task, DatasetDict(validation=split(2, 7)), {"validation": "valid.csv"})
    assert set(whole) == {"train", "test_matched", "validation"}
    assert (len(whole["validation"]), len(whole["train"])) == (2, 4)


def test_words_that_mean_nothing_elsewhere_are_words(tmp_path: Path) -> None:
    texts = ["null", "NA", "None", "nan", "N/A", "a text"]
    (tmp_path / "train.csv").write_text(
        "".join(f"{text},{label}\n" for text, label in [("sentence", "label"), *zip(texts, "010101", strict=True)])
    )
    train = load_splits(DataArguments(train_file=str(tmp_path / "train.csv")), str(tmp_path / "cache"))["train"]
    assert (train["sentence"][:], train["label"][:]) == (texts, [0, 1, 0, 1, 0, 1])
    (tmp_path / "train.csv").write_text("sentence,label\na text,0\n,1\n")
    with pytest.raises(ValueError, match="the column 'sentence' is empty in example 2"):
        load_splits(DataArguments(train_file=str(tmp_path / "train.csv")), str(tmp_path / "cache"))
