"""Files are whole or not there: when the disk is full, when the writer is killed, when its own code fails."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import xxhash

from hf_compress.cache.files import FileInfo, atomic_file, hash_file, map_file, read_file, remove_leftovers, write_atomic
from hf_compress.cache.shard import Column, shard_name, write_shard
from hf_compress.cache.shard_reader import read_shard_info
from hf_compress.errors import CacheError


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """No file of this process can grow beyond `size` bytes (Python ignores the signal that comes with it)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_write_read_hash(tmp_path: Path) -> None:
    path = tmp_path / "a"
    data = os.urandom(10_000_000)  # more than one piece
    assert write_atomic(path, b"before") == FileInfo(6, xxhash.xxh3_128_hexdigest(b"before"))
    info = write_atomic(path, data)
    assert info == hash_file(path) == FileInfo(len(data), xxhash.xxh3_128_hexdigest(data))
    assert read_file(path, len(data)) == data == map_file(path)[:]
    assert os.listdir(tmp_path) == ["a"]
    with pytest.raises(CacheError, match="at most 9999999"):
        read_file(path, len(data) - 1)


def test_no_room(tmp_path: Path) -> None:
    """A shard that does not fit: said so, nothing left, and what was finished before is kept; with room, the same call goes through."""
    keys = np.arange(2000, dtype=np.uint64).reshape(1000, 2)
    columns, values = [Column("a", "", "float32", (256,))], {"a": np.ones((1000, 256), np.float32)}
    first = write_shard(tmp_path / shard_name(0), keys, columns, values, {})
    with file_size_limit(100_000), pytest.raises(CacheError) as caught:
        write_shard(tmp_path / shard_name(1), keys + np.uint64(1), columns, values, {})
    for part in (
        "shard-00001",
        "limit for one file",
        f"{first.bytes:,} bytes",
        "100,000 were written",
        "are free",
        "goes on where it stopped",
    ):
        assert part in str(caught.value)
    assert os.listdir(tmp_path) == [shard_name(0)]
    assert read_shard_info(tmp_path / shard_name(0), columns) == first
    second = write_shard(tmp_path / shard_name(1), keys + np.uint64(1), columns, values, {})
    assert read_shard_info(tmp_path / shard_name(1), columns) == second


def test_no_room_keeps_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "manifest.json"
    write_atomic(path, b"before")
    with file_size_limit(1000), pytest.raises(CacheError, match=r"2,000 bytes, 1,000 were written"):
        write_atomic(path, bytes(2000))
    assert path.read_bytes() == b"before"
    assert os.listdir(tmp_path) == ["manifest.json"]


def test_the_writers_own_error_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), atomic_file(tmp_path / "a", 2) as file:
        file.write(b"1")
        raise KeyboardInterrupt
    assert os.listdir(tmp_path) == []


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(CacheError, match="cannot be written: No such file or directory"):
        write_atomic(tmp_path / "none" / "a", b"1")


KILLED = """
import os, signal, sys
from pathlib import Path
from hf_compress.cache import files

path, moment = Path(sys.argv[1]), sys.argv[2]
def die(*arguments):
    os.kill(os.getpid(), signal.SIGKILL)
if moment == "rename":
    os.replace = die
with files.atomic_file(path, 8) as file:
    file.write(b"half")
    if moment == "write":
        die()
    file.write(b"half")
"""


@pytest.mark.parametrize("moment", ["write", "rename"])
@pytest.mark.parametrize("before", [b"before", None])
def test_killed(tmp_path: Path, moment: str, before: bytes | None) -> None:
    path = tmp_path / "manifest.json"
    if before:
        path.write_bytes(before)
    code = subprocess.run([sys.executable, "-c", KILLED, str(path), moment], cwd=Path(__file__).parents[2], check=False).returncode
    assert code == -signal.SIGKILL
    assert (path.read_bytes() if path.exists() else None) == before
    (left,) = [name for name in os.listdir(tmp_path) if name != path.name]
    assert left.endswith(".tmp")
    assert remove_leftovers(tmp_path) == [left]
    write_atomic(path, b"after")
    assert os.listdir(tmp_path) == [path.name] and path.read_bytes() == b"after"


def test_only_leftovers_are_removed(tmp_path: Path) -> None:
    kept = {"notes.tmp", "shard-00000.safetensors", "a.0123456.tmp", "a.0123456789.tmp", ".01234567.tmp", "a.01234567.tmp.bak"}
    for name in kept:
        (tmp_path / name).write_bytes(b"1")
    (tmp_path / "folder.01234567.tmp").mkdir()
    (tmp_path / "link.01234567.tmp").symlink_to(tmp_path / "notes.tmp")
    (tmp_path / "shard-00001.safetensors.0123abcd.tmp").write_bytes(b"1")
    assert remove_leftovers(tmp_path) == ["shard-00001.safetensors.0123abcd.tmp"]
    assert set(os.listdir(tmp_path)) == kept | {"folder.01234567.tmp", "link.01234567.tmp"}


def test_a_link_is_replaced_not_followed(tmp_path: Path) -> None:
    other, path = tmp_path / "other", tmp_path / "a"
    other.write_bytes(b"other")
    path.symlink_to(other)
    with pytest.raises(CacheError, match="symbolic link"):
        read_file(path, 100)
    write_atomic(path, b"new")
    assert not path.is_symlink() and path.read_bytes() == b"new" and other.read_bytes() == b"other"


def test_no_files(tmp_path: Path) -> None:
    with pytest.raises(CacheError, match="missing"):
        hash_file(tmp_path / "none")
    with pytest.raises(CacheError, match="is no file"):
        map_file(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(CacheError, match="is no file"):
        read_file(tmp_path / "pipe", 100)
    (tmp_path / "empty").touch()
    with pytest.raises(CacheError, match="has 0 bytes"):
        map_file(tmp_path / "empty")
    with pytest.raises(CacheError, match="Not a directory"):
        map_file(tmp_path / "empty" / "a")


def test_too_many_open_files(tmp_path: Path) -> None:
    write_atomic(tmp_path / "a", b"1")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) - 1, hard))
    held = []
    try:
        with pytest.raises(CacheError, match="too many files are open"):
            for _ in range(1000):
                held.append(map_file(tmp_path / "a"))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
