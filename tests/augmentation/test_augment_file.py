"""From file to file: the same whether at one stroke or stopped, and nothing half written."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest

from hf_compress.augmentation import augment_file as module
from hf_compress.augmentation.augment_file import augment_file
from hf_compress.augmentation.augmenter import Augmenter
from hf_compress.augmentation.settings import AugmentationSettings
from hf_compress.augmentation.tables import read_table
from hf_compress.errors import ArgumentError, DataError
from tests.augmentation.small_masked_lms import TEXTS, WORDS, save_masked_lm, write_vectors

SETTINGS = AugmentationSettings(num_copies=2, num_candidates=4)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file of twelve pairs, and word vectors; copies are made for three rows at a time."""
    monkeypatch.setattr(module, "_TOGETHER_ON_CPU", 12)
    with (tmp_path / "train.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["sentence1", "sentence2", "label"])
        writer.writerows([TEXTS[i % 4], f"{WORDS[i]} {TEXTS[(i + 1) % 4]}", i % 2] for i in range(12))
    write_vectors(tmp_path / "vectors.txt", {word: (place, 9 - place % 7, place % 5) for place, word in enumerate(WORDS, start=1)})
    return tmp_path


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def stop_after(monkeypatch: pytest.MonkeyPatch, calls: int) -> None:
    """Ctrl-C at the so manieth group of examples."""
    real, count = Augmenter.copies, [0]

    def copies(self: Augmenter, rows: Any) -> Any:
        count[0] += 1
        if count[0] > calls:
            raise KeyboardInterrupt
        return real(self, rows)

    monkeypatch.setattr(Augmenter, "copies", copies)


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_a_stopped_run_ends_byte_equal_to_one_at_a_stroke(folder: Path, monkeypatch: pytest.MonkeyPatch, suffix: str) -> None:
    mlm, source, vectors = save_masked_lm(folder / "mlm"), str(folder / "train.csv"), str(folder / "vectors.txt")
    whole = augment_file(source, folder / f"whole.{suffix}", SETTINGS, mlm=mlm, vectors=vectors)
    assert whole.examples == 12 and 12 * 3 < whole.rows <= 12 * 5
    broken = folder / f"broken.{suffix}"
    before = files(folder)
    with monkeypatch.context() as stopping, pytest.raises(KeyboardInterrupt):
        stop_after(stopping, 2)
        augment_file(source, broken, SETTINGS, mlm=mlm, vectors=vectors)
    assert files(folder) - before == {f"broken.{suffix}.partial"}
    partial = folder / f"broken.{suffix}.partial"
    assert len(partial.read_bytes().splitlines()) == 1 + 6
    partial.write_bytes(partial.read_bytes()[:-5])  # a line that was cut off
    said: list[str] = []
    augment_file(source, broken, SETTINGS, mlm=mlm, vectors=vectors, batch_tokens=60, say=said.append)
    assert "5 of 12 examples are done: going on" in said[0] and said[1] == "texts: sentence1, sentence2" and "7 examples, about" in said[2]
    assert broken.read_bytes() == (folder / f"whole.{suffix}").read_bytes()
    assert files(folder) - before == {f"broken.{suffix}"}


def test_the_price_comes_first(folder: Path) -> None:
    said: list[str] = []
    mlm = save_masked_lm(folder / "mlm")
    augment_file(str(folder / "train.csv"), folder / "out.csv", SETTINGS, mlm=mlm, vectors=str(folder / "vectors.txt"), say=said.append)
    assert said[0] == "texts: sentence1, sentence2"
    assert said[1].startswith("12 examples, about ") and "2 copies of each text" in said[1]
    assert "words asked of the masked LM, about" in said[1] and "words a second" in said[1]


def test_a_partial_file_of_something_else_is_not_gone_on_with(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, vectors, out = str(folder / "train.csv"), str(folder / "vectors.txt"), folder / "out.csv"
    with monkeypatch.context() as stopping, pytest.raises(KeyboardInterrupt):
        stop_after(stopping, 1)
        augment_file(source, out, SETTINGS, vectors=vectors)
    other = AugmentationSettings(num_copies=2, num_candidates=4, seed=7)
    with pytest.raises(ArgumentError, match=r"asked for something else \(seed 42 there, 7 now\)"):
        augment_file(source, out, other, vectors=vectors)
    assert len((folder / "out.csv.partial").read_bytes().splitlines()) == 1 + 3
    augment_file(source, out, other, vectors=vectors, overwrite=True)
    begun_anew = out.read_bytes()
    augment_file(source, out, other, vectors=vectors, overwrite=True)
    assert out.read_bytes() == begun_anew


def test_two_runs_do_not_write_the_same_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, vectors, out = str(folder / "train.csv"), str(folder / "vectors.txt"), folder / "out.csv"
    real = Augmenter.copies

    def copies(self: Augmenter, rows: Any) -> Any:
        monkeypatch.setattr(Augmenter, "copies", real)
        with pytest.raises(ArgumentError, match="Another run is writing"):
            augment_file(source, out, SETTINGS, vectors=vectors)
        return real(self, rows)

    monkeypatch.setattr(Augmenter, "copies", copies)
    assert augment_file(source, out, SETTINGS, vectors=vectors).examples == 12


def test_the_rows_are_each_example_and_its_copies(folder: Path) -> None:
    augment_file(str(folder / "train.csv"), folder / "out.csv", SETTINGS, vectors=str(folder / "vectors.txt"))
    before, after = read_table(str(folder / "train.csv")).to_list(), read_table(str(folder / "out.csv")).to_list()
    places = [after.index(row) for row in before]
    assert places == sorted(places) and places[0] == 0
    for row, start, end in zip(before, places, [*places[1:], len(after)], strict=True):
        for copy in after[start + 1 : end]:
            assert copy["label"] == row["label"]
            assert (copy["sentence1"] == row["sentence1"]) != (copy["sentence2"] == row["sentence2"])


def test_numbers_of_a_csv_are_numbers_elsewhere(folder: Path) -> None:
    augment_file(str(folder / "train.csv"), folder / "out.parquet", SETTINGS, vectors=str(folder / "vectors.txt"))
    assert read_table(str(folder / "out.parquet")).features["label"].dtype == "int64"


@pytest.mark.parametrize("problem", ["no vector", "encoder", "no model", "columns", "broken vectors"])
def test_bad_input_leaves_nothing(folder: Path, problem: str) -> None:
    given: dict[str, Any] = {"vectors": str(folder / "vectors.txt")}
    kind: type[Exception] = DataError
    if problem == "no vector":
        write_vectors(folder / "vectors.txt", {"chat": (1, 2), "chien": (2, 1)})
        words = "no word of the texts has a vector there; looked up were The, cat, sat, on, the and all others"
    elif problem == "broken vectors":
        (folder / "vectors.txt").write_text("cat 1 2\ndog 1\n")
        words = "line 2: 'dog 1' has 1 numbers"
    elif problem == "columns":
        given["text_columns"], words = ["premise"], "has no column 'premise'; its columns are: sentence1, sentence2, label"
    elif problem == "encoder":
        from transformers import AutoModel, AutoTokenizer

        save_masked_lm(folder / "mlm")
        tokenizer = AutoTokenizer.from_pretrained(folder / "mlm")
        AutoModel.from_pretrained(folder / "mlm").save_pretrained(folder / "encoder")
        tokenizer.save_pretrained(folder / "encoder")
        given["mlm"], kind, words = str(folder / "encoder"), ArgumentError, "has no weights for the head that predicts words"
    else:
        given["mlm"], kind, words = "no/such-model", ArgumentError, "--mlm no/such-model: there is no masked LM with a tokenizer there"
    before = files(folder)
    with pytest.raises(kind) as raised:
        augment_file(str(folder / "train.csv"), folder / "out.csv", SETTINGS, **given)
    assert words in str(raised.value)
    assert files(folder) - before <= {"vectors.txt.mapped"}
