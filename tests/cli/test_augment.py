"""`hf-compress augment`, from file to file."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from hf_compress.augmentation.augmenter import Augmenter
from hf_compress.cli.app import main
from tests.augmentation.small_masked_lms import WORDS, save_masked_lm, write_vectors

TRAIN = "text,label\nThe cat sat on the old mat,yes\nA dog ran quickly,no\n"


@pytest.fixture
def train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "train.csv").write_text(TRAIN)
    write_vectors(tmp_path / "vectors.txt", {word: (place, 9 - place % 7, place % 5) for place, word in enumerate(WORDS, start=1)})
    monkeypatch.chdir(tmp_path)
    return tmp_path / "train.csv"


def test_the_same_file_for_the_same_seed(train: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mlm = save_masked_lm(train.parent / "mlm")
    flags = ["--mlm", mlm, "--vectors", "vectors.txt", "--num_copies", "3", "--num-candidates", "5", "--seed", "1"]
    assert main(["augment", "train.csv", "-o", "first.csv", *flags]) == 0
    shown = capsys.readouterr().out
    assert "2 examples, about 11 words that may be replaced, 3 copies of each text" in shown
    assert "first.csv: 2 examples became 8" in shown
    assert main(["augment", "train.csv", "--output_file", "second.csv", *flags, "--batch_tokens", "30"]) == 0
    first = Path("first.csv").read_text()
    assert Path("second.csv").read_text() == first
    lines = first.splitlines()
    assert lines[:2] == TRAIN.splitlines()[:2] and [line.rsplit(",", 1)[1] for line in lines[1:]] == ["yes"] * 4 + ["no"] * 4
    assert main(["augment", "train.csv", "-o", "first.csv", *flags[:-1], "2", "--overwrite"]) == 0
    assert Path("first.csv").read_text() != first


@pytest.mark.parametrize("source", ["mlm", "vectors"])
def test_one_of_the_two_is_enough(train: Path, source: str) -> None:
    given = ["--mlm", save_masked_lm(train.parent / "mlm")] if source == "mlm" else ["--vectors", "vectors.txt"]
    assert main(["augment", "train.csv", "-o", "out.jsonl", *given, "--num_copies", "2", "--faithful", "released_code"]) == 0
    assert len(Path("out.jsonl").read_text().splitlines()) > 2


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], "There is nothing to take words from"),
        (["--vectors", "vectors.txt", "--num_copies", "0"], "--num_copies is 0; expected at least 1"),
        (["--vectors", "vectors.txt", "--num_candidates", "0"], "--num_candidates is 0; expected at least 1"),
        (["--vectors", "vectors.txt", "--probability", "2"], "--probability is 2.0; expected a number from 0 to 1"),
        (["--vectors", "vectors.txt", "--batch_tokens", "0"], "--batch_tokens is 0"),
        (["--vectors", "vectors.txt", "-o", "train.csv", "--overwrite"], "is the input itself"),
        (["--vectors", "vectors.txt", "-o", "vectors.txt"], "expected .csv, .tsv, .json, .jsonl, .parquet"),
        (["--vectors", "vectors.txt", "-o", "there.csv"], "is there already"),
        (["--vectors", "vectors.txt", "--text_columns", "label,premise"], "has no column 'premise'; its columns are: text, label"),
        (["--vectors", "nowhere.txt"], "There are no word vectors in nowhere.txt"),
    ],
)
def test_errors_are_one_line_and_leave_nothing(train: Path, capsys: pytest.CaptureFixture[str], flags: list[str], words: str) -> None:
    Path("there.csv").write_text("there")
    before = set(train.parent.iterdir())
    assert main(["augment", "train.csv", *([] if "-o" in flags else ["-o", "out.csv"]), *flags]) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("hf-compress: error: ") and words in shown and shown.count("\n") == 1
    assert set(train.parent.iterdir()) == before
    assert train.read_text() == TRAIN and Path("there.csv").read_text() == "there"


def test_ctrl_c_leaves_no_output_and_says_how_to_go_on(
    train: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(self: Augmenter, rows: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Augmenter, "copies", stop)
    assert main(["augment", "train.csv", "-o", "out.csv", "--vectors", "vectors.txt"]) == 130
    assert "the same command goes on" in capsys.readouterr().err
    assert not Path("out.csv").exists()


def test_the_help_loads_no_torch() -> None:
    code = (
        "import sys\nfrom hf_compress.cli.app import main\ntry:\n    main(['augment', '--help'])\nexcept SystemExit:\n    pass\n"
        "print('loaded', *sorted({'torch', 'transformers', 'numpy', 'datasets', 'pyarrow'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "loaded"
    assert "--num_copies N" in result.stdout
