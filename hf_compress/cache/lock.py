"""One builder at a time in a folder, one download of a cache. Locks are the operating system's, so who is killed leaves none behind."""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from hf_compress.errors import CacheError

FILE_NAME = "building.lock"


@contextmanager
def builder_lock(folder: Path, wait: float = 0.0) -> Iterator[None]:
    """Hold the folder while building in it.

    Args:
        folder: the cache's.
        wait: seconds to wait for somebody else who holds it.

    Raises:
        CacheError: if somebody else is building there.
    """
    descriptor = _locked(folder / FILE_NAME, folder, time.monotonic() + wait)
    try:
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"process {os.getpid()}".encode())
        yield
    finally:
        os.close(descriptor)


def _locked(path: Path, folder: Path, until: float) -> int:
    """The lock's file, open and held."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_still(path, descriptor):
                return descriptor
            os.close(descriptor)  # whoever held it took the file away: another one may hold the new file
        except OSError:
            os.close(descriptor)
            if time.monotonic() >= until:
                with contextlib.suppress(FileNotFoundError):
                    holder = path.read_text().strip() or "another process"
                    raise CacheError(
                        f"{folder} is being built by {holder}. Wait until it has finished, then start again: the finished cache is read, "
                        "not built."
                    ) from None
            time.sleep(0.05)


def _is_still(path: Path, descriptor: int) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    return False


def remove_lock(folder: Path) -> None:
    """Take the file away, while holding it: the cache is finished, and nobody builds in it any more."""
    with contextlib.suppress(FileNotFoundError):
        (folder / FILE_NAME).unlink()


@contextmanager
def waiting_lock(path: Path, waiting: Callable[[], object]) -> Iterator[None]:
    """Hold a lock file, after whoever holds it now; the file stays.

    Args:
        path: the file; its folder exists.
        waiting: is called once if somebody else holds it.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            waiting()
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
