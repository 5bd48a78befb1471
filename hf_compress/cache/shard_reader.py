"""Records out of a shard, as views of the file mapped into memory.

A batch reads some dozen records, so what a record costs beside its checksum is kept to slices: all that the header says is worked out once,
when the shard is opened. Where a batch's tensors are given, a record's rows are copied there piece by piece, and the checksum is taken over
the copies: they lie in the processor's cache at that moment, so the file's bytes pass through memory once, and what was checked is what is
used.
"""

from __future__ import annotations

import struct
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import xxhash

from hf_compress.cache.files import hash_file
from hf_compress.cache.shard import (
    CHECKSUMS,
    KEYS,
    ONE_ROW,
    ROWS,
    Column,
    ShardInfo,
    check_columns,
    offsets_dtype,
    seal,
    shard_metadata,
)
from hf_compress.cache.tensor_file import Array, TensorFile
from hf_compress.errors import CacheError

Record = dict[str, Array]
_Key = tuple[int, int]
_NOWHERE: Mapping[str, Array] = {}


class Shard:
    """An open shard.

    Attributes:
        path: the file.
        keys: (records, 2) uint64, a view of the file.
        rows: by group, the rows of all records.
    """

    def __init__(self, file: TensorFile, columns: Sequence[Column]) -> None:
        self.path = file.path
        self.keys: npt.NDArray[np.uint64] = file.array(KEYS)
        self._examples = len(self.keys)
        self._checksums = file.array(CHECKSUMS)
        self._groups = tuple(sorted(name.removeprefix(ROWS) for name in file.tensors if name.startswith(ROWS)))
        self._offsets = tuple(file.array(f"{ROWS}{group}") for group in self._groups)
        for group, offsets in zip(self._groups, self._offsets, strict=True):
            if offsets[0] != 0:
                raise file.damaged(f"{ROWS}{group}[0]", offsets[0], 0)
        self.rows = {group: int(offsets[-1]) for group, offsets in zip(self._groups, self._offsets, strict=True)}
        self._totals = tuple(self.rows.values())
        self._pack_counts = struct.Struct(f"<{len(self._groups)}Q").pack
        self._key_bytes = file.view(KEYS)
        # A record's spans are those of the groups in order, and after them the one of the group "".
        number = {group: index for index, group in enumerate((*self._groups, ONE_ROW))}
        ordered = sorted(columns, key=lambda column: column.name)
        self._hashed = tuple(
            (column.name, file.view(column.name), file.array(column.name), column.row_bytes, number[column.group]) for column in ordered
        )
        self._columns = {column.name: (column.name, file.array(column.name), number[column.group]) for column in columns}
        self._all_columns = tuple(self._columns.values())

    @classmethod
    def open(cls, path: Path, expected: ShardInfo | None, columns: Sequence[Column]) -> Shard:
        """Open a shard, and hold its header against its size, the columns, and the manifest.

        Args:
            path: the file.
            expected: what the manifest says of it; None while a build has no manifest yet. Its `hash` is left to `verify`.
            columns: what it holds.

        Raises:
            CacheError: if it is missing, no regular file, damaged, or not the shard that the manifest means.
        """
        check_columns(columns)
        file = TensorFile(path)
        if expected is not None and file.size != expected.bytes:
            raise file.damaged("size", file.size, f"{expected.bytes}, as the manifest says")
        if KEYS not in file.tensors or len(file.tensors[KEYS].shape) != 2:
            raise file.damaged("the tensor 'keys'", file.tensors.get(KEYS), "(records, 2) uint64")
        examples = file.tensors[KEYS].shape[0] if expected is None else expected.examples
        rows = _rows_of(file) if expected is None else expected.rows
        if examples < 1:
            raise file.damaged("the number of records", examples, "at least 1")
        if missing := {column.group for column in columns} - {*rows, ONE_ROW}:
            raise file.damaged("the groups", sorted(rows), f"{', '.join(sorted(missing))} among them")
        tensors: dict[str, tuple[str, tuple[int, ...]]] = {KEYS: ("uint64", (examples, 2)), CHECKSUMS: ("uint64", (examples,))}
        tensors |= {f"{ROWS}{group}": (offsets_dtype(total), (examples + 1,)) for group, total in rows.items()}
        sizes = {**rows, ONE_ROW: examples}
        tensors |= {column.name: (column.dtype, (sizes[column.group], *column.item)) for column in columns}
        file.expect(tensors, shard_metadata(columns))
        shard = cls(file, columns)
        if shard.rows != rows:
            raise file.damaged("the rows that the offsets end with", shard.rows, rows)
        if expected is not None and (found := seal(shard._checksums, shard.keys)) != expected.seal:
            raise file.damaged("the seal over checksums and keys", found, f"{expected.seal}, as the manifest says")
        return shard

    def __len__(self) -> int:
        return self._examples

    def record(self, row: int, names: Collection[str] | None = None, *, key: _Key | None = None, verify: bool = True) -> Record:
        """Read one record.

        Args:
            row: which, from 0.
            names: the columns wanted; None is all.
            key: the example whose record it should be, high word first: give it, so that a damaged index is found.
            verify: check the checksum, over the whole record whatever the names.

        Returns:
            (rows, *item) by column, read-only views of the file; one row for the group "".

        Raises:
            CacheError: if the record is damaged, is of another example, or there is no such row or column.
        """
        if not 0 <= row < self._examples:
            raise CacheError(f"{self.path} has {self._examples} records; there is no record {row}. Is the index another cache's?")
        if key is not None:
            self._expect_key(row, key)
        spans = [(offsets.item(row), offsets.item(row + 1)) for offsets in self._offsets]
        return self._read(row, spans, self._checksums.item(row), self._wanted(names), verify)

    def records(
        self,
        rows: Sequence[int] | npt.NDArray[np.int64],
        names: Collection[str] | None = None,
        *,
        keys: npt.NDArray[np.uint64] | None = None,
        into: Sequence[Mapping[str, Array]] | None = None,
        verify: bool = True,
    ) -> list[Record]:
        """Read some records, faster than one by one; see `record`.

        Args:
            rows, names, verify: as of `record`.
            keys: (rows, 2) uint64, the examples whose records they should be.
            into: for each record, by column, where its rows are copied to: (rows, *item), contiguous, of the column's type. Such a column
                of the record is the copy, not a view of the file. What is copied of a record that is refused means nothing.
        """
        wanted = self._wanted(names)
        places = np.asarray(rows, np.int64)
        if not len(places):
            return []
        if places.min() < 0 or places.max() >= self._examples:
            raise CacheError(f"{self.path} has {self._examples} records; there is no record {places.max()}. Is the index another cache's?")
        if keys is not None and (wrong := (self.keys[places] != keys).any(1)).any():
            first = int(wrong.argmax())
            high, low = keys[first].tolist()
            self._expect_key(int(places[first]), (high, low))
        bounds = [
            list(zip(offsets[places].tolist(), offsets[places + 1].tolist(), strict=True)) for offsets in self._offsets
        ]  # by group, then by record
        spans = zip(*bounds, strict=True) if bounds else ((),) * len(places)
        checksums = self._checksums[places].tolist()
        read = self._read
        targets = (_NOWHERE,) * len(places) if into is None else into
        return [
            read(row, list(span), checksum, wanted, verify, target)
            for row, span, checksum, target in zip(places.tolist(), spans, checksums, targets, strict=True)
        ]

    def counts(self, row: int) -> dict[str, int]:
        """By group, the rows of one record; not checked, unlike what `record` reads."""
        if not 0 <= row < self._examples:
            raise CacheError(f"{self.path} has {self._examples} records; there is no record {row}.")
        return {group: offsets.item(row + 1) - offsets.item(row) for group, offsets in zip(self._groups, self._offsets, strict=True)}

    def damaged_rows(self) -> list[int]:
        """The records that cannot be read, after reading all."""
        found = []
        for row in range(self._examples):
            try:
                self.record(row, ())
            except CacheError:
                found.append(row)
        return found

    def _read(
        self,
        row: int,
        spans: list[tuple[int, int]],
        checksum: int,
        wanted: Sequence[tuple[str, Array, int]],
        verify: bool,
        into: Mapping[str, Array] = _NOWHERE,
    ) -> Record:
        for (begin, end), total in zip(spans, self._totals, strict=True):
            if not begin <= end <= total:
                raise self._damaged(row, f"its rows are {begin} to {end} of {total}")
        counts = self._pack_counts(*[end - begin for begin, end in spans])
        spans.append((row, row + 1))
        digest = xxhash.xxh3_64(self._key_bytes[16 * row : 16 * row + 16])
        digest.update(counts)
        for name, view, array, width, group in self._hashed:
            begin, end = spans[group]
            copy = into.get(name)
            if copy is not None:
                if len(copy) != end - begin:
                    raise self._damaged(row, f"it has {end - begin} rows of {name!r}, and its example has {len(copy)}")
                copy[...] = array[begin:end]
            if verify:
                digest.update(view[begin * width : end * width] if copy is None else copy.data)
        if verify and digest.intdigest() != checksum:
            raise self._damaged(row, f"its checksum is {digest.intdigest():016x}; expected {checksum:016x}")
        record = {}
        for name, array, group in wanted:
            begin, end = spans[group]
            record[name] = into[name] if name in into else array[begin:end]
        return record

    def _wanted(self, names: Collection[str] | None) -> Sequence[tuple[str, Array, int]]:
        if names is None:
            return self._all_columns
        try:
            return [self._columns[name] for name in names]
        except KeyError as error:
            raise CacheError(f"{self.path} has no column {error}; it has {', '.join(self._columns)}.") from error

    def _expect_key(self, row: int, key: _Key) -> None:
        high, low = self.keys[row].tolist()
        if (high, low) != key:
            raise CacheError(
                f"{self.path}: record {row} is of the example {high:016x}{low:016x}; expected {key[0]:016x}{key[1]:016x}. "
                "Index and shard do not belong together, or one is damaged: `hf-compress cache verify` says which."
            )

    def _damaged(self, row: int, how: str) -> CacheError:
        high, low = self.keys[row].tolist()
        return CacheError(
            f"{self.path} is damaged: record {row}, of the example {high:016x}{low:016x}: {how}. Build the cache again, or copy it again."
        )


def read_shard_info(path: Path, columns: Sequence[Column]) -> ShardInfo:
    """Read a shard whole that no manifest tells of yet, as a build does that goes on.

    Raises:
        CacheError: if it is not a shard of these columns with all its records as they were written.
    """
    shard = Shard.open(path, None, columns)
    if damaged := shard.damaged_rows():
        shard.record(damaged[0], ())  # says what is wrong
    file = hash_file(path)
    return ShardInfo(path.name, len(shard), shard.rows, file.bytes, file.hash, seal(shard._checksums, shard.keys))


def _rows_of(file: TensorFile) -> dict[str, int]:
    """By group, the number of rows that its offsets end with."""
    rows = {}
    for name, tensor in file.tensors.items():
        if name.startswith(ROWS) and len(tensor.shape) == 1 and tensor.shape[0] and tensor.dtype in ("uint32", "uint64"):
            rows[name.removeprefix(ROWS)] = int(file.array(name)[-1])
    return rows
