"""Files of examples, in and out."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet
import pytest
from datasets import ClassLabel, Dataset, Features, Value, load_dataset

from hf_compress.augmentation.suffixes import check_output
from hf_compress.augmentation.tables import choose_text_columns, read_table, typed, write_table
from hf_compress.errors import ArgumentError, DataError

ROWS = [
    {"text": 'He said "no, never" .', "other": "tab-free  spaces ", "label": 1},
    {"text": "line\u2028separator é NA", "other": "", "label": 0},
]


def table() -> Dataset:
    return Dataset.from_list(ROWS, features=Features({"text": Value("string"), "other": Value("string"), "label": ClassLabel(2)}))


@pytest.mark.parametrize("suffix", ["csv", "tsv", "json", "jsonl", "parquet"])
def test_there_and_back(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"file.{suffix}"
    assert write_table(path, table(), iter(ROWS)) == 2
    back = read_table(str(path))
    back = typed(back) if suffix in ("csv", "tsv") else back
    assert back.to_list() == ROWS
    assert list(tmp_path.iterdir()) == [path]


def test_a_csv_comes_out_as_it_went_in_and_as_datasets_reads_it(tmp_path: Path) -> None:
    path, again = tmp_path / "in.csv", tmp_path / "out.csv"
    path.write_text('text,label,score\n"a ""b"", c",01,3.80\n"two\nlines",NA,1e3\n', encoding="utf-8")
    read = read_table(str(path))
    write_table(again, read, iter(read))
    assert again.read_bytes() == path.read_bytes()
    assert load_dataset("csv", data_files=str(again), split="train", cache_dir=str(tmp_path / "cache"))[1]["text"] == "two\nlines"


def test_parquet_keeps_the_names_of_labels(tmp_path: Path) -> None:
    data = table().cast_column("label", ClassLabel(names=["no", "yes"]))
    write_table(tmp_path / "file.parquet", data, iter(ROWS))
    assert read_table(str(tmp_path / "file.parquet")).features["label"].names == ["no", "yes"]
    assert pyarrow.parquet.read_table(tmp_path / "file.parquet").num_rows == 2


def test_only_whole_numbers_and_fractions_become_numbers() -> None:
    data = Dataset.from_dict({"a": ["1", "-2"], "b": ["01", "2"], "c": ["1.50", "2"], "d": ["1", "x"]})
    assert typed(data).to_dict() == {"a": [1, -2], "b": [1.0, 2.0], "c": [1.5, 2.0], "d": ["1", "x"]}


def test_a_list_of_objects_and_a_data_set_in_a_folder(tmp_path: Path) -> None:
    (tmp_path / "list.json").write_text(json.dumps(ROWS), encoding="utf-8")
    assert read_table(str(tmp_path / "list.json")).to_list() == ROWS
    (tmp_path / "data" / "pairs").mkdir(parents=True)
    write_table(tmp_path / "data" / "pairs" / "train.parquet", table(), iter(ROWS))
    (tmp_path / "data" / "README.md").write_text("---\nconfigs:\n- config_name: pairs\n  data_files: pairs/train.parquet\n---\n")
    assert read_table(f"{tmp_path / 'data'}:pairs").to_list() == ROWS


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.csv", "", "is empty"),
        ("a.csv", "text,label\n", "holds no examples"),
        ("a.csv", "text\nthe cat\n", "has the one column 'text'"),
        ("a.csv", "text\tlabel\nthe cat\t1\n", "Is it separated by something else?"),
        ("a.csv", "text,label\nthe cat\n", "line 2 has 1 columns; expected 2"),
        ("a.csv", "text,text\na,b\n", "names a column twice"),
        ("a.csv", 'text,label\n"the cat,1\n', "cannot be read: unexpected end of data"),
        ("a.jsonl", '{"text": "a", "label": 1}\n{"text": \n', "line 2 is no JSON"),
        ("a.jsonl", '{"text": "a", "label": 1}\n3\n', "line 2 is no object"),
        ("a.json", "[1, 2]", "is no list of objects"),
        ("a.json", "", "holds no examples"),
        ("a.jsonl", '{"text": "a", "label": 1}\n{"text": {"b": 2}, "label": 1}\n', "values of different kinds"),
        ("a.parquet", "no parquet", "cannot be read as parquet"),
        ("a.txt", "text\n", "ends in '.txt', which is not known"),
    ],
)
def test_bad_files_are_refused(tmp_path: Path, name: str, content: str, words: str) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(DataError) as raised:
        read_table(str(tmp_path / name))
    assert words in str(raised.value)


@pytest.mark.parametrize(
    ("name", "words"), [("no.csv", "There is no file no.csv"), ("no/such:set", "no data set with a train split was found")]
)
def test_nothing_of_that_name(name: str, words: str) -> None:
    with pytest.raises(DataError, match=words):
        read_table(name)


def test_text_columns() -> None:
    data = Dataset.from_dict({"idx": [1], "label_text": ["yes"], "question": ["a"], "sentence": ["b"], "more": ["c"], "number": [1.5]})
    assert choose_text_columns(data, None, "f.csv") == ["question", "sentence"]
    assert choose_text_columns(data, ["more"], "f.csv") == ["more"]
    pair = Dataset.from_dict({"guid": ["1"], "sentence2": ["a"], "sentence1": ["b"], "label": [1]})
    assert choose_text_columns(pair, None, "f.csv") == ["sentence1", "sentence2"]
    with pytest.raises(DataError, match="has no column 'text'; its columns are: idx, label_text, question, sentence, more, number"):
        choose_text_columns(data, ["text"], "f.csv")
    with pytest.raises(DataError, match=r"the column 'number' holds 1\.5 in example 1, which is no text"):
        choose_text_columns(data, ["number"], "f.csv")
    with pytest.raises(DataError, match="no column of texts; its columns are: label, x"):
        choose_text_columns(Dataset.from_dict({"label": ["a"], "x": [1]}), None, "f.csv")
    with pytest.raises(ArgumentError, match="names a column twice"):
        choose_text_columns(data, ["more", "more"], "f.csv")


def test_a_tsv_holds_no_tabs_and_is_not_half_written(tmp_path: Path) -> None:
    rows = [{"text": "a\tb", "other": "", "label": 1}]
    with pytest.raises(DataError, match="A text holds a tab or a line's end"):
        write_table(tmp_path / "out.tsv", table(), iter(rows))
    assert list(tmp_path.iterdir()) == []


def test_outputs_that_cannot_be(tmp_path: Path) -> None:
    source = tmp_path / "in.csv"
    source.write_text("text,label\na,1\n")
    (tmp_path / "folder.csv").mkdir()
    (tmp_path / "link.csv").symlink_to(source)
    for name, words in {
        "out.txt": "expected .csv, .tsv, .json, .jsonl, .parquet",
        "link.csv": "is the input itself",
        "folder.csv": "is a folder; name a file",
        "no/out.csv": "There is no folder",
    }.items():
        with pytest.raises(ArgumentError, match=words):
            check_output(tmp_path / name, str(source), overwrite=True)
    (tmp_path / "out.csv").write_text("there")
    with pytest.raises(ArgumentError, match=r"is there already\. Name another file, or add --overwrite"):
        check_output(tmp_path / "out.csv", str(source), overwrite=False)
    check_output(tmp_path / "out.csv", str(source), overwrite=True)


def test_numbers_and_labels_of_a_csv_are_no_texts() -> None:
    films = [f"film {number}" for number in range(40)]
    rated = Dataset.from_dict({"text": films, "stars": [str(number % 5) for number in range(40)], "label": ["a", "b"] * 20})
    assert choose_text_columns(rated, None, "f.csv") == ["text"]
    named = Dataset.from_dict({"text": films, "sentiment": ["good", "bad"] * 20})
    with pytest.raises(DataError, match=r"'sentiment' of f\.csv has only 2 different values in 40 examples, as labels have"):
        choose_text_columns(named, None, "f.csv")
    assert choose_text_columns(named, ["text"], "f.csv") == ["text"]


@pytest.mark.parametrize("suffix", ["csv", "json", "jsonl"])
def test_another_encoding_is_one_line(tmp_path: Path, suffix: str) -> None:
    content = "text,label\ncaf\xe9,1\n" if suffix == "csv" else '{"text": "caf\xe9", "label": 1}\n'
    (tmp_path / f"train.{suffix}").write_bytes(content.encode("latin-1"))
    with pytest.raises(DataError, match=f"train.{suffix}.* cannot be read.*utf-8"):
        read_table(str(tmp_path / f"train.{suffix}"))
