"""The runs of a study: child processes, some at a time, each in a folder of its own. No torch here.

OUT/runs/1l_10t_0.1h/seed-42/study_run.log      all that the run printed
                             eval_results.json  the script's own
                             study_run.json     written last: with it, and the results, the run is finished

A run that is finished is not repeated; one that was stopped begins anew.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from hf_compress.cache.files import write_atomic
from hf_compress.errors import ArgumentError

RECORD, LOG = "study_run.json", "study_run.log"
RESULTS = ("eval_results.json", "all_results.json")
# What of a run's folder is large, and no score.
WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "checkpoint-*", "phase-*")
LAST_LINES = 12
_LOOK = 0.1  # seconds between two looks at the children
_PATIENCE = 10.0  # seconds that a child has to end when it is asked to


@dataclass(frozen=True)
class Run:
    """One child process.

    Attributes:
        name: for people.
        folder: its output folder.
        command: what follows `hf-compress run`.
        facts: what the record says besides.
    """

    name: str
    folder: Path
    command: tuple[str, ...]
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def log(self) -> Path:
        """All that it prints."""
        return self.folder / LOG

    def finished(self) -> bool:
        """Whether it is done, with this very command.

        Raises:
            ArgumentError: it is done with another one.
        """
        record = read_record(self.folder)
        if record is None or results_of(self.folder) is None:
            return False
        told = record.get("command"), record.get("teacher")
        if told != (list(self.command), self.facts.get("teacher", told[1])):
            raise ArgumentError(
                f"{self.folder} holds a run that is finished, {_difference(record, self)}. Name another folder with --output_dir, or "
                "delete that one."
            )
        return True


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes:
        run: which.
        code: the exit code; 0 is well.
        seconds: by the clock.
        trouble: in a few words; "" where there is none.
    """

    run: Run
    code: int
    seconds: float
    trouble: str = ""

    @property
    def well(self) -> bool:
        """Whether it gave what it should."""
        return not self.trouble

    def last_lines(self) -> str:
        """The end of its log, indented."""
        lines = self.run.log.read_text(encoding="utf-8", errors="replace").splitlines() if self.run.log.exists() else []
        return "\n".join(f"    {line}" for line in lines[-LAST_LINES:])


def read_record(folder: Path) -> dict[str, Any] | None:
    """A run's record; None where there is none that can be read."""
    try:
        found = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def results_of(folder: Path) -> dict[str, Any] | None:
    """What the script's evaluation found, by metric; None where it has not written it."""
    for name in RESULTS:
        try:
            found = json.loads((folder / name).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(found, dict) and any(key.startswith("eval_") for key in found):
            return found
    return None


def run_all(
    runs: Sequence[Run],
    *,
    jobs: int,
    results: bool,
    begun: Callable[[Run], object],
    ended: Callable[[Outcome], object],
    keep_models: bool = True,
) -> list[Outcome]:
    """Run them, so many at a time; one that fails does not stop the others.

    Args:
        runs: in order.
        jobs: how many at once.
        results: whether a run has to write results to be well.
        begun, ended: are told of every run.
        keep_models: whether what weighs much stays in a finished run's folder.

    Raises:
        KeyboardInterrupt: Ctrl-C, or SIGTERM; the children are gone by then. So they are after an error that `ended` raises.
    """
    waiting, outcomes = list(runs), []
    going: dict[str, tuple[Run, subprocess.Popen[bytes], float]] = {}
    with _terminating() as stopped:
        try:
            while waiting or going:
                while waiting and len(going) < jobs:
                    run = waiting.pop(0)
                    going[run.name] = (run, _start(run, jobs), time.monotonic())
                    begun(run)
                for run, child, started in list(going.values()):
                    if (code := child.poll()) is None:
                        continue
                    del going[run.name]
                    outcome = _outcome(run, code, time.monotonic() - started, results)
                    if outcome.well:
                        _finish(outcome, keep_models)
                    outcomes.append(outcome)
                    ended(outcome)
                if stopped.is_set():
                    raise KeyboardInterrupt
                time.sleep(_LOOK)
        finally:
            _stop([child for _, child, _ in going.values()])
    return outcomes


def _start(run: Run, jobs: int) -> subprocess.Popen[bytes]:
    if run.folder.exists() and (run.log.exists() or not any(run.folder.iterdir())):
        shutil.rmtree(run.folder)  # what a run of a study left that was stopped
    run.folder.mkdir(parents=True, exist_ok=True)
    environment = dict(os.environ)
    if jobs > 1:
        environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // jobs)))
    log: IO[bytes]
    with run.log.open("wb") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "hf_compress.run", *run.command],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
        )


def _outcome(run: Run, code: int, seconds: float, results: bool) -> Outcome:
    trouble = "" if code == 0 else f"exit code {code}"
    if not trouble and results and results_of(run.folder) is None:
        trouble = f"it ended without {' or '.join(RESULTS)}: the script has to call trainer.save_metrics('eval', metrics)"
    return Outcome(run, code, seconds, trouble)


def _finish(outcome: Outcome, keep_models: bool) -> None:
    """Write the record; before that, take away what is large."""
    run = outcome.run
    for pattern in () if keep_models else WEIGHTS:
        for path in run.folder.glob(pattern):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()
    record = {"command": list(run.command), "seconds": round(outcome.seconds, 1), **run.facts}
    write_atomic(run.folder / RECORD, (json.dumps(record, indent=1) + "\n").encode())


def _stop(children: Sequence[subprocess.Popen[bytes]]) -> None:
    for child in children:
        if child.poll() is None:
            child.terminate()
    deadline = time.monotonic() + _PATIENCE
    for child in children:
        try:
            child.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


@contextmanager
def _terminating() -> Iterator[threading.Event]:
    """An event that SIGTERM sets, so that no child outlives the study; only the main thread can listen for it."""
    stopped = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stopped
        return
    before = signal.signal(signal.SIGTERM, lambda number, frame: stopped.set())
    try:
        yield stopped
    finally:
        signal.signal(signal.SIGTERM, before)


def _difference(record: Mapping[str, Any], run: Run) -> str:
    """How the command of a finished run differs from the one that was to be run."""
    was, now = record.get("command") or [], list(run.command)
    if was == now:
        return "but from another teacher on disk"
    gone, new = ([word for word in words if word not in others] for words, others in ((was, now), (now, was)))
    return f"but with another command: `{' '.join(gone) or 'less'}` there, `{' '.join(new) or 'less'}` now"
