"""Read a cache whole, and say what is wrong with it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hf_compress.cache.files import hash_file
from hf_compress.cache.index import Index
from hf_compress.cache.manifest import SHARED_FILE, Manifest
from hf_compress.cache.shard import ShardInfo
from hf_compress.cache.shard_reader import Shard
from hf_compress.errors import CacheError

_AT_ONCE = 1 << 16  # keys looked up together
_NAMED = 5  # damaged records named of each shard

Progress = Callable[[int], None]


@dataclass(frozen=True)
class VerifyReport:
    """What `verify` found.

    Attributes:
        examples: in the manifest; 0 where that cannot be read.
        bytes: that were read, the manifest's not counted.
        seconds: how long it took.
        problems: in words, each with its file; none if all is as it was written.
    """

    examples: int
    bytes: int
    seconds: float
    problems: tuple[str, ...]


def verify(folder: Path, progress: Progress | None = None) -> VerifyReport:
    """Check every byte of a cache: the manifest, each file's hash, each record's checksum, and the index against the shards, both ways.

    Args:
        folder: the cache.
        progress: is told how many bytes were checked since it was last called; all together `Manifest.bytes`, if nothing is missing.

    Returns:
        What was found; damage is told there, not raised.
    """
    start, read = time.perf_counter(), 0

    def count(size: int) -> None:
        nonlocal read
        read += size
        if progress:
            progress(size)

    try:
        manifest = Manifest.load(folder)
    except CacheError as error:
        return VerifyReport(0, 0, time.perf_counter() - start, (str(error),))
    problems = list(_problems(folder, manifest, count))
    if not problems and read != manifest.bytes:
        problems.append(f"{folder}: the files have {read} bytes together; expected {manifest.bytes}, as the manifest says.")
    return VerifyReport(manifest.examples, read, time.perf_counter() - start, tuple(problems))


def _problems(folder: Path, manifest: Manifest, progress: Progress) -> Iterator[str]:
    if manifest.shared is not None:
        yield from _wrong_hash(folder / SHARED_FILE, manifest.shared, progress)
    yield from _wrong_hash(folder / manifest.index_file, manifest.index, progress)
    try:
        index: Index | None = Index.open(folder / manifest.index_file, manifest.examples)
    except CacheError as error:
        yield str(error)
        index = None
    indexed = 0
    whole = index is not None
    for number, info in enumerate(manifest.shards):
        yield from _wrong_hash(folder / info.name, info.hash, progress)
        try:
            shard = Shard.open(folder / info.name, info, manifest.columns)
        except CacheError as error:
            yield str(error)
            whole = False
            continue
        yield from _damaged_records(shard, info)
        if index is not None:
            try:
                found, wrong = _look_up(index, shard, number)
            except CacheError as error:
                yield str(error)
                whole = False
                continue
            indexed += found
            if wrong:
                yield f"{folder / manifest.index_file}: it does not know where {wrong} of the {len(shard)} records of {info.name} are."
    if whole and indexed != manifest.examples:
        astray = manifest.examples - indexed
        yield f"{folder / manifest.index_file}: {astray} of its {manifest.examples} places lead to no record of their example."


def _wrong_hash(path: Path, expected: str, progress: Progress) -> Iterator[str]:
    try:
        found = hash_file(path, progress).hash
    except CacheError as error:
        yield str(error)
        return
    if found != expected:
        yield f"{path} is damaged: its hash is {found}; expected {expected}, as the manifest says."


def _damaged_records(shard: Shard, info: ShardInfo) -> Iterator[str]:
    damaged = shard.damaged_rows()
    for row in damaged[:_NAMED]:
        try:
            shard.record(row, ())
        except CacheError as error:
            yield str(error)
    if len(damaged) > _NAMED:
        yield f"{shard.path} is damaged: so are {len(damaged) - _NAMED} more of its {info.examples} records."


def _look_up(index: Index, shard: Shard, number: int) -> tuple[int, int]:
    """How many of a shard's records the index leads to, and how many it does not know of.

    A record that it does not lead to is known where the same example has an earlier record: that one is looked at in its turn.
    """
    indexed = wrong = 0
    for start in range(0, len(shard), _AT_ONCE):
        keys = shard.keys[start : start + _AT_ONCE]
        places = index.find(keys)
        own = (number << 32) + start + np.arange(len(keys))
        indexed += int((places == own).sum())
        wrong += int(((places < 0) | (places > own)).sum())
    return indexed, wrong
