"""`hf-compress run`: scripts that never import hf_compress, with its flags added. Most run in this process, two in one of their own."""

from __future__ import annotations

import importlib
import inspect
import json
import logging
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers
import transformers.trainer
from transformers import BertForSequenceClassification

from hf_compress.arguments import CompressionArguments
from hf_compress.bound_trainer import find_trainer, installed, trainer_of
from hf_compress.errors import ArgumentError
from hf_compress.run import main
from hf_compress.trainer import DistillTrainer
from tests.tiny_models import tiny_model
from tests.training_scripts import SCRIPTS, read_report, training_flags, write_script

ROOT = Path(__file__).parents[1]
TOP = ("--layer_drop_strategy", "top", "--num_layers_to_drop", "2")


@pytest.fixture(autouse=True)
def nothing_is_left_behind() -> Iterator[None]:
    """Whatever a run does, the process is afterwards what it was."""
    trainer, argv, path = transformers.Trainer, sys.argv, list(sys.path)
    seq2seq = importlib.import_module("transformers.trainer_seq2seq")  # as for one who has used it before
    handlers = list(logging.getLogger("hf_compress").handlers)
    yield
    assert transformers.Trainer is trainer
    assert transformers.trainer.Trainer is trainer
    assert sys.modules.get("transformers.trainer_seq2seq") is seq2seq
    assert sys.argv is argv
    assert sys.path == path
    assert logging.getLogger("hf_compress").handlers == handlers
    assert transformers.Seq2SeqTrainer.__mro__[1] is trainer


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A teacher of the vocabulary and the labels of the scripts' own model."""
    folder = tmp_path_factory.mktemp("teacher")
    torch.manual_seed(3)
    tiny_model("bert", num_layers=4).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("name", SCRIPTS)
def test_layers_are_dropped_however_a_script_finds_the_trainer(tmp_path: Path, name: str) -> None:
    script = write_script(tmp_path, name)
    assert main([str(script), *training_flags(tmp_path), *TOP]) == 0
    report = read_report(tmp_path)
    assert report["kept"] == [1, 2]
    assert report["num_hidden_layers"] == 2
    reloaded = BertForSequenceClassification.from_pretrained(tmp_path / "out")
    assert len(reloaded.bert.encoder.layer) == 2
    assert (report["name"], report["path"], report["argv"][0]) == ("__main__", str(script.parent), str(script))


def test_without_our_flags_a_script_is_as_it_was(tmp_path: Path) -> None:
    assert main([str(write_script(tmp_path)), *training_flags(tmp_path)]) == 0
    report = read_report(tmp_path)
    assert report["kept"] == [1, 2, 3, 4]
    assert report["trainers"] == ["transformers.trainer.Trainer", "builtins.object"]


