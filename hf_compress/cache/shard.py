"""A shard: some thousand records in columns, in one safetensors file.

    keys        (records, 2) uint64        which example each record is of
    checksums   (records,) uint64          xxh3_64 over all that a record holds, its key and its counts among it
    rows.GROUP  (records + 1,) uint32      where the rows of each record begin, for every column of that group
    COLUMN      (rows, *item)              the values, one record's rows after another's

Columns with one row a record (logits of a classifier) have the group "" and no offsets. Which column is of which group stands in the
file's metadata, as JSON under "groups". `shard_reader` reads what is written here.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import numpy as np
import numpy.typing as npt
import xxhash

from hf_compress.cache.strict_json import canonical
from hf_compress.cache.tensor_file import Array, storage, write_tensor_file
from hf_compress.errors import CacheError

KEYS, CHECKSUMS, ROWS = "keys", "checksums", "rows."
ONE_ROW = ""  # the group of columns that have one row a record
KIND = "hf_compress teacher cache, shard, version 1"
_NAME = re.compile(r"shard-\d{5,}\.safetensors")


@dataclass(frozen=True)
class Column:
    """One tensor of every shard.

    Attributes:
        name: such as "hidden_states.layers.9.values".
        group: columns of a group have the same number of rows in a record; "" is one row a record.
        dtype: see `tensor_file.Dtype`; bfloat16 is given and read as its bits, uint16.
        item: the shape of one row, () for a number.
    """

    name: str
    group: str
    dtype: str
    item: tuple[int, ...]

    def __post_init__(self) -> None:
        for what, name in (("column", self.name), ("group", self.group or "one")):
            if not name or "/" in name or ".." in name or not name.isprintable():
                raise CacheError(f'A {what} cannot be called {name!r}; expected printable text without "/" and "..".')
        if self.name in (KEYS, CHECKSUMS) or self.name.startswith((ROWS, "__")):
            raise CacheError(f"A column cannot be called {self.name!r}: that name has a meaning of its own in a shard.")
        if any(type(size) is not int or size < 0 for size in self.item) or len(self.item) > 7:
            raise CacheError(f"The column {self.name!r} has rows of the shape {self.item}; expected up to 7 whole numbers.")
        storage(self.dtype)

    @property
    def row_bytes(self) -> int:
        """Bytes that one row takes."""
        size: int = storage(self.dtype).itemsize
        for length in self.item:
            size *= length
        return size


@dataclass(frozen=True)
class ShardInfo:
    """What the manifest says of a shard.

    Attributes:
        name: its file's name.
        examples: its number of records.
        rows: by group, the rows of all its records.
        bytes: the file's size.
        hash: xxh3_128 over the whole file; `verify` looks at it.
        seal: xxh3_128 over `checksums`, then `keys`. It is looked at whenever the shard is opened, so that a shard of another cache is
            refused, and every record read is the one that was written.
    """

    name: str
    examples: int
    rows: dict[str, int]
    bytes: int
    hash: str
    seal: str


def shard_name(number: int) -> str:
    """The file's name of the shard `number`, from 0."""
    return f"shard-{number:05d}.safetensors"


def is_shard_name(name: str) -> bool:
    """Whether a file's name is a shard's."""
    return _NAME.fullmatch(name) is not None


def write_shard(
    path: Path, keys: npt.NDArray[np.uint64], columns: Sequence[Column], values: Mapping[str, Array], counts: Mapping[str, Array]
) -> ShardInfo:
    """Write a shard, complete or not at all; the values are not held in memory twice.

    Args:
        path: the file, named by `shard_name`.
        keys: (records, 2) uint64.
        columns: what the shard holds; all shards of a cache hold the same.
        values: by column, (rows of all records, *item), one record's rows after another's.
        counts: by group, (records,) whole numbers: the rows of each record. The group "" has none.

    Raises:
        CacheError: if the arrays do not fit each other, or the file cannot be written.
    """
    examples = len(keys)
    if keys.shape != (examples, 2) or keys.dtype != np.uint64 or not examples:
        raise CacheError(f"{path.name}: keys are {keys.dtype} {keys.shape}; expected uint64 (records, 2), one record at least.")
    check_columns(columns)
    offsets = {group: _offsets(group, count, examples, path.name) for group, count in sorted(counts.items())}
    _check_values(columns, values, offsets, examples, path.name)
    checksums = record_checksums(keys, columns, values, offsets)
    tensors: dict[str, tuple[str, Array]] = {KEYS: ("uint64", keys), CHECKSUMS: ("uint64", checksums)}
    tensors |= {f"{ROWS}{group}": (str(offset.dtype), offset) for group, offset in offsets.items()}
    tensors |= {column.name: (column.dtype, values[column.name]) for column in columns}
    file = write_tensor_file(path, tensors, shard_metadata(columns))
    rows = {group: int(offset[-1]) for group, offset in offsets.items()}
    return ShardInfo(path.name, examples, rows, file.bytes, file.hash, seal(checksums, keys))


