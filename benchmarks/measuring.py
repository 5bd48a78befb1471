"""How the benchmarks measure: turns within one run, medians, bars, and a note of the machine.

A ratio of two times means something only when both saw the same machine. So every part that is compared is a `Lane`, stopped between its
steps; the lanes take turns, A B C, B C A, C A B, and the ratio is taken within each round. A neighbour that takes the cores for a minute
slows both sides of a ratio.
"""

from __future__ import annotations

import gc
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

Clock = Literal["wall", "cpu"]
# Does step after step and calls the function it is given after each (or before each); it never returns by itself.
Work = Callable[[Callable[[], None]], None]
CLOCKS: dict[Clock, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}


class Stopped(BaseException):
    """Raised inside a lane to end a training loop that would go on."""


class Lane:
    """Work in steps, of which one is done at a time.

    Args:
        name: as in the table.
        work: see `Work`.

    The work runs in a thread of its own, so that a training loop needs no change to be stopped between two steps; only one lane
    runs at any time.
    """

    def __init__(self, name: str, work: Work, clock: Clock = "wall") -> None:
        self.name = name
        self.seconds: list[float] = []
        self._clock = CLOCKS[clock]
        self._go, self._done = threading.Semaphore(0), threading.Semaphore(0)
        self._stop = False
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(work,), name=name, daemon=True)
        self._thread.start()
        self._advance()  # what comes before the first step

    def step(self) -> None:
        """Do one step and note how long it took."""
        started = self._clock()
        self._advance()
        self.seconds.append(self._clock() - started)

    def close(self) -> None:
        """End the work."""
        self._stop = True
        self._go.release()
        self._thread.join()

    def _advance(self) -> None:
        self._go.release()
        self._done.acquire()
        if self._error is not None:
            raise RuntimeError(f"the lane {self.name!r} failed") from self._error

    def _run(self, work: Work) -> None:
        self._go.acquire()
        try:
            work(self._pause)
            raise RuntimeError("the work came to an end before the measurement did")
        except Stopped:
            pass
        except BaseException as error:
            self._error = error
            self._done.release()

    def _pause(self) -> None:
        self._done.release()
        self._go.acquire()
        if self._stop:
            raise Stopped


def repeated(step: Callable[[], object]) -> Work:
    """The same step again and again."""

    def work(pause: Callable[[], None]) -> None:
        pause()
        while True:
            step()
            pause()

    return work


def take_turns(lanes: Sequence[Lane], rounds: int, warmup: int) -> None:
    """Let the lanes take turns, a different one first in each round; the first `warmup` rounds are forgotten."""
    for number in range(warmup + rounds):
        gc.collect()
        first = number % len(lanes)
        for lane in (*lanes[first:], *lanes[:first]):
            lane.step()
        print(f"\rround {number + 1} of {warmup + rounds}", end="", file=sys.stderr, flush=True)
        if number + 1 == warmup:
            for lane in lanes:
                lane.seconds.clear()
    print(file=sys.stderr)


@dataclass(frozen=True)
class Bar:
    """A value that must not be above its limit.

    Attributes:
        measured: None where it was not measured.
    """

    name: str
    measured: float | None
    limit: float
    unit: str = ""

    @property
    def missed(self) -> bool:
        """Whether the value was measured and is above the limit."""
        return self.measured is not None and self.measured > self.limit

    def __str__(self) -> str:
        value = "not measured" if self.measured is None else f"{self.measured:.3f}{self.unit}"
        verdict = "" if self.measured is None else ("  MISSED" if self.missed else "  ok")
        return f"{self.name:<62} {value:>14}  (at most {self.limit:.3f}{self.unit}){verdict}"


def median(values: Sequence[float]) -> float:
    """The middle one."""
    return statistics.median(values)


def quartiles(values: Sequence[float]) -> tuple[float, float]:
    """Between which the middle half of the values lies."""
    if len(values) < 2:
        return values[0], values[0]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, high


def machine() -> dict[str, Any]:
    """What a number needs beside it to be read later: processor, cores, load, versions, commit."""
    return {
        "date": time.strftime("%Y-%m-%d"),
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "load_average_at_start": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        **_gpu(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        **{name: _version(name) for name in ("torch", "transformers", "accelerate")},
        "commit": _commit(),
    }


def finish(benchmark: str, facts: dict[str, Any], bars: Sequence[Bar], details: dict[str, Any], json_path: str | None) -> int:
    """Print the bars, write everything to `json_path`, and return the exit code: 1 where a bar is missed."""
    print()
    for bar in bars:
        print(bar)
    if json_path is not None:
        record = {
            "benchmark": benchmark,
            "machine": facts,
            "bars": [{**asdict(bar), "missed": bar.missed} for bar in bars],
            **details,
        }
        Path(json_path).parent.mkdir(parents=True, exist_ok=True)
        Path(json_path).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return int(any(bar.missed for bar in bars))


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _gpu() -> dict[str, str]:
    return {"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"
