"""`hf-compress prune`, from folder to folder."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerFast

from hf_compress.cli.app import main
from hf_compress.cli.labelled_sample import label_ids
from hf_compress.errors import DataError
from hf_compress.students.prune import prune_student
from hf_compress.students.pruning_record import recorded_pruning
from tests.students.pruning import teacher as tiny_teacher

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{number}" for number in range(5, 50))]
NAMES = {"id2label": {0: "no", 1: "yes"}, "label2id": {"no": 0, "yes": 1}}


def tokenizer() -> PreTrainedTokenizerFast:
    inner = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]")


def write(path: Path, labels: list[object], *, count: int = 48) -> str:
    with path.open("w", newline="", encoding="utf-8") as out:
        writer = csv.writer(out)
        writer.writerow(["sentence", "label"])
        for row in range(count):
            writer.writerow(
                [" ".join(WORDS[5 + (row * 7 + place * (row + 3)) % 45] for place in range(3 + row % 5)), labels[row % len(labels)]]
            )
    return str(path)


@pytest.fixture
def teacher(tmp_path: Path) -> str:
    folder = tmp_path / "teacher"
    tiny_teacher(num_layers=4, **NAMES).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def examples(tmp_path: Path) -> str:
    return write(tmp_path / "train.csv", ["yes", "no"])


SIZES = ["--num_hidden_layers", "2", "--num_attention_heads", "3", "--intermediate-size", "10", "--embedding_rank", "6"]


def test_a_student_is_written_and_what_was_kept_is_printed(
    tmp_path: Path, teacher: str, examples: str, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "student"
    assert main(["prune", teacher, "-o", str(output), *SIZES, "--train_file", examples]) == 0
    student = AutoModelForSequenceClassification.from_pretrained(output)
    assert type(student).__name__ == "PrunedBertForSequenceClassification"
    assert student.config.id2label == {0: "no", 1: "yes"}
    assert (student.config.num_attention_heads, student.config.intermediate_size, student.config.embedding_size) == (3, 10, 6)
    assert len(PreTrainedTokenizerFast.from_pretrained(output)) == 50
    shown = capsys.readouterr().out
    lines = shown.splitlines()
    assert lines[0] == "layers      kept 1-2 of 4"
    assert lines[1].startswith("heads       layer 1: ")
    assert "importance measured on 48 examples" in lines
    assert [line.split()[0] for line in lines if line.startswith(("teacher", "student", "share"))] == ["teacher", "student", "share"]
    assert "the script needs `import hf_compress`" in lines[-1]


def test_labels_are_matched_by_name_and_the_seed_draws_the_examples(tmp_path: Path, teacher: str, examples: str) -> None:
    # The file's labels sort as no, yes; a teacher that counts them the other way round has to be told so.
    turned = tmp_path / "turned"
    model = AutoModelForSequenceClassification.from_pretrained(teacher)
    with torch.no_grad():
        model.classifier.weight.copy_(model.classifier.weight.flip(0))
        model.classifier.bias.copy_(model.classifier.bias.flip(0))
    model.config.id2label, model.config.label2id = {0: "yes", 1: "no"}, {"yes": 0, "no": 1}
    model.save_pretrained(turned)
    tokenizer().save_pretrained(turned)
    asked = ["--num_attention_heads", "2", "--intermediate_size", "9", "--num_examples", "32", "--train_file", examples]
    for source, name, seed in ((teacher, "one", 1), (teacher, "same", 1), (str(turned), "turned_student", 1)):
        assert main(["prune", source, "-o", str(tmp_path / name), *asked, "--seed", str(seed)]) == 0
    one, same, other = (AutoModelForSequenceClassification.from_pretrained(tmp_path / name) for name in ("one", "same", "turned_student"))
    states = [model.state_dict() for model in (one, same, other)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert all(torch.equal(states[0][name], states[2][name]) for name in states[0] if not name.startswith("classifier"))
    pruning = recorded_pruning(one.config)
    assert pruning is not None
    assert pruning.num_examples == 32


def test_as_the_released_code_does(tmp_path: Path, teacher: str, examples: str, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["--num_attention_heads", "2", "--train_file", examples, "--faithful", "released_code"]
    assert main(["prune", teacher, "-o", str(tmp_path / "student"), *asked]) == 0
    assert "importance measured on 48 examples, as in released_code" in capsys.readouterr().out


def test_examples_that_were_not_needed_are_pointed_out(
    tmp_path: Path, teacher: str, examples: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["prune", teacher, "-o", str(tmp_path / "student"), "--embedding_rank", "6", "--train_file", examples]) == 0
    assert "nothing to be ranked, so the examples were not read" in capsys.readouterr().err


def test_depth_and_rank_take_no_examples(tmp_path: Path, teacher: str, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "student"
    assert main(["prune", teacher, "-o", str(output), "--layers_to_keep", "1,4", "--embedding_rank", "6"]) == 0
    loaded = AutoModelForSequenceClassification.from_pretrained(output)
    direct = prune_student(teacher, layers_to_keep=(1, 4), embedding_rank=6)
    assert all(torch.equal(value, direct.state_dict()[name]) for name, value in loaded.state_dict().items())
    assert capsys.readouterr().out.startswith("layers      kept 1 and 4 of 4\nheads       all 4 of each layer\n")


def test_a_number_to_predict(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "teacher"
    tiny_teacher(num_labels=1).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    numbers = write(tmp_path / "numbers.csv", [0.5, 2.25, 4.0])
    assert main(["prune", str(folder), "-o", str(tmp_path / "student"), "--num_attention_heads", "2", "--train_file", numbers]) == 0
    named = write(tmp_path / "named.csv", ["yes", "no"])
    assert main(["prune", str(folder), "-o", str(tmp_path / "other"), "--num_attention_heads", "2", "--train_file", named]) == 2
    assert "the labels no, yes, and the teacher predicts one number" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], "Say what is to be pruned"),
        (["--num_attention_heads", "2"], "give batches, or on the command line --task_name or --train_file"),
        (["--num_attention_heads", "5", "--train_file", "{train}"], "num_attention_heads is 5, but the teacher has 4 heads"),
        (["--intermediate_size", "0", "--train_file", "{train}"], "intermediate_size is 0"),
        (["--embedding_rank", "17"], "word embeddings of rank 16"),
        (["--num_hidden_layers", "5"], "the teacher has 4 layers"),
        (["--layers_to_keep", "1,5"], "layers_to_keep holds 5"),
        (["--num_attention_heads", "2", "--train_file", "{few}"], "32 examples at least, better on 512, and there are 20"),
        (["--num_attention_heads", "2", "--train_file", "{train}", "--num_examples", "8"], "num_examples is 8; expected 32"),
        (["--num_attention_heads", "2", "--train_file", "{three}"], "the labels a, b, c, and the teacher knows no, yes"),
        (["--num_attention_heads", "2", "--train_file", "{unlabelled}"], "has no column 'label'"),
        (["--num_attention_heads", "2", "--train_file", "/no/such.csv"], "There is no such file: --train_file /no/such.csv"),
        (["--num_attention_heads", "2", "--task_name", "nli"], "--task_name nli is no GLUE task"),
        (["--embedding_rank", "6", "--batch_size", "0"], "--batch_size is 0"),
    ],
)
def test_bad_input_is_a_clear_error_and_leaves_nothing(
    tmp_path: Path, teacher: str, examples: str, flags: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    files = {
        "train": examples,
        "few": write(tmp_path / "few.csv", ["yes", "no"], count=20),
        "three": write(tmp_path / "abc.csv", ["a", "b", "c"]),
    }
    (tmp_path / "bare.csv").write_text("sentence,other\nw5 w6,w7\nw8,w9\n")
    files["unlabelled"] = str(tmp_path / "bare.csv")
    assert main(["prune", teacher, "-o", str(tmp_path / "student"), *(flag.format(**files) for flag in flags)]) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "student").exists()


def test_a_folder_that_is_not_empty_is_overwritten_only_when_asked(
    tmp_path: Path, teacher: str, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "student"
    output.mkdir()
    assert main(["prune", teacher, "-o", str(output), "--embedding_rank", "6"]) == 0
    written = (output / "model.safetensors").read_bytes()
    assert main(["prune", teacher, "-o", str(output), "--embedding_rank", "4"]) == 2
    assert "is not empty" in capsys.readouterr().err
    assert (output / "model.safetensors").read_bytes() == written
    assert main(["prune", teacher, "-o", str(output), "--embedding_rank", "4", "--overwrite"]) == 0
    assert AutoModelForSequenceClassification.from_pretrained(output).config.embedding_size == 4


def test_the_teachers_folder_is_never_overwritten(teacher: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prune", teacher, "-o", teacher, "--embedding_rank", "6", "--overwrite"]) == 2
    assert "is where the teacher is" in capsys.readouterr().err


def test_other_teachers_are_pointed_to_python(tmp_path: Path, examples: str, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_teacher(head="token_classification").save_pretrained(tmp_path / "tagger")
    asked = ["-o", str(tmp_path / "student"), "--num_attention_heads", "2", "--train_file", examples]
    assert main(["prune", str(tmp_path / "tagger"), *asked]) == 2
    assert "BertForTokenClassification, and this command reads texts with a label each" in capsys.readouterr().err
    tiny_teacher().save_pretrained(tmp_path / "mute")
    assert main(["prune", str(tmp_path / "mute"), *asked]) == 2
    assert "There is no tokenizer in" in capsys.readouterr().err


def test_label_ids() -> None:
    model = tiny_teacher(**NAMES)
    assert label_ids(["Yes", "no"], model) == [1, 0]
    assert label_ids(["0", "1"], model) == [0, 1]
    with pytest.raises(DataError, match="the labels maybe, yes"):
        label_ids(["maybe", "yes"], model)
    with pytest.raises(DataError, match="numbers, and the teacher predicts the labels no, yes"):
        label_ids(None, model)
    assert label_ids(["down", "up"], tiny_teacher()) == [0, 1]


def test_its_help_loads_no_torch() -> None:
    code = (
        "import sys\nfrom hf_compress.cli.app import main\ntry:\n    main(['prune', '--help'])\nexcept SystemExit:\n    pass\n"
        "print('loaded', *sorted({'torch', 'transformers', 'numpy', 'datasets'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "loaded"
    assert "--embedding_rank" in result.stdout
