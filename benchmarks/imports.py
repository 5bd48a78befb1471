"""What it costs to begin: imports in fresh processes, and `hf-compress --help`.

    python benchmarks/imports.py --json benchmarks/results/imports.json

Each statement runs in a process of its own, in turns, so that both sides of the ratio see the same machine; timed from outside, the
interpreter's own start included.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

from measuring import Bar, finish, machine, median, quartiles

UPSTREAM = "from transformers import Trainer"
OURS = "from hf_compress import DistillTrainer"
HELP = "hf-compress --help"
COMMANDS = {
    UPSTREAM: [sys.executable, "-c", UPSTREAM],
    OURS: [sys.executable, "-c", OURS],
    HELP: [str(Path(sys.executable).with_name("hf-compress")), "--help"],
}


def seconds_of(command: list[str], clock: str) -> float:
    """One fresh process: its wall time, or the processor time that it and its children used."""
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    wall, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall if clock == "wall" else (after.ru_utime + after.ru_stime) - (before.ru_utime + before.ru_stime)


def main() -> int:
    """Measure, print the table, and say which bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--rounds", type=int, default=15, help="rounds that count, after one that does not")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="cpu on a machine that is busy")
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args()

    facts = {**machine(), "clock": options.clock}
    seconds: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for number in range(options.rounds + 1):
        names = list(COMMANDS)
        first = number % len(names)
        for name in (*names[first:], *names[:first]):
            taken = seconds_of(COMMANDS[name], options.clock)
            if number > 0:  # the first round fills the disk cache and writes byte code
                seconds[name].append(taken)
        print(f"\rround {number} of {options.rounds}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)

    print(f"{'':<42} {'seconds':>8}  middle half of {options.rounds} rounds")
    for name, values in seconds.items():
        print("{:<42} {:>8.3f}  {:.3f} to {:.3f}".format(name, median(values), *quartiles(values)))
    ratios = [ours / theirs for ours, theirs in zip(seconds[OURS], seconds[UPSTREAM], strict=True)]
    bars = [
        Bar(f"{OURS} / {UPSTREAM}", median(ratios), 1.10),
        Bar(HELP, median(seconds[HELP]), 1.0, " s"),
    ]
    return finish(Path(__file__).stem, facts, bars, {"seconds": seconds}, options.json)


if __name__ == "__main__":
    sys.exit(main())
