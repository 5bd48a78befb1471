"""Files that are whole or not there.

    write to NAME.<8 hex digits>.tmp, hashing -> flush -> fsync -> rename to NAME -> fsync of the folder

A process that dies on the way leaves a file that ends in .tmp, which nothing reads and `remove_leftovers` takes away.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import xxhash

from hf_compress.errors import CacheError

CHUNK = 1 << 22  # bytes read or written at a time: fits a processor's cache, so hashing reads no memory again
_TEMPORARY = re.compile(r".+\.[0-9a-f]{8}\.tmp")
_NO_ROOM = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the file would be larger than the limit for one file (`ulimit -f`, or the file system's)",
}


@dataclass(frozen=True)
class FileInfo:
    """What a file must be to be the file that was written.

    Attributes:
        bytes: its size.
        hash: xxh3_128 over all of it, 32 hex digits.
    """

    bytes: int
    hash: str


class HashingWriter:
    """A file being written; what goes in is hashed and counted on the way."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._hash = xxhash.xxh3_128()
        self._bytes = 0

    def write(self, data: bytes | memoryview) -> None:
        """Write all of `data`, a flat buffer of bytes."""
        view = memoryview(data)
        while len(view):
            written = os.write(self._descriptor, view[:CHUNK])
            self._hash.update(view[:written])
            self._bytes += written
            view = view[written:]

    @property
    def info(self) -> FileInfo:
        """What was written so far."""
        return FileInfo(self._bytes, self._hash.hexdigest())


@contextmanager
def atomic_file(path: Path, needed: int) -> Iterator[HashingWriter]:
    """Write a file that appears under its name complete, or not at all; one of that name is replaced.

    Args:
        path: the file; its folder exists.
        needed: how many bytes it will have, for the message when there is no room.

    Raises:
        CacheError: if it cannot be written. The temporary file is removed, and what had the name before is as it was.
    """
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
    writer = None
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            writer = HashingWriter(descriptor)
            yield writer
            os.fsync(descriptor)  # a full disk may show only here
        finally:
            os.close(descriptor)
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except OSError as error:
        _remove(temporary)
        raise _cannot_write(path, needed, writer.info.bytes if writer else 0, error) from error
    except BaseException:
        _remove(temporary)
        raise


def write_atomic(path: Path, data: bytes) -> FileInfo:
    """`atomic_file` for a small file that is at hand."""
    with atomic_file(path, len(data)) as writer:
        writer.write(data)
    return writer.info


def remove_leftovers(folder: Path) -> list[str]:
    """Remove the temporary files of writers that died; only while nobody else writes to this folder.

    Returns:
        The names of the files removed.
    """
    names = sorted(entry.name for entry in os.scandir(folder) if _TEMPORARY.fullmatch(entry.name) and entry.is_file(follow_symlinks=False))
    for name in names:
        _remove(folder / name)
    return names


@contextmanager
def opened(path: Path) -> Iterator[tuple[int, int]]:
    """Open a file of a cache for reading: a regular file, no symbolic link, no pipe.

    Yields:
        The descriptor, and the file's size in bytes.

    Raises:
        CacheError: if it is missing, is something else, or the system does not let it be read.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise CacheError(f"{path} is no file; expected a file that hf_compress wrote. Build the cache again.")
            yield descriptor, status.st_size
        finally:
            os.close(descriptor)
    except FileNotFoundError as error:
        raise CacheError(f"{path} is missing. Copy the whole folder, or build the cache again.") from error
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise CacheError(f"{path} is a symbolic link; expected the file itself, since what a link leads to may change.") from error
        if error.errno == errno.EMFILE:
            raise CacheError(
                f"{path} cannot be opened: too many files are open. Raise `ulimit -n`, or build with larger shards."
            ) from error
        raise CacheError(f"{path} cannot be read: {error.strerror}.") from error


def map_file(path: Path, least: int = 1) -> mmap.mmap:
    """Map a whole file into memory, read-only.

    Args:
        path: the file.
        least: the fewest bytes it must have.
    """
    with opened(path) as (descriptor, size):
        if size < max(least, 1):
            raise CacheError(f"{path} has {size} bytes; expected at least {least}. It was cut off: build the cache again.")
        return mmap.mmap(descriptor, size, access=mmap.ACCESS_READ)


def read_file(path: Path, limit: int) -> bytes:
    """Read a small file whole.

    Args:
        path: the file.
        limit: a file of more bytes is refused before it is read.
    """
    with opened(path) as (descriptor, size):
        if size > limit:
            raise CacheError(f"{path} has {size} bytes; expected at most {limit}. It is no file that hf_compress wrote.")
        parts = []
        while part := os.read(descriptor, CHUNK):
            parts.append(part)
        return b"".join(parts)


def hash_file(path: Path, progress: Callable[[int], None] | None = None) -> FileInfo:
    """Size and hash of a file.

    Args:
        path: the file.
        progress: is told how many bytes were read since it was last called.
    """
    digest, size = xxhash.xxh3_128(), 0
    with opened(path) as (descriptor, _):
        while part := os.read(descriptor, CHUNK):
            digest.update(part)
            size += len(part)
            if progress:
                progress(len(part))
    return FileInfo(size, digest.hexdigest())


def _cannot_write(path: Path, needed: int, written: int, error: OSError) -> CacheError:
    reason = _NO_ROOM.get(error.errno or 0)
    if reason is None:
        return CacheError(f"{path} cannot be written: {error.strerror or error}.")
    try:
        free = f"{shutil.disk_usage(path.parent).free:,} are free on that disk"
    except OSError:
        free = "how many are free is not known"
    return CacheError(
        f"{path} cannot be written: {reason}. It needs {needed:,} bytes, {written:,} were written, {free}. What was finished before is "
        "kept: make room, or choose less to store, and start the same command again; the build goes on where it stopped."
    )


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink()


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
