"""A step of the flow: commands, what they leave, and when it is done. A step that was stopped goes on where it was.

OUT/steps/NAME.begun    written before the first command of the step: what is run
OUT/steps/NAME.json     written when the last command of the step has ended well: what was run, and when
OUT/NAME/checkpoint-N   where a training that was stopped goes on
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

Command = list[str]


class FlowError(Exception):
    """The flow cannot go on; the message says why, and what to do."""


@dataclass(frozen=True)
class Step:
    """What one step runs.

    Attributes:
        name: as in `--steps`.
        commands: what follows `hf-compress`, one after another.
        leaves: files that are there when it is done.
        trains_in: the folder in which its last command keeps checkpoints; None where it trains nothing.
        price: a command to run before the others, made when it is time, since it counts what an earlier step wrote.
        builds_on: the steps whose results it reads.
    """

    name: str
    commands: Sequence[Command]
    leaves: Sequence[Path]
    trains_in: Path | None = None
    price: Callable[[], Command] | None = None
    builds_on: Sequence[str] = ()


class Flow:
    """Runs steps, and keeps note of those that are done.

    Args:
        folder: where the notes go.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def run(self, step: Step) -> None:
        """Run a step, unless it is done.

        Raises:
            FlowError: a command failed, or the step was done with other settings, or before a step that it builds on.
        """
        note = self._folder / f"{step.name}.json"
        if self._is_done(step, note):
            print(f"\n{step.name}: done already", flush=True)
        else:
            print(f"\n{step.name}:", flush=True)
            self._begin(step)
            if step.price is not None:
                _run(step.name, step.price())
            for number, command in enumerate(step.commands, start=1):
                last = number == len(step.commands)
                _run(step.name, [*command, *(_where_it_was(step.trains_in) if last else [])])
            absent = [str(path) for path in step.leaves if not path.is_file()]
            if absent:
                raise FlowError(f"{step.name} ended well, and yet left no {', '.join(absent)}.")
            _write_whole(note, {"commands": [shlex.join(command) for command in step.commands], "finished": time.time()})
            self._begun(step).unlink()

    def _begun(self, step: Step) -> Path:
        return self._folder / f"{step.name}.begun"

    def _begin(self, step: Step) -> None:
        """Note what is run; where a training was begun with other settings, its checkpoints are not those of this one."""
        begun, commands = self._begun(step), [shlex.join(command) for command in step.commands]
        noted = json.loads(begun.read_text(encoding="utf-8"))["commands"] if begun.is_file() else None
        if _where_it_was(step.trains_in) and noted != commands:
            found = "was not begun by this flow" if noted is None else _changed(noted, commands)
            raise FlowError(f"{step.name} has checkpoints in {step.trains_in}, and {found}\n{_again(step, begun)}")
        _write_whole(begun, {"commands": commands})

    def _is_done(self, step: Step, note: Path) -> bool:
        if not note.is_file():
            return False
        noted = json.loads(note.read_text(encoding="utf-8"))
        again = _again(step, note)
        commands = [shlex.join(command) for command in step.commands]
        if noted["commands"] != commands:
            raise FlowError(f"{step.name} {_changed(noted['commands'], commands)}\n{again}")
        for other in step.builds_on:
            below = self._folder / f"{other}.json"
            if below.is_file() and float(json.loads(below.read_text(encoding="utf-8"))["finished"]) > float(noted["finished"]):
                raise FlowError(f"{step.name} was done before {other} was done again, and builds on it. {again}")
        absent = [str(path) for path in step.leaves if not path.is_file()]
        if absent:
            raise FlowError(f"{step.name} was done, and {', '.join(absent)} is gone. {again}")
        return True


def _changed(then: Sequence[str], now: Sequence[str]) -> str:
    first, second = next((pair for pair in zip(then, now, strict=False) if pair[0] != pair[1]), (list(then), list(now)))
    return f"was done with other settings:\n  then {first}\n  now  {second}"


def _again(step: Step, note: Path) -> str:
    # The whole folder: a checkpoint that is left would be gone on from.
    left = [step.trains_in] if step.trains_in is not None else []
    left += [path for path in step.leaves if path.parent not in left]
    return f"Take another --output_dir; or delete {note} and {', '.join(map(str, left))} to do it again."


def _run(name: str, command: Command) -> None:
    print(f"$ hf-compress {shlex.join(command)}", flush=True)
    code = subprocess.run([sys.executable, "-m", "hf_compress.cli.app", *command], check=False).returncode
    if code:
        raise FlowError(f"{name} stopped with exit code {code}. Once the cause is mended, the same command goes on here.")


def _where_it_was(folder: Path | None) -> Command:
    """The flag with which a training that was stopped goes on; nothing where there is no whole checkpoint."""
    whole = [] if folder is None else [path for path in folder.glob("checkpoint-*") if (path / "trainer_state.json").is_file()]
    newest = max(whole, key=lambda path: int(path.name.rpartition("-")[2]), default=None)
    return [] if newest is None else ["--resume_from_checkpoint", str(newest)]


def _write_whole(path: Path, values: dict[str, object]) -> None:
    """Write and rename, so that a note is there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    with partial.open("w", encoding="utf-8") as out:
        json.dump(values, out, indent=1)
        out.flush()
        os.fsync(out.fileno())
    partial.replace(path)
