"""One builder at a time in a folder. The lock is the operating system's, so a builder that is killed leaves none behind."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hf_compress.errors import CacheError

FILE_NAME = "building.lock"


@contextmanager
def builder_lock(folder: Path) -> Iterator[None]:
    """Hold the folder while building in it.

    Raises:
        CacheError: if somebody else is building there.
    """
    path = folder / FILE_NAME
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            holder = path.read_text().strip() or "another process"
            raise CacheError(
                f"{folder} is being built by {holder}. Wait until it has finished, then start again: the finished cache is read, not built."
            ) from None
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"process {os.getpid()}".encode())
        yield
    finally:
        os.close(descriptor)


def remove_lock(folder: Path) -> None:
    """Take the file away, while holding it: the cache is finished, and nobody builds in it any more."""
    with contextlib.suppress(FileNotFoundError):
        (folder / FILE_NAME).unlink()
