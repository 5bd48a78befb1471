"""Appending to a finished cache: killed at any moment, it opens as it was before, or as it is after.

    shard-00007  ->  index-00008  ->  manifest.json, renamed over the old one: from here on it is appended  ->  the old index goes

No file that a manifest speaks of is ever written again, so whoever has the cache open reads on. What a killed append left is named by no
manifest; the next append writes over it, or takes it away.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from hf_compress.cache.encode import Rows
from hf_compress.cache.files import remove_leftovers
from hf_compress.cache.index import Index, Keys, index_bytes, longer_index_name, write_longer_index
from hf_compress.cache.lock import builder_lock, remove_lock
from hf_compress.cache.manifest import INDEX_FILE, Manifest
from hf_compress.cache.price import OFFSET_BYTES, RECORD_BYTES, SHARD_OVERHEAD, free_bytes, readable
from hf_compress.cache.shard import ONE_ROW, is_shard_name, shard_name, write_shard
from hf_compress.cache.shard_reader import Record
from hf_compress.errors import CacheError

# An example's key, high word first.
Key = tuple[int, int]

WAIT = 120.0  # seconds for somebody else who appends; that takes seconds


@dataclass(frozen=True)
class NewRecord:
    """What is to be stored of one example.

    Attributes:
        columns: (rows, *item) by column, as a `Record` that was read.
        tokens: the example's length.
    """

    columns: Record
    tokens: int

    @property
    def bytes(self) -> int:
        """What it takes on disk, or a few bytes more."""
        return RECORD_BYTES + OFFSET_BYTES * len(self.columns) + sum(values.nbytes for values in self.columns.values())


def records_of(rows: Rows) -> list[Record]:
    """What a teacher said of a batch, example by example; views of `rows`."""
    offsets = {group: np.concatenate([[0], np.cumsum(counts)]) for group, counts in rows.counts.items()}
    groups = {name: column.group for name, column in rows.columns.items()}
    examples = next((len(counts) for counts in rows.counts.values()), None)
    if examples is None:
        examples = len(next(iter(rows.values.values())))
    records = []
    for row in range(examples):
        spans = {group: slice(offset[row], offset[row + 1]) for group, offset in offsets.items()} | {ONE_ROW: slice(row, row + 1)}
        records.append({name: values[spans[groups[name]]] for name, values in rows.values.items()})
    return records


def append_records(folder: Path, known: Manifest, records: Mapping[Key, NewRecord]) -> tuple[Manifest, int]:
    """Append one shard; examples that somebody else has appended meanwhile are left out.

    Args:
        folder: the cache.
        known: its manifest as it was when the records were made; others may have appended since.
        records: by the example's key; one at least.

    Returns:
        The manifest as it is now; how many of the records were appended.

    Raises:
        CacheError: if there is too little disk, somebody else holds the folder, another cache lies there now, or its index is damaged.
    """
    with builder_lock(folder, WAIT):
        manifest = Manifest.load(folder)
        if not manifest.continues(known):
            raise CacheError(f"In {folder} lies another teacher on disk than when this run began. What was asked since is not appended.")
        remove_leftovers(folder)
        _remove_strays(folder, manifest)
        # The hash is looked at, so that damage is not copied to where nobody can tell it any more.
        index = Index.open(folder / manifest.index_file, manifest.examples, manifest.index)
        new = sorted(_without(index, records).items(), key=lambda item: (-item[1].tokens, item[0]))  # by falling length, as a build has it
        if new:
            manifest = _append(folder, manifest, index, dict(new))
        remove_lock(folder)
    return manifest, len(new)


def _without(index: Index, records: Mapping[Key, NewRecord]) -> dict[Key, NewRecord]:
    absent = index.find(np.array(list(records), np.uint64)) < 0
    return {key: record for (key, record), is_new in zip(records.items(), absent.tolist(), strict=True) if is_new}


def _append(folder: Path, manifest: Manifest, index: Index, new: Mapping[Key, NewRecord]) -> Manifest:
    _refuse_too_little_disk(folder, manifest, new)
    number = len(manifest.shards)
    keys: Keys = np.array(list(new), np.uint64)
    records = [record.columns for record in new.values()]
    values = {column.name: np.concatenate([record[column.name] for record in records]) for column in manifest.columns}
    # Columns of a group have equally many rows of a record: the last of them tells.
    counted = {column.group: column.name for column in manifest.columns if column.group != ONE_ROW}
    counts = {group: np.array([len(record[name]) for record in records], dtype=np.int64) for group, name in counted.items()}
    shard = write_shard(folder / shard_name(number), keys, manifest.columns, values, counts)
    longer = write_longer_index(folder / longer_index_name(number + 1), index, keys, number)
    appended = replace(
        manifest,
        index=longer.hash,
        shards=(*manifest.shards, shard),
        examples=longer.examples,
        tokens=manifest.tokens + sum(record.tokens for record in new.values()),
        bytes=manifest.bytes + shard.bytes + longer.bytes - (folder / manifest.index_file).stat().st_size,
        appended=manifest.appended + 1,
    )
    appended.save(folder)
    _remove_strays(folder, appended)
    return appended


def _remove_strays(folder: Path, manifest: Manifest) -> None:
    """Take away what no manifest names: the index before this one, and what a killed append left."""
    named = {manifest.index_file, *(shard.name for shard in manifest.shards)}
    for path in folder.iterdir():
        is_index = path.name == INDEX_FILE or path.match("index-*.safetensors")
        if (is_index or is_shard_name(path.name)) and path.name not in named:
            path.unlink(missing_ok=True)


def _refuse_too_little_disk(folder: Path, manifest: Manifest, new: Mapping[Key, NewRecord]) -> None:
    needed = sum(record.bytes for record in new.values()) + index_bytes(manifest.examples + len(new)) + SHARD_OVERHEAD
    if needed > (free := free_bytes(folder)):
        raise CacheError(f"{len(new)} examples more would take {readable(needed)}, but only {readable(free)} are free in {folder}.")
