"""What a run has done so far, beside its output: a stopped run goes on from there.

    OUT.csv.partial     first line   JSON: what was asked for; a run that asks for something else does not go on with it
                        then a line an example, in order: JSON, its copies by text column

Only whole lines count: one that was cut off is taken away. The file is removed when the output is there.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hf_compress.errors import ArgumentError

Copies = Sequence[Sequence[str]]


class PartialFile:
    """The copies of the first examples, as far as they are made.

    Args:
        output: the file that is to be written.
        asked: what decides the copies; plain JSON.
        overwrite: begin anew where something else was asked for before.

    Attributes:
        path: the file.
        done: how many examples are in it.

    Raises:
        ArgumentError: it was begun by a run that asked for something else, or another run is writing it.
    """

    def __init__(self, output: Path, asked: Mapping[str, Any], *, overwrite: bool = False) -> None:
        self.path = output.with_name(f"{output.name}.partial")
        self._file = self.path.open("a+b")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._file.close()
            raise ArgumentError(f"Another run is writing {self.path}. Wait for it, or name another output.") from error
        self._first = (json.dumps(asked, sort_keys=True) + "\n").encode()
        self.done = 0
        self._file.seek(0)
        first = self._file.readline()
        if first and first != self._first:
            if not overwrite and first.endswith(b"\n"):
                self._file.close()
                raise ArgumentError(
                    f"{self.path} was begun by a run that asked for something else{_difference(first, asked)}. Ask for the same to go on "
                    "with it, or add --overwrite to begin anew."
                )
            first = b""
        if not first:
            self._file.truncate(0)
            self._file.write(self._first)
            self._file.flush()
        whole = len(self._first)
        self._file.seek(whole)
        for line in self._file:
            if not line.endswith(b"\n"):
                break
            whole += len(line)
            self.done += 1
        self._file.truncate(whole)
        self._file.seek(0, os.SEEK_END)

    def add(self, copies: Sequence[Copies]) -> None:
        """Append the copies of the next examples."""
        self._file.write(b"".join(json.dumps(some, ensure_ascii=False).encode() + b"\n" for some in copies))
        self._file.flush()
        self.done += len(copies)

    def rows(self) -> Iterator[list[list[str]]]:
        """The copies of each example, in order."""
        with self.path.open("rb") as lines:
            next(lines)
            for line in lines:
                yield json.loads(line)

    def remove(self) -> None:
        """The output is there: take the file away."""
        self.path.unlink()
        self.close()

    def close(self) -> None:
        """Let go of the file; it stays for the next run unless nothing is in it."""
        if not self.done and self.path.exists() and not self._file.closed:
            self.path.unlink()
        self._file.close()


def _difference(first: bytes, asked: Mapping[str, Any]) -> str:
    """What a file was begun with, in words."""
    try:
        before = json.loads(first)
    except ValueError:
        return ""
    for name, value in asked.items():
        if before.get(name) != value:
            return f" ({name} {before.get(name)} there, {value} now)" if name != "examples" else " (other examples)"
    return ""
