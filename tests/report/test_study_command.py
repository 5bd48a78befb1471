"""The runs' command lines out of the user's."""

from __future__ import annotations

from pathlib import Path

import pytest

from hf_compress.cache.selection import Selection
from hf_compress.errors import ArgumentError, ScriptError
from hf_compress.report.study_arms import Arm
from hf_compress.report.study_command import read_command, value_of, without
from hf_compress.script_arguments import parse_command_line

ALL = Arm("all", "ends", "", Selection.everything())
NONE = Arm("none", "ends", "", None)
REST = [
    *("--teacher_model_name_or_path=teacher", "--model_name_or_path", "student", "--task_name", "mrpc", "--do_train", "--do_eval"),
    *("--teacher-cache-dir", "cache", "--distill_phases", "intermediate=4,prediction=2", "--teacher_dtype", "float32"),
]


def test_arms_load_no_teacher_and_write_to_folders_of_their_own(tmp_path: Path) -> None:
    command = read_command("glue", REST, tmp_path)
    request = parse_command_line(command.arm(ALL, 42))
    assert request.compression.given == (
        "trainer_class",
        "distill_recipe",
        "distill_phases",
        "teacher_cache_dir",
        "hidden_states_selection",
    )
    assert (request.compression.distill_recipe, request.compression.teacher_cache_dir) == ("mud", "cache")
    assert value_of(request.script_arguments, "output_dir") == str(tmp_path / "runs" / "all" / "seed-42")
    assert value_of(request.script_arguments, "seed") == "42"
    assert {"--do_train", "--do_eval", "--task_name", "mrpc", "--save_strategy"} <= set(request.script_arguments)
    assert (command.student, command.cache_dir, command.max_length) == ("student", Path("cache"), 128)


def test_a_copy_of_a_teacher_on_the_hub_takes_its_place(tmp_path: Path) -> None:
    on_hub = [*("--teacher-cache-dir=hf://datasets/me/cache", "--model_name_or_path", "student"), "--do_train", "--do_eval"]
    command = read_command("glue", on_hub, tmp_path).reading(tmp_path / "copy")
    assert command.cache_dir == tmp_path / "copy"
    for told in (command.arm(ALL, 42), command.check(42)):
        assert parse_command_line(told).compression.teacher_cache_dir == str(tmp_path / "copy")
        assert not any("hf://" in word for word in told)


def test_the_build_stores_the_layers_of_all_arms(tmp_path: Path) -> None:
    request = parse_command_line(read_command("glue", REST, tmp_path).build({0, 4, 12}, "scores", 7))
    flags = request.compression
    assert flags.build_teacher_cache_only and flags.teacher_model_name_or_path == "teacher" and flags.teacher_dtype == "float32"
    assert flags.stored_layers(12) == {0, 4, 12}
    assert flags.selection == Selection(rank_by="scores")


@pytest.mark.parametrize(
    ("flags", "epochs"),
    [
        (["--distill_phases", "intermediate=4,prediction=2"], 6),
        (["--distill_phases", "prediction=1.5"], 1.5),
        (["--num_train_epochs", "5"], 5),
        ([], 3),
    ],
)
def test_none_spends_all_epochs_on_the_predictions(tmp_path: Path, flags: list[str], epochs: float) -> None:
    command = read_command("glue", ["--do_train", "--do_eval", *flags], tmp_path)
    (phase,) = parse_command_line(command.arm(NONE, 1)).compression.phases
    assert (phase.name, phase.epochs) == ("prediction", epochs)
    assert parse_command_line(command.arm(NONE, 1)).compression.selection is None
    assert str(command.cache_dir) == str(tmp_path / "teacher_on_disk")


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--hsk", "1l"], "--hsk is not for `hf-compress study`: the arms say that"),
        (["--build_teacher_cache_only"], "--build_teacher_cache_only is not for"),
        (["--seed", "3"], "--seeds 42,43,44"),
        (["--max_steps", "3"], "--max_steps: a study counts epochs"),
        (["--distill_recipe", "mudd"], "Did you mean 'mud'?"),
    ],
)
def test_what_the_study_says_itself(tmp_path: Path, more: list[str], words: str) -> None:
    with pytest.raises(ArgumentError, match=words.replace("?", r"\?")):
        read_command("glue", [*REST, *more], tmp_path)


@pytest.mark.parametrize("flag", ["do_train", "do_eval"])
def test_a_run_that_would_not_be_trained_or_scored(tmp_path: Path, flag: str) -> None:
    with pytest.raises(ArgumentError, match=f"--{flag} is not given"):
        read_command("glue", [word for word in REST if word != f"--{flag}"], tmp_path)
    script = tmp_path / "always.py"
    script.write_text("from transformers import Trainer, TrainingArguments\n")  # trains and evaluates whatever it is told
    assert read_command(str(script), [], tmp_path).script == str(script)


def test_no_script_and_an_argument_file(tmp_path: Path) -> None:
    with pytest.raises(ScriptError, match=r"There is no script nowhere\.py"):
        read_command("nowhere.py", REST, tmp_path)
    (tmp_path / "arguments.json").write_text('{"do_train": true}')
    with pytest.raises(ArgumentError, match="Write the flags on the command line"):
        read_command("glue", [str(tmp_path / "arguments.json")], tmp_path)
    with pytest.raises(ArgumentError, match="--num_train_epochs is 'many'"):
        _ = read_command("glue", ["--do_train", "--do_eval", "--num_train_epochs", "many"], tmp_path).epochs


def test_flags_are_found_in_both_spellings() -> None:
    words = ["--a_b", "1", "--a-b=2", "--ab", "3", "--do_train"]
    assert value_of(words, "a_b") == "2"
    assert without(words, ["a_b"]) == ("--ab", "3", "--do_train")