def test_what_is_kept_is_said_once_on_the_console(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script = write_script(tmp_path)
    script.write_text("import logging\nlogging.basicConfig(level=logging.INFO)\n" + script.read_text())
    assert main([str(script), *training_flags(tmp_path), *TOP]) == 0
    shown = capsys.readouterr()
    assert (shown.out + shown.err).count("kept 1-2 of 4, dropped 3-4") == 1


def test_layers_by_number_and_freezing(tmp_path: Path) -> None:
    flags = ["--layers-to-keep", "1,4", "--freeze_embeddings", "--layers_to_freeze=1"]
    assert main([str(write_script(tmp_path)), *training_flags(tmp_path), *flags]) == 0
    report = read_report(tmp_path)
    assert report["kept"] == [1, 4]
    assert report["frozen"]


def test_contribution_measures_on_the_scripts_evaluation_set(tmp_path: Path) -> None:
    flags = ["--layer_drop_strategy", "contribution", "--num_layers_to_drop", "1"]
    assert main([str(write_script(tmp_path)), *training_flags(tmp_path), *flags]) == 0
    assert read_report(tmp_path)["num_hidden_layers"] == 3


def test_batches_of_a_plain_trainer_are_trimmed_if_asked(tmp_path: Path) -> None:
    script = str(write_script(tmp_path))
    assert main([script, *training_flags(tmp_path), "--trim_padding"]) == 0
    assert read_report(tmp_path)["widths"] == [4, 4]
    assert main([script, *training_flags(tmp_path), "--freeze_embeddings"]) == 0
    assert read_report(tmp_path)["widths"] == [12, 12]


def test_the_scripts_json_file_may_hold_both_kinds_of_flags(tmp_path: Path) -> None:
    flags = {
        "report": str(tmp_path / "report.json"),
        "output_dir": str(tmp_path / "out"),
        "use_cpu": True,
        "learning_rate": 1e-5,
        "layer_drop_strategy": "symmetric",
        "num_layers_to_drop": 2,
    }
    (tmp_path / "flags.json").write_text(json.dumps(flags))
    assert main([str(write_script(tmp_path)), str(tmp_path / "flags.json")]) == 0
    report = read_report(tmp_path)
    assert report["kept"] == [1, 4]
    assert report["learning_rate"] == 1e-5


def test_a_config_file_holds_our_flags(tmp_path: Path) -> None:
    (tmp_path / "compress.yaml").write_text("layers_to_drop: [2, 3]\n")
    flags = ["--hf_compress_config", str(tmp_path / "compress.yaml")]
    assert main([str(write_script(tmp_path)), *flags, *training_flags(tmp_path)]) == 0
    assert read_report(tmp_path)["kept"] == [1, 4]


@pytest.mark.parametrize("name", ["subclass", "seq2seq"])
def test_a_script_distils_with_another_trainer(tmp_path: Path, teacher: str, name: str) -> None:
    flags = ["--trainer_class", "DistillTrainer", "--teacher_model_name_or_path", teacher, *TOP]
    assert main([str(write_script(tmp_path, name)), *training_flags(tmp_path), *flags]) == 0
    report = read_report(tmp_path)
    assert "hf_compress.trainer.DistillTrainer" in report["trainers"]
    assert report["kept"] == [1, 2]
    assert report["widths"] == [4, 4]
    assert any("logits" in key for key in report["logged"])


def test_seq2seq_distill_trainer_takes_seq2seq_trainers_place(tmp_path: Path) -> None:
    bound = trainer_of(CompressionArguments(trainer_class="Seq2SeqDistillTrainer", teacher_model_name_or_path="teacher"))
    with installed(bound):
        assert transformers.Seq2SeqTrainer is bound.trainer_class
        assert transformers.Trainer is bound.trainer_class
    assert transformers.Seq2SeqTrainer is not bound.trainer_class


def test_a_trainer_of_ones_own_gets_the_callback(tmp_path: Path) -> None:
    script = write_script(tmp_path)
    (script.parent / "own_trainer_module.py").write_text("import transformers\nclass Mine(transformers.Trainer):\n    pass\n")
    assert main([str(script), *training_flags(tmp_path), "--trainer_class", "own_trainer_module:Mine", *TOP]) == 0
    report = read_report(tmp_path)
    assert report["trainers"][1] == "own_trainer_module.Mine"
    assert report["kept"] == [1, 2]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("DistilTrainer", "Did you mean 'DistillTrainer'"),
        ("no_such_module:Mine", "no module no_such_module"),
        ("json:Mine", "json has no Mine"),
        ("json:JSONDecoder", "no subclass of transformers.Trainer"),
    ],
)
def test_a_trainer_that_is_none_is_refused(name: str, words: str) -> None:
    with pytest.raises(ArgumentError, match=words):
        find_trainer(name)


def test_the_bound_class_shows_the_trainers_own_signature() -> None:
    bound = trainer_of(CompressionArguments(layer_drop_strategy="top")).trainer_class
    assert list(inspect.signature(bound.__init__).parameters) == list(inspect.signature(transformers.Trainer.__init__).parameters)