def shard_metadata(columns: Iterable[Column]) -> dict[str, str]:
    """The text in a shard's header."""
    return {"kind": KIND, "groups": canonical({column.name: column.group for column in columns}).decode("ascii")}


def offsets_dtype(rows: int) -> str:
    """What the offsets of a group with so many rows are stored as."""
    return "uint32" if rows < 2**32 else "uint64"


def seal(checksums: Array, keys: Array) -> str:
    """xxh3_128 over the bytes of both: what makes every record of a shard sure by one number."""
    digest = xxhash.xxh3_128()
    for values in (checksums, keys):
        digest.update(np.ascontiguousarray(values).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def record_checksums(
    keys: npt.NDArray[np.uint64], columns: Iterable[Column], values: Mapping[str, Array], offsets: Mapping[str, Array]
) -> npt.NDArray[np.uint64]:
    """Every record's checksum: (records,) uint64.

    xxh3_64 over: the key's high and low word; the record's number of rows in each group, by the groups' sorted names, 8 bytes each; the
    record's rows of each column, by the columns' sorted names. All little endian.
    """
    ordered = sorted(columns, key=lambda column: column.name)
    bounds = {group: offset.tolist() for group, offset in sorted(offsets.items())}
    head = struct.Struct(f"<{2 + len(bounds)}Q")
    result = np.empty(len(keys), np.uint64)
    for record, key in enumerate(keys.tolist()):
        digest = xxhash.xxh3_64(head.pack(*key, *(bound[record + 1] - bound[record] for bound in bounds.values())))
        for column in ordered:
            begin, end = (record, record + 1) if column.group == ONE_ROW else bounds[column.group][record : record + 2]
            # No copy where the values are contiguous, as they should be.
            digest.update(np.ascontiguousarray(values[column.name][begin:end]).reshape(-1).view(np.uint8).data)
        result[record] = digest.intdigest()
    return result


def check_columns(columns: Sequence[Column]) -> None:
    """Refuse a name that stands twice, and no columns at all."""
    names = [column.name for column in columns]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice or not names:
        raise CacheError(f"A shard has columns, each with a name of its own; found {', '.join(twice) + ' twice' if twice else 'none'}.")


def _offsets(group: str, counts: Array, examples: int, where: str) -> Array:
    if counts.shape != (examples,) or counts.dtype.kind not in "iu" or (counts < 0).any():
        raise CacheError(f"{where}: the counts of {group!r} are {counts.dtype} {counts.shape}; expected {examples} whole numbers, from 0.")
    if group == ONE_ROW or not group.isprintable() or "/" in group or ".." in group:
        raise CacheError(f'{where}: a group cannot be called {group!r}; expected printable text without "/" and "..".')
    bounds = [0, *accumulate(counts.tolist())]  # Python's numbers do not overflow
    return np.array(bounds, storage(offsets_dtype(bounds[-1])))


def _check_values(columns: Sequence[Column], values: Mapping[str, Array], offsets: Mapping[str, Array], examples: int, where: str) -> None:
    if unknown := sorted(set(values) - {column.name for column in columns}):
        raise CacheError(f"{where}: there are values for {', '.join(unknown)}, which is no column.")
    for column in columns:
        if column.name not in values:
            raise CacheError(f"{where}: there are no values for the column {column.name!r}.")
        if column.group != ONE_ROW and column.group not in offsets:
            raise CacheError(f"{where}: there are no counts for the group {column.group!r} of the column {column.name!r}.")
        rows = examples if column.group == ONE_ROW else int(offsets[column.group][-1])
        found = values[column.name]
        if found.shape != (rows, *column.item) or found.dtype != storage(column.dtype):
            raise CacheError(
                f"{where}: the values of {column.name!r} are {found.dtype} {found.shape}; expected {storage(column.dtype)} "
                f"{(rows, *column.item)}: its group {column.group!r} has {rows} rows, as {column.dtype}."
            )
