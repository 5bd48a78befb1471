"""Child processes: what is finished is not repeated, what fails does not stop the others, and nothing outlives its study."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import pytest

from hf_compress.errors import ArgumentError
from hf_compress.report.study_runs import Outcome, Run, read_record, results_of, run_all

SCRIPT = """
import json, os, sys, time
place, what = sys.argv[1:3]
print("begun", what, os.environ.get("OMP_NUM_THREADS"))
if what == "fail":
    sys.exit("it went wrong")
if what == "wait":
    open(os.path.join(place, "pid"), "w").write(str(os.getpid()))
    time.sleep(60)
if what != "silent":
    json.dump({"eval_accuracy": float(what)}, open(os.path.join(place, "eval_results.json"), "w"))
os.mkdir(os.path.join(place, "checkpoint-2"))
open(os.path.join(place, "model.safetensors"), "w").write("heavy")
"""


def runs(folder: Path, *what: str) -> list[Run]:
    script = folder / "script.py"
    script.write_text(SCRIPT)
    return [
        Run(name, place, (str(script), str(place), name), {"seed": number}) for number, name in enumerate(what) for place in [folder / name]
    ]


def go(waiting: list[Run], *, jobs: int = 1, keep_models: bool = True) -> dict[str, Outcome]:
    seen: list[Outcome] = []
    run_all(waiting, jobs=jobs, results=True, begun=lambda run: None, ended=seen.append, keep_models=keep_models)
    return {outcome.run.name: outcome for outcome in seen}


def test_one_that_fails_and_one_without_results_do_not_stop_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS")
    waiting = runs(tmp_path, "fail", "0.5", "silent", "0.75")
    seen = go(waiting, jobs=4, keep_models=False)
    assert {name: outcome.well for name, outcome in seen.items()} == {"fail": False, "0.5": True, "silent": False, "0.75": True}
    assert seen["fail"].trouble == "exit code 1" and "it went wrong" in seen["fail"].last_lines()
    assert "trainer.save_metrics" in seen["silent"].trouble
    assert [run.finished() for run in waiting] == [False, True, False, True]
    assert results_of(tmp_path / "0.75") == {"eval_accuracy": 0.75}
    record = read_record(tmp_path / "0.75")
    assert record is not None and record["seed"] == 3 and record["command"] == list(waiting[3].command)
    assert sorted(path.name for path in (tmp_path / "0.5").iterdir()) == ["eval_results.json", "study_run.json", "study_run.log"]
    assert f"begun 0.5 {max(1, (os.cpu_count() or 1) // 4)}" in waiting[1].log.read_text()  # the processors are shared


def test_a_run_is_finished_with_its_record_and_results_and_command(tmp_path: Path) -> None:
    (run,) = runs(tmp_path, "0.5")
    go([run])
    assert run.finished() and (run.folder / "model.safetensors").exists()
    other = Run(run.name, run.folder, (*run.command[:-1], "0.6"), run.facts)
    with pytest.raises(ArgumentError, match=r"finished, but with another command: `0\.5` there, `0\.6` now"):
        other.finished()
    with pytest.raises(ArgumentError, match="another teacher on disk"):
        Run(run.name, run.folder, run.command, {"teacher": "abc"}).finished()
    (run.folder / "eval_results.json").unlink()
    assert not run.finished()
    go([run])
    (run.folder / "study_run.json").unlink()
    assert not run.finished()


def test_a_run_that_was_stopped_begins_anew_in_an_empty_folder(tmp_path: Path) -> None:
    (run,) = runs(tmp_path, "0.5")
    run.folder.mkdir()
    run.log.write_text("stopped")
    (run.folder / "eval_results.json").write_text('{"eval_accuracy": 0.1}')
    (run.folder / "checkpoint-2").mkdir()
    assert go([run])["0.5"].well
    assert results_of(run.folder) == {"eval_accuracy": 0.5}


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_a_study_that_is_stopped_leaves_no_child(tmp_path: Path, how: signal.Signals) -> None:
    (run,) = runs(tmp_path, "wait")

    def stop() -> None:
        while not (run.folder / "pid").exists() or not (run.folder / "pid").read_text():
            time.sleep(0.05)
        os.kill(os.getpid(), how)

    threading.Thread(target=stop).start()
    before = signal.getsignal(signal.SIGTERM)
    # A shell that starts tests in the background has them ignore Ctrl-C.
    interrupt = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            go([run])
    finally:
        signal.signal(signal.SIGINT, interrupt)
    assert signal.getsignal(signal.SIGTERM) is before
    with pytest.raises(ProcessLookupError):
        os.kill(int((run.folder / "pid").read_text()), 0)
    assert not run.finished()


def test_an_error_in_the_study_leaves_no_child(tmp_path: Path) -> None:
    waiting = runs(tmp_path, "0.5", "wait")

    def ended(outcome: Outcome) -> None:
        while not (tmp_path / "wait" / "pid").exists() or not (tmp_path / "wait" / "pid").read_text():
            time.sleep(0.05)
        raise ArgumentError("no such metric")

    with pytest.raises(ArgumentError, match="no such metric"):
        run_all(waiting, jobs=2, results=True, begun=lambda run: None, ended=ended)
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "wait" / "pid").read_text()), 0)