def test_two_runs_do_not_meet() -> None:
    first = trainer_of(
        CompressionArguments(trainer_class="DistillTrainer", teacher_model_name_or_path="teacher", layer_drop_strategy="top")
    ).trainer_class
    second = trainer_of(CompressionArguments(trainer_class="DistillTrainer", teacher_model_name_or_path="teacher")).trainer_class
    assert vars(first)["compression"].strategy == "top"
    assert vars(second)["compression"].strategy is None


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--layer_drop_strategy", "symetric"], "Did you mean 'symmetric'?"),
        (["--layer_drop_strategy", "top", "--num_layers_to_drop", "4"], "4"),
        (["--layers_to_drop", "5"], "5"),
        (["--teacher_model_name_or_path", "x"], "add --trainer_class DistillTrainer"),
        (["--distill_recipe", "pkd", "--layer_drop_strategy", "top"], "add --trainer_class DistillTrainer"),
        (["--trainer_class", "DistillTrainer"], "teacher"),
        (["--trainer_class", "DistillTrainer", "--teacher_model_name_or_path", "no_such_folder/teacher"], "no_such_folder/teacher"),
    ],
)
def test_a_refusal_is_one_line_and_leaves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], words: str) -> None:
    assert main([str(write_script(tmp_path)), *training_flags(tmp_path), *flags]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith(("hf-compress: error:", "Traceback"))]
    assert len(errors) == 1
    assert words in errors[0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["scripts"]


def test_a_refusal_shows_its_traceback_if_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(write_script(tmp_path)), *training_flags(tmp_path), "--layers_to_drop", "9", "--traceback"]) == 2
    shown = capsys.readouterr().err
    assert "Traceback (most recent call last)" in shown
    assert "LayerDropError" in shown


