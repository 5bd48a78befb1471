"""The TinyBERT example: its commands, how it skips, resumes and refuses; and the whole of it on tiny models."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

from hf_compress.projection_file import FILE_NAME
from tests.tiny_glue import write_glue
from tests.tiny_text import WORDS, model_folder, sentences

FOLDER = Path(__file__).parents[2] / "examples" / "tinybert"


@pytest.fixture
def tinybert(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("tinybert")


@pytest.fixture
def step(tinybert: ModuleType) -> ModuleType:
    return importlib.import_module("step")


def commands(tinybert: ModuleType, *flags: str) -> dict[str, list[str]]:
    """By step, its commands as text."""
    parsed = tinybert.flag_parser().parse_args(["--output_dir", "out", *flags])
    steps = tinybert.TinyBert(parsed).steps(tinybert.chosen_steps(parsed))
    return {step.name: [" ".join(command) for command in step.commands] for step in steps}


def test_the_commands_of_a_task(tinybert: ModuleType) -> None:
    found = commands(tinybert, "--task_name", "cola", "--text", "wiki.txt", "--vectors", "glove.txt")
    assert list(found) == ["general", "teacher", "augment", "intermediate", "prediction"]
    assert "--hidden_size 312" in found["general"][0]
    assert "--mlm_probability 0 " in found["general"][1] and "--warmup_steps 0.1" in found["general"][1]
    assert found["augment"] == [
        "augment nyu-mll/glue:cola -o out/augmented.parquet --mlm bert-base-uncased --vectors glove.txt --num_copies 20 --seed 42"
    ]
    (intermediate,), (prediction,) = found["intermediate"], found["prediction"]
    assert "--distill_phases intermediate=50 " in intermediate and "--learning_rate 5e-05" in intermediate
    assert "--do_eval" not in intermediate and "--warmup_steps" not in intermediate
    assert "--distill_phases prediction=3 " in prediction and "--learning_rate 3e-05" in prediction and "--do_eval" in prediction
    for command in (intermediate, prediction):
        assert "--task_name cola --train_file out/augmented.parquet --max_seq_length 64" in command
        assert "--teacher_cache_dir out/cache" in command
    assert "--teacher_model_name_or_path" not in prediction


def test_the_predictions_of_stsb_are_learnt_on_the_original_examples(tinybert: ModuleType) -> None:
    found = commands(tinybert, "--task_name", "stsb", "--teacher", "t", "--general_student", "g")
    assert list(found) == ["augment", "intermediate", "prediction"]
    assert "--train_file" not in found["prediction"][0]
    assert "--train_file" in found["intermediate"][0]


def test_ones_own_data(tinybert: ModuleType) -> None:
    files = ("--train_file", "a.csv", "--validation_file", "b.csv")
    found = commands(tinybert, *files, "--general_student", "g", "--steps", "augment,prediction", "--mlm", "none")
    assert found["augment"] == ["augment a.csv -o out/augmented.csv --num_copies 20 --seed 42"]
    assert "--train_file out/augmented.csv" in found["prediction"][0] and "--validation_file b.csv" in found["prediction"][0]
    assert "--task_name" not in found["prediction"][0]


def test_a_student_that_is_there_already(tinybert: ModuleType, tmp_path: Path) -> None:
    sizes = dict.fromkeys(("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"), 4)
    (tmp_path / "config.json").write_text(json.dumps(sizes))
    flags = ("--task_name", "mrpc", "--teacher", "t", "--general_student", str(tmp_path))
    published = commands(tinybert, *flags)
    assert published["general"] == [f"student {tmp_path} -o out/general"]
    assert "--model_name_or_path out/general " in published["intermediate"][0]
    (tmp_path / "config.json").write_text(json.dumps({**sizes, "model_type": "bert"}))
    ours = commands(tinybert, *flags)
    assert "general" not in ours and f"--model_name_or_path {tmp_path} " in ours["intermediate"][0]


def test_without_a_cache(tinybert: ModuleType) -> None:
    found = commands(tinybert, "--task_name", "mrpc", "--teacher", "t", "--general_student", "g", "--live_teacher")
    for name in ("intermediate", "prediction"):
        assert "--teacher_model_name_or_path t" in found[name][0] and "cache" not in found[name][0]


@pytest.mark.parametrize(
    ("task", "paper", "released_code"),
    [("cola", (64, 50, 20), (64, 50, 30)), ("mnli", (128, 10, 20), (128, 5, 10)), ("sst2", (64, 20, 20), (64, 10, 20))],
)
def test_the_settings_of_tasks(tinybert: ModuleType, task: str, paper: tuple[int, ...], released_code: tuple[int, ...]) -> None:
    for source, expected in (("paper", paper), ("released_code", released_code)):
        found: Any = tinybert.settings_of(task, source)
        assert (found.max_seq_length, found.intermediate_epochs, found.num_copies) == expected


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--steps", "agument"], "there is no step agument"),
        (["--steps", "teacher"], "Say which task"),
        (["--task_name", "mrcp"], "mrcp is no GLUE task"),
        (["--task_name", "mrpc"], "general distillation needs raw text"),
        pytest.param(
            ["--task_name", "mrpc", "--steps", "augment", "--train_file", "nowhere.csv"],
            "augment stopped with exit code 2",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_what_is_refused(tinybert: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], words: str) -> None:
    assert tinybert.main(["--output_dir", str(tmp_path / "out"), *flags]) == 1
    assert words in capsys.readouterr().err


@pytest.mark.slow
def test_one_step_alone_into_a_new_folder(tinybert: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text("sentence,label\nthe room was clean,good\nthe bed was loud,bad\n")
    (tmp_path / "vectors.txt").write_text("\n".join(f"{word} {number} {number % 3}" for number, word in enumerate(WORDS[5:])) + "\n")
    files = ("--train_file", str(tmp_path / "train.csv"), "--validation_file", "unread.csv", "--vectors", str(tmp_path / "vectors.txt"))
    flags = [*files, "--steps", "augment", "--mlm", "none", "--num_copies", "2", "--output_dir", str(tmp_path / "a" / "b")]
    assert tinybert.main(flags) == 0
    lines = (tmp_path / "a" / "b" / "augmented.csv").read_text().splitlines()
    assert lines[0] == "sentence,label" and "the room was clean,good" in lines and len(lines) > 3


def test_a_step_is_done_once(step: ModuleType, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    left = tmp_path / "left"
    left.write_text("")
    first = step.Step("first", [["version"]], [left])
    step.Flow(tmp_path / "steps").run(first)
    assert "$ hf-compress version\n" in capfd.readouterr().out
    step.Flow(tmp_path / "steps").run(first)
    shown = capfd.readouterr().out
    assert "first: done already" in shown and "$" not in shown
    with pytest.raises(step.FlowError, match="done with other settings:\n  then version\n  now  version --now"):
        step.Flow(tmp_path / "steps").run(step.Step("first", [["version", "--now"]], [left]))
    left.unlink()
    with pytest.raises(step.FlowError, match="left is gone"):
        step.Flow(tmp_path / "steps").run(first)


def test_a_step_that_fails_is_not_done(step: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(step.FlowError, match="first stopped with exit code 2"):
        step.Flow(tmp_path / "steps").run(step.Step("first", [["verzion"]], []))
    with pytest.raises(step.FlowError, match="ended well, and yet left no"):
        step.Flow(tmp_path / "steps").run(step.Step("first", [["version"]], [tmp_path / "never"]))
    assert [path.name for path in (tmp_path / "steps").iterdir()] == ["first.begun"]


def test_a_step_that_was_done_before_the_one_it_builds_on(step: ModuleType, tmp_path: Path) -> None:
    one, two = step.Step("one", [["version"]], []), step.Step("two", [["version"]], [], builds_on=("one",))
    flow = step.Flow(tmp_path)
    flow.run(one)
    flow.run(two)
    (tmp_path / "one.json").unlink()
    again = step.Flow(tmp_path)
    again.run(one)
    with pytest.raises(step.FlowError, match="two was done before one was done again"):
        again.run(two)


def test_steps_that_do_not_build_on_each_other_are_done_in_any_order(step: ModuleType, tmp_path: Path) -> None:
    one, two = (step.Step(name, [["version"]], []) for name in ("one", "two"))
    for each in (two, one, two):
        step.Flow(tmp_path).run(each)


def test_checkpoints_of_other_settings_are_not_gone_on_from(step: ModuleType, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    (folder / "checkpoint-9").mkdir(parents=True)
    (folder / "checkpoint-9" / "trainer_state.json").write_text("{}")
    with pytest.raises(step.FlowError, match="was not begun by this flow"):
        step.Flow(tmp_path / "steps").run(step.Step("first", [["version"]], [], trains_in=folder))
    (tmp_path / "steps").mkdir()
    (tmp_path / "steps" / "first.begun").write_text(json.dumps({"commands": ["train --learning_rate 1"]}))
    with pytest.raises(step.FlowError, match=r"now  version\nTake another --output_dir; or delete .*first.begun and .*out to do it again"):
        step.Flow(tmp_path / "steps").run(step.Step("first", [["version"]], [], trains_in=folder))


def test_a_training_goes_on_from_its_newest_whole_checkpoint(step: ModuleType, tmp_path: Path) -> None:
    assert step._where_it_was(None) == step._where_it_was(tmp_path) == []
    for number in (9, 10, 11):
        (tmp_path / f"checkpoint-{number}").mkdir()
    for number in (9, 10):
        (tmp_path / f"checkpoint-{number}" / "trainer_state.json").write_text("{}")
    assert step._where_it_was(tmp_path) == ["--resume_from_checkpoint", str(tmp_path / "checkpoint-10")]


def losses(folder: Path) -> list[dict[str, float]]:
    state = json.loads((folder / "trainer_state.json").read_text())
    return [entry for entry in state["log_history"] if "loss" in entry]


@pytest.mark.slow
def test_the_whole_flow(tmp_path: Path) -> None:
    write_glue(tmp_path)
    (tmp_path / "text.txt").write_text("\n".join(sentences(64)) + "\n")
    vectors = "\n".join(f"{word} {number % 5} {number % 3} {number}" for number, word in enumerate(WORDS[5:], start=1))
    (tmp_path / "vectors.txt").write_text(vectors + "\n")
    raw = model_folder(tmp_path / "raw", head="masked_lm")
    out = tmp_path / "out"
    shape = ["--num_hidden_layers", "2", "--hidden_size", "8", "--num_attention_heads", "2", "--intermediate_size", "12"]
    flags = [
        *("--task_name", "sst2", "--output_dir", str(out), "--general_teacher", raw, "--text", "text.txt", "--vectors", "vectors.txt"),
        *(*shape, "--general_batch_size", "4", "--general_learning_rate", "0.01", "--batch_size", "8", "--num_copies", "2"),
        *("--teacher_learning_rate", "0.01", "--intermediate_learning_rate", "0.01", "--intermediate_epochs", "4"),
        *("--teacher_cache_dtype", "int8", "--training_flags", "--use_cpu True --disable_tqdm True --logging_steps 1"),
    ]
    environment = {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}

    def run() -> str:
        command = [sys.executable, str(FOLDER / "tinybert.py"), *flags]
        done = subprocess.run(command, cwd=tmp_path, env={**os.environ, **environment}, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout + done.stderr

    shown = run()
    for name in ("general", "intermediate", "prediction"):
        assert (out / name / FILE_NAME).is_file()
    for before in ("general", "intermediate"):
        assert f"projection layers_shared: starts from {FILE_NAME} in {out / before}" in shown
    assert "all of the recipe tinybert, that is all" in shown  # the price
    for name, part in (("general", "loss_hidden_states"), ("intermediate", "loss_hidden_states")):
        assert losses(out / name)[-1][part] < losses(out / name)[0][part]
    assert {entry["learning_rate"] for entry in losses(out / "intermediate")} == {0.01}
    assert set(losses(out / "prediction")[0]) >= {"loss_logits"} and "loss_hidden_states" not in losses(out / "prediction")[0]
    manifest = json.loads((out / "cache" / "manifest.json").read_text())
    assert manifest["selection"]["codec"] == "int8"
    student = AutoModelForSequenceClassification.from_pretrained(out / "prediction")
    assert student.config.label2id == {"bad": 0, "good": 1}
    assert "eval_right_in_sst2" in json.loads((out / "prediction" / "eval_results.json").read_text())
    assert "\nteacher  " in shown and "\nstudent  " in shown

    first = load_file(out / "prediction" / "model.safetensors")
    again = run()
    assert again.count("done already") == 5 and "$" not in again
    (out / "steps" / "prediction.json").rename(out / "steps" / "prediction.begun")  # as it lies there while the step runs
    resumed = run()
    assert resumed.count("done already") == 4 and f"--resume_from_checkpoint {out / 'prediction' / 'checkpoint-'}" in resumed
    after = load_file(out / "prediction" / "model.safetensors")
    assert all((first[name] - after[name]).abs().max() < 1e-6 for name in first)
