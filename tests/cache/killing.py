"""A child process that is killed, as by `kill -9`, at one of the calls by which its work reaches the disk."""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

_WRITE = os.write
# The file that a call is about, by the call's arguments.
_FILES: dict[str, Callable[..., str]] = {
    "write": lambda descriptor, data: os.readlink(f"/proc/self/fd/{descriptor}"),
    "fsync": lambda descriptor: os.readlink(f"/proc/self/fd/{descriptor}"),
    "replace": lambda source, target: str(target),
    "unlink": lambda path, *rest: str(path),
}
_SEEN: list[tuple[str, str]] = []  # (call, file) of everything that reached the disk, in order
_KILL_AT: list[Any] = [None, ""]


def child(work: Callable[[], object], calls: tuple[str, ...], at: int | None = None, moment: str = "", report: Path | None = None) -> int:
    """Do some work in a child process.

    Args:
        work: what it does.
        calls: of `os`, to be counted: write, fsync, replace, unlink.
        at: the number of the event at which it is killed; None for never.
        moment: "before" the call is made (of a write half of it is done) or "after".
        report: where the events go, as JSON.

    Returns:
        The child's status, as `os.waitpid` gives it.
    """
    sys.stdout.flush()
    number = os.fork()
    if number:
        return os.waitpid(number, 0)[1]
    try:
        for call in calls:
            setattr(os, call, _watched(call, getattr(os, call)))
        _KILL_AT[:] = [at, moment]
        work()
        os.write = _WRITE
        if report is not None:
            report.write_text(json.dumps(_SEEN))
        os._exit(0)
    except BaseException:
        os.write = _WRITE
        traceback.print_exc()
        os._exit(1)


def event(call: str, file: str, half: Callable[[], object] | None = None) -> int:
    """Count an event, or be killed at it; returns its number."""
    number = len(_SEEN)
    _SEEN.append((call, os.path.basename(file)))
    if [number, "before"] == _KILL_AT:
        if half is not None:
            half()
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def was_killed(status: int) -> bool:
    """Whether a child ended by SIGKILL."""
    return os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL


def _watched(call: str, done: Callable[..., Any]) -> Callable[..., Any]:
    def watched(*args: Any, **more: Any) -> Any:
        half = (lambda: _WRITE(args[0], bytes(args[1])[: len(args[1]) // 2])) if call == "write" else None
        number = event(call, _FILES[call](*args), half)
        result = done(*args, **more)
        if [number, "after"] == _KILL_AT:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    return watched