def test_a_folder_that_was_there_stays(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    assert main([str(write_script(tmp_path)), *training_flags(tmp_path), "--layers_to_drop", "9"]) == 2
    assert (tmp_path / "out").is_dir()


def test_flags_without_effect_are_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script = tmp_path / "own_loop.py"
    script.write_text("import sys\nprint('ran', sys.argv[1:])\nsys.exit(0)\n")
    assert main([str(script), "--lr", "1", *TOP]) == 2
    shown = capsys.readouterr()
    assert "ran ['--lr', '1']" in shown.out
    assert "--layer_drop_strategy, --num_layers_to_drop had no effect" in shown.err
    assert main([str(script)]) == 0


@pytest.mark.parametrize("code", ["3", "'no such thing'"])
def test_the_scripts_exit_passes_through(tmp_path: Path, code: str) -> None:
    script = tmp_path / "leaves.py"
    script.write_text(f"import sys\nsys.exit({code})\n")
    with pytest.raises(SystemExit) as left:
        main([str(script), *TOP])
    assert repr(left.value.code) == code


def test_the_scripts_error_passes_through_with_a_hint_at_slips(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="layer_drop_strateg"):
        main([str(write_script(tmp_path)), *training_flags(tmp_path), "--layer_drop_strateg", "top"])
    assert "did you mean --layer_drop_strategy" in capsys.readouterr().err


def test_a_slip_is_shown_before_a_script_that_passes_over_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script = write_script(tmp_path)
    script.write_text(
        script.read_text().replace(
            "parser.parse_args_into_dataclasses()", "parser.parse_args_into_dataclasses(return_remaining_strings=True)[:2]"
        )
    )
    assert main([str(script), *training_flags(tmp_path), "--layer_drop_strateg", "top"]) == 0
    shown = capsys.readouterr().err
    assert shown.count("note: --layer_drop_strateg was left to the script; did you mean --layer_drop_strategy") == 1
    assert shown.count("note: no flag of hf_compress was given") == 1
    assert main([str(script), *training_flags(tmp_path), *TOP]) == 0
    assert "note:" not in capsys.readouterr().err


def test_a_plain_trainer_refuses_a_checkpoint_of_other_layers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script = write_script(tmp_path)
    saving = ["--save_strategy", "steps", "--save_steps", "1"]
    assert main([str(script), *training_flags(tmp_path), *saving, *TOP]) == 0
    script.write_text(script.read_text().replace("trainer.train()", "trainer.train(resume_from_checkpoint=True)"))
    assert main([str(script), *training_flags(tmp_path), *saving, "--freeze_embeddings"]) == 2
    assert "kept layers 1-2 of 4, and the model of this run has lost no layers" in capsys.readouterr().err
    assert main([str(script), *training_flags(tmp_path), *saving, *TOP]) == 0


ADOPTED = {
    "lazy": "from hf_compress import DistillTrainer, DistillTrainingArguments\n",
    "whole_names": "from hf_compress.trainer import DistillTrainer\nfrom hf_compress.training_arguments import DistillTrainingArguments\n",
}


def adopted_script(folder: Path, imports: str) -> Path:
    script = write_script(folder)
    text = script.read_text().replace("from transformers import Trainer\n", imports)
    script.write_text(
        text.replace("read_arguments(TrainingArguments)", "read_arguments(DistillTrainingArguments)").replace(
            " Trainer(", " DistillTrainer("
        )
    )
    return script


@pytest.mark.parametrize("imports", ADOPTED)
def test_a_script_that_takes_the_flags_itself_may_be_run_by_us_as_well(tmp_path: Path, teacher: str, imports: str) -> None:
    script = str(adopted_script(tmp_path, ADOPTED[imports]))
    assert main([script, *training_flags(tmp_path), *TOP]) == 0
    report = read_report(tmp_path)
    assert report["kept"] == [1, 2]
    assert not any("logits" in key for key in report["logged"])
    flags = ["--trainer_class", "DistillTrainer", "--teacher_model_name_or_path", teacher]
    assert main([script, *training_flags(tmp_path), *flags, *TOP]) == 0
    report = read_report(tmp_path)
    assert report["kept"] == [1, 2]
    assert any("logits" in key for key in report["logged"])
    assert DistillTrainer.compression is None


def test_a_script_that_takes_one_trainer_is_not_told_to_take_another(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script = adopted_script(tmp_path, ADOPTED["lazy"])
    (script.parent / "another_trainer.py").write_text("import transformers\nclass Mine(transformers.Trainer):\n    pass\n")
    assert main([str(script), *training_flags(tmp_path), "--trainer_class", "another_trainer:Mine"]) == 2
    assert "--trainer_class another_trainer:Mine would have no effect" in capsys.readouterr().err


def test_flags_from_both_sides_are_one_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script = adopted_script(tmp_path, ADOPTED["lazy"])
    script.write_text(script.read_text().replace("    model = bert()", "    training.freeze_embeddings = True\n    model = bert()"))
    assert main([str(script), *training_flags(tmp_path), *TOP]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert len(errors) == 1
    assert "takes the flags of hf_compress itself" in errors[0]
    assert "Run this script without `hf-compress run`" in errors[0]


def test_our_example_under_run_distils_as_well(tmp_path: Path, teacher: str) -> None:
    """The example binds a class itself, on top of the one that is bound already."""
    flags = CompressionArguments(trainer_class="DistillTrainer", teacher_model_name_or_path=teacher)
    bound = trainer_of(flags)
    with installed(bound):
        again = trainer_of(CompressionArguments()).trainer_class
    assert getattr(again, "compression") is flags  # noqa: B009
    assert issubclass(again, bound.trainer_class)


def test_help_shows_ours_then_the_scripts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main([str(write_script(tmp_path)), "--help"])
    assert left.value.code == 0
    shown = capsys.readouterr().out
    assert 0 < shown.index("--layer_drop_strategy") < shown.index("Where this script writes what happened")


def test_help_without_a_script_shows_ours(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    assert "--layer_drop_strategy" in capsys.readouterr().out
