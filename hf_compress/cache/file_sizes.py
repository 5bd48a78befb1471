"""How large the files of a cache will be, to the byte, before there are any: headers, offsets, index and shared dimensions among them.

columns (of an example of zeros, encoded)  x  rows (of every example's lengths)  +  headers of as many shards as the plan has
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from hf_compress.cache.codec_name import CodecName
from hf_compress.cache.estimate import TeacherSizes, blank_encoder
from hf_compress.cache.index import index_bytes
from hf_compress.cache.key import Integers
from hf_compress.cache.plan import grouped
from hf_compress.cache.price import OFFSET_BYTES, RECORD_BYTES
from hf_compress.cache.selection import Selection
from hf_compress.cache.shard import CHECKSUMS, KEYS, ONE_ROW, ROWS, Column, offsets_dtype, shard_metadata
from hf_compress.cache.spaces import spaces_bytes, spaces_file_bytes
from hf_compress.cache.stack_sizes import StackSizes
from hf_compress.cache.tensor_file import file_bytes
from hf_compress.signals import SignalSpec


@dataclass(frozen=True)
class Records:
    """The examples of a cache, as far as sizes hang on them, in the order in which they are stored.

    Attributes:
        tokens: (examples,) real tokens.
        choosable: (examples,) how many of these a selection of tokens may choose from.
        batches: the slices of them that are stored together; some make a shard.
        planned: whether shards are planned by the number of tokens alone, as a build does, or by what is stored, as a view does.
    """

    tokens: Integers
    choosable: Integers
    batches: Sequence[slice]
    planned: bool

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True)
class _Layout:
    """What a shard holds."""

    columns: tuple[Column, ...]
    groups: tuple[str, ...]
    shared: int  # bytes of the dimensions that all tokens share

    def row_bytes(self, group: str) -> int:
        return sum(column.row_bytes for column in self.columns if column.group == group)


class FileSizes:
    """Tells sizes of caches of the same examples and the same teacher.

    Args:
        records: the examples.
        teacher: its sizes.
    """

    def __init__(self, records: Records, teacher: TeacherSizes) -> None:
        self.records, self.teacher = records, teacher
        self._layouts: dict[object, _Layout] = {}

    def least(self, spec: SignalSpec, selection: Selection, codec: CodecName) -> int:
        """The bytes of all records, their places in the index, and shared dimensions: all but headers, so a little less than `total`."""
        layout = self._layout(spec, selection, codec)
        data = sum(layout.row_bytes(group) * int(self._rows(group, selection, self.records).sum()) for group in (ONE_ROW, *layout.groups))
        each = RECORD_BYTES + OFFSET_BYTES * len(layout.groups)
        return data + each * len(self.records) + layout.shared

    def total(self, spec: SignalSpec, selection: Selection, codec: CodecName) -> int:
        """The bytes of all files but the manifest, as the manifest will count them."""
        layout = self._layout(spec, selection, codec)
        rows = {group: self._rows(group, selection, self.records) for group in layout.groups}
        size = index_bytes(len(self.records))
        if layout.shared:
            size += spaces_file_bytes(dict(blank_encoder(spec, selection, codec, self.teacher)[0].spaces))
        for shard in grouped(self._batches(layout, selection)):
            batches = self.records.batches[shard]
            examples = slice(batches[0].start, batches[-1].stop)
            size += _shard_bytes(
                layout, examples.stop - examples.start, {group: int(count[examples].sum()) for group, count in rows.items()}
            )
        return size

    def _batches(self, layout: _Layout, selection: Selection) -> list[tuple[float, int]]:
        """Bytes and examples of each batch, as whoever puts shards together counts them."""
        records = self.records
        if records.planned:
            records = Records(records.tokens, records.tokens, records.batches, planned=True)
        each = np.full(len(records), RECORD_BYTES + OFFSET_BYTES * len(layout.groups) + layout.row_bytes(ONE_ROW), dtype=np.int64)
        for group in layout.groups:
            each += layout.row_bytes(group) * self._rows(group, selection, records)
        return [(float(each[batch].sum()), batch.stop - batch.start) for batch in records.batches]

    def _layout(self, spec: SignalSpec, selection: Selection, codec: CodecName) -> _Layout:
        """How many tokens are selected changes how many rows there are, and nothing else."""
        known = (spec, selection.length, selection.width, selection.width_scheme, codec)
        if known not in self._layouts:
            encoder, blank = blank_encoder(spec, selection, codec, self.teacher)
            real = torch.ones(1, 2, dtype=torch.bool)
            signals, importance = blank(2)
            rows = encoder.encode(signals, real, torch.zeros_like(real), importance)
            self._layouts[known] = _Layout(tuple(rows.columns.values()), tuple(sorted(rows.counts)), spaces_bytes(encoder.spaces))
        return self._layouts[known]

    def _rows(self, group: str, selection: Selection, records: Records) -> Integers:
        """(examples,) rows of a group."""
        kind, _, stack = group.partition(".")
        hidden, heads, _ = self.teacher.stacks.get(stack, StackSizes(0, 0))
        chosen = records.tokens if selection.tokens is None else np.minimum(records.choosable, selection.tokens)
        if kind == "selected":
            return chosen
        if kind == "kept":
            found: npt.NDArray[np.int64] = np.array([selection.num_entries(count, hidden) for count in chosen.tolist()], dtype=np.int64)
            return found
        if kind == "queries":
            return heads * records.tokens
        if kind == "scores":
            return heads * records.tokens * records.tokens
        return np.ones_like(records.tokens) if group == ONE_ROW else records.tokens


def _shard_bytes(layout: _Layout, examples: int, rows: dict[str, int]) -> int:
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {KEYS: ("uint64", (examples, 2)), CHECKSUMS: ("uint64", (examples,))}
    tensors |= {f"{ROWS}{group}": (offsets_dtype(count), (examples + 1,)) for group, count in rows.items()}
    sizes = {**rows, ONE_ROW: examples}
    tensors |= {column.name: (column.dtype, (sizes[column.group], *column.item)) for column in layout.columns}
    return file_bytes(tensors, shard_metadata(layout.columns))
