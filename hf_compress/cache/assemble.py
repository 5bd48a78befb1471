"""Records of a batch's examples -> the signals that a loss compares, padded as the batch is."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hf_compress.cache.codec import decode
from hf_compress.cache.codec_name import CodecName
from hf_compress.cache.fields import field_of
from hf_compress.cache.key import Canonical
from hf_compress.cache.predictions import HIGH_IDS, IDS, read_top_logits, rest_column
from hf_compress.cache.select import keeps_whole_states, nobody, reduce_width
from hf_compress.cache.selection import Selection
from hf_compress.cache.shard import Column
from hf_compress.cache.tokens import choose_tokens
from hf_compress.cache.widths import unpack_mask
from hf_compress.selected_state import AllDimensions, KeptEntries, SelectedState, SharedDimensions, Space, Subspace, at_positions
from hf_compress.signals import AttentionScores, AttentionVectors, HiddenState, Signals, SignalSpec
from hf_compress.top_logits import TopLogits
from hf_compress.worker_memory import new_bytes

Record = Mapping[str, npt.NDArray[Any]]
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "int8": torch.int8}
_ALIGNED = 64


@dataclass(frozen=True)
class BatchRoom:
    """Where a batch's records are copied to while they are read, if they are needed as they are stored.

    Attributes:
        columns: by column, (batch, width, numbers); zero at padding, anything else until the records are there.
        rows: for each example, by column, its part of that: (tokens, numbers).
    """

    columns: dict[str, Tensor] = field(default_factory=dict)
    rows: list[dict[str, npt.NDArray[Any]]] = field(default_factory=list)


class Assembler:
    """Puts records together.

    Args:
        columns: of the cache, by name.
        stored: the selection that the cache was built with.
        wanted: the selection to read, the stored one or a smaller one.
        codec: of the cache.
        stored_spaces, wanted_spaces: by field, the dimensions that all tokens share.
        hidden_sizes: the teacher's, by stack.
        vocabulary: its number of words.
    """

    def __init__(
        self,
        columns: Mapping[str, Column],
        stored: Selection,
        wanted: Selection,
        codec: CodecName,
        stored_spaces: Mapping[str, Space],
        wanted_spaces: Mapping[str, Space],
        hidden_sizes: Mapping[str, int],
        vocabulary: int = 0,
    ) -> None:
        self.columns, self.stored, self.wanted, self.codec = columns, stored, wanted, codec
        self.stored_spaces, self.wanted_spaces, self.hidden_sizes = stored_spaces, wanted_spaces, hidden_sizes
        self.vocabulary = vocabulary
        self.label_order: Tensor | None = None  # as in `LiveTeacher`
        self.top_k: int | None = None  # of a language model's logits, where fewer are wanted than are stored

    def room(self, batch: Canonical, spec: SignalSpec) -> BatchRoom:
        """Room for the values of whole states, which are most of what such a batch reads."""
        spans = list(zip(batch.starts.tolist(), batch.lengths.tolist(), strict=True))
        room = BatchRoom(rows=[{} for _ in spans])
        names = sorted({f"{field_of(key)}.values" for key in spec.hidden_states}) if self.stored.length == "all" else []
        # Under magnitude a column has no rows of a fixed width: its numbers are spread over them by the mask.
        shapes = {name: (len(spans), batch.width, *self.columns[name].item) for name in names if self.columns[name].item}
        for name, values in _empty({name: (shape, _DTYPES[self.columns[name].dtype]) for name, shape in shapes.items()}).items():
            room.columns[name] = values
            for targets, whole, (start, count) in zip(room.rows, _plain(values), spans, strict=True):
                if count < batch.width:
                    whole[:start] = whole[start + count :] = 0
                    whole = whole[start : start + count]
                targets[name] = whole
        return room

    def assemble(
        self, records: Sequence[Record], batch: Canonical, spec: SignalSpec, room: BatchRoom | None = None, *, decoded: bool = True
    ) -> Signals:
        """Make the signals of one batch.

        Args:
            records: one an example, in the batch's order.
            batch: where each example's tokens stand.
            spec: which signals.
            room: of this batch, if the records were copied there.
            decoded: False leaves whole hidden states in int8, beside their scales: a quarter of the bytes to bring to a device.
        """
        signals = Signals()
        copied = {} if room is None else room.columns
        if spec.logits and IDS in self.columns:
            signals.top_logits = self._top_logits(records, batch, spec.temperatures)
        elif spec.logits:
            for name in ("logits", "start_logits", "end_logits"):
                if f"{name}.values" in self.columns:
                    signals.logits[name] = self._logits(name, records, batch)
        for key in sorted(spec.hidden_states):
            coded = not decoded and f"{field_of(key)}.scales" in self.columns
            if coded and self.stored.length == "all" and keeps_whole_states(self.wanted):
                signals.hidden_states[key], signals.scales[key] = self._coded_states(field_of(key), records, batch, copied)
                continue
            state = self._state(key, records, batch, copied)
            if isinstance(state, Tensor):
                signals.hidden_states[key] = state
            else:
                signals.selected_states[key] = state
        for score_key in sorted(spec.attention_scores):
            signals.attention_scores[score_key] = self._scores(score_key, records, batch)
        for vector_key in sorted(spec.attention_vectors):
            signals.attention_vectors[vector_key] = self._vectors(vector_key, records, batch)
        return signals

    def _logits(self, name: str, records: Sequence[Record], batch: Canonical) -> Tensor:
        column = f"{name}.values"
        if self.columns[column].group:
            logits = self._padded(column, records, batch)
        else:
            logits = torch.from_numpy(np.concatenate([record[column] for record in records]))
            if batch.choices is not None:
                logits = logits.view(-1, batch.choices)  # one number a choice -> (examples, choices)
        return logits if self.label_order is None or name != "logits" else logits.index_select(-1, self.label_order)

    def _top_logits(self, records: Sequence[Record], batch: Canonical, temperatures: Collection[float]) -> TopLogits:
        """Of a language model; fewer of them where fewer are wanted."""
        wanted = {IDS, HIGH_IDS, *map(rest_column, temperatures)}
        parts = {name: self._padded(name, records, batch) for name in self.columns if name in wanted}
        top = read_top_logits(parts, self._dense("logits", records, batch, None).float(), temperatures, self.vocabulary)
        return top if self.top_k is None else top.narrowed(self.top_k)

    def _state(self, key: HiddenState, records: Sequence[Record], batch: Canonical, copied: Mapping[str, Tensor]) -> Tensor | SelectedState:
        name = field_of(key)
        if self.stored.length != "all":
            values, positions, chosen = self._stored_tokens(name, records, batch)
            mask = self._mask(name, records, [0] * len(records), chosen.shape[1])
            return self._narrowed(name, values, positions, chosen, mask)
        values = self._dense(name, records, batch, copied.get(f"{name}.values"))
        if keeps_whole_states(self.wanted):
            return values
        real = _real(batch)
        positions, chosen = torch.arange(batch.width).expand(len(batch), -1), real
        mask = self._mask(name, records, batch.starts.tolist(), batch.width)
        if self.wanted.length != "all":
            special = self._padded(f"special.{key.stack}", records, batch).bool()
            importance = self._padded(f"{name}.importance", records, batch) if f"{name}.importance" in self.columns else None
            positions, chosen = choose_tokens(self.wanted.length, self.wanted.tokens, real, special, importance, nobody(real))
            values = at_positions(values, positions)
            mask = None if mask is None else at_positions(mask, positions)
        return self._narrowed(name, values, positions, chosen, mask)

    def _stored_tokens(self, name: str, records: Sequence[Record], batch: Canonical) -> tuple[Tensor, Tensor, Tensor]:
        """Values, positions and which count, of tokens that were selected when the cache was built; a smaller selection takes the first."""
        counts = [len(record[f"{name}.positions"]) for record in records]
        width = max(1, min(max(counts), self.wanted.tokens or max(counts)))
        positions = torch.zeros(len(records), width, dtype=torch.int64)
        chosen = torch.zeros(len(records), width, dtype=torch.bool)
        for row, (record, count) in enumerate(zip(records, counts, strict=True)):
            taken = min(count, width)
            positions[row, :taken] = torch.from_numpy(record[f"{name}.positions"][:taken].astype(np.int64) + batch.starts[row])
            chosen[row, :taken] = True
        return self._rows(name, records, [(0, count) for count in counts], width), positions, chosen

    def _narrowed(self, name: str, values: Tensor, positions: Tensor, chosen: Tensor, mask: Tensor | None) -> SelectedState:
        """The dimensions that are wanted, of those that are stored."""
        space = self.wanted_spaces.get(name)
        if mask is not None:
            space = KeptEntries(mask, self.stored.width, self.wanted.mask == "zero_target")
        whole = SelectedState(values, positions, chosen, AllDimensions())
        if (self.wanted.width_scheme, self.wanted.width) == (self.stored.width_scheme, self.stored.width):
            return replace(whole, space=space or AllDimensions())
        if self.stored.width_scheme == "all" or self.wanted.width_scheme == "magnitude":
            return reduce_width(replace(whole, values=values.float()), self.wanted, space)
        stored = self.stored_spaces[name]
        if isinstance(stored, SharedDimensions) and isinstance(space, SharedDimensions):
            return replace(whole, values=values.index_select(-1, torch.searchsorted(stored.indices, space.indices)), space=space)
        assert isinstance(space, Subspace)  # its directions are the first of those stored
        return replace(whole, values=values[..., : space.components.shape[1]], space=space)

    def _coded_states(self, name: str, records: Sequence[Record], batch: Canonical, copied: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """(batch, tokens, hidden) int8 and (batch, tokens) float32: whole states as they are stored."""
        spans = list(zip(batch.starts.tolist(), batch.lengths.tolist(), strict=True))
        values = copied.get(f"{name}.values")
        values = self._stored_rows(name, records, spans, batch.width) if values is None else values
        return values, self._scales(name, records, spans, batch.width)

    def _dense(self, name: str, records: Sequence[Record], batch: Canonical, copied: Tensor | None) -> Tensor:
        spans = list(zip(batch.starts.tolist(), batch.lengths.tolist(), strict=True))
        return self._rows(name, records, spans, batch.width, copied)

    def _rows(
        self, name: str, records: Sequence[Record], spans: Sequence[tuple[int, int]], width: int, copied: Tensor | None = None
    ) -> Tensor:
        """(batch, width, *row), each record's rows from where its span begins; decoded. `copied` has them as they are stored."""
        values = self._stored_rows(name, records, spans, width) if copied is None else copied
        if f"{name}.scales" not in self.columns:
            return values
        scales = self._scales(name, records, spans, width).flatten()
        return decode({"values": values.flatten(0, 1).flatten(1), "scales": scales}, self.codec).view(values.shape)

    def _scales(self, name: str, records: Sequence[Record], spans: Sequence[tuple[int, int]], width: int) -> Tensor:
        """(batch, width), zero at padding."""
        scales = torch.zeros(len(records), width)
        for row, (record, (start, count)) in enumerate(zip(records, spans, strict=True)):
            stop = min(start + count, width)
            scales[row, start:stop] = torch.from_numpy(record[f"{name}.scales"][: stop - start].copy())
        return scales

    def _stored_rows(self, name: str, records: Sequence[Record], spans: Sequence[tuple[int, int]], width: int) -> Tensor:
        column = self.columns[f"{name}.values"]
        item = column.item or (self._hidden_size(name),)
        values = torch.empty(len(records), width, *item, dtype=_DTYPES[column.dtype])  # large: only padding is written twice
        plain = _plain(values)
        for row, (record, (start, count)) in enumerate(zip(records, spans, strict=True)):
            stop = min(start + count, width)
            plain[row, :start] = plain[row, stop:] = 0
            if column.item:
                plain[row, start:stop] = record[column.name][: stop - start]
            else:
                plain[row, start:stop] = 0
                mask = np.unpackbits(record[f"{name}.mask"], axis=-1, count=item[0], bitorder="little").astype(bool)[: stop - start]
                plain[row, start:stop][mask] = record[column.name][: int(mask.sum())]
        return values

    def _mask(self, name: str, records: Sequence[Record], starts: Sequence[int], width: int) -> Tensor | None:
        """(batch, width, hidden) bool: what magnitude kept of each token; None under the other schemes."""
        if f"{name}.mask" not in self.columns:
            return None
        item = self.columns[f"{name}.mask"].item[0]
        packed = torch.zeros(len(records), width, item, dtype=torch.uint8)
        for row, (record, start) in enumerate(zip(records, starts, strict=True)):
            taken = record[f"{name}.mask"][: width - start]
            packed[row, start : start + len(taken)] = torch.from_numpy(taken.copy())
        hidden = self._hidden_size(name)
        return unpack_mask(packed.flatten(0, 1), hidden).view(len(records), width, hidden)

    def _hidden_size(self, name: str) -> int:
        return self.hidden_sizes[name.split(".")[1]]

    def _padded(self, column_name: str, records: Sequence[Record], batch: Canonical) -> Tensor:
        """(batch, tokens, *item), zero at padding."""
        column = self.columns[column_name]
        first = torch.from_numpy(records[0][column_name][:0].copy())
        values = torch.zeros(len(batch), batch.width, *column.item, dtype=first.dtype)
        plain = _plain(values)
        for row, record in enumerate(records):
            start = batch.starts[row]
            plain[row, start : start + batch.lengths[row]] = record[column_name]
        return values

    def _vectors(self, key: AttentionVectors, records: Sequence[Record], batch: Canonical) -> Tensor:
        """(batch, heads, tokens, head width), as attention gets them."""
        return self._dense(field_of(key), records, batch, None).transpose(1, 2)

    def _scores(self, key: AttentionScores, records: Sequence[Record], batch: Canonical) -> Tensor:
        name = field_of(key)
        column = self.columns[f"{name}.values"]
        first, length = records[0][column.name], int(batch.lengths[0])
        heads = len(first) // max(1, length * length)
        dtype = torch.float32 if column.dtype == "int8" else _DTYPES[column.dtype]
        scores = torch.zeros(len(records), heads, batch.width, batch.width, dtype=dtype)
        for row, record in enumerate(records):
            start, length = int(batch.starts[row]), int(batch.lengths[row])
            parts = {"values": _tensor(record[column.name], column.dtype).view(heads * length, length)}
            if f"{name}.scales" in self.columns:
                parts["scales"] = torch.from_numpy(record[f"{name}.scales"].copy())
            square = decode(parts, self.codec).view(heads, length, length)
            scores[row, :, start : start + length, start : start + length] = square
        return scores


def _real(batch: Canonical) -> Tensor:
    at = torch.arange(batch.width)
    starts, lengths = torch.from_numpy(batch.starts), torch.from_numpy(batch.lengths)
    return (at >= starts[:, None]) & (at < (starts + lengths)[:, None])


def _empty(shapes: Mapping[str, tuple[tuple[int, ...], torch.dtype]]) -> dict[str, Tensor]:
    """Tensors to be written, all in one piece of memory: new memory is dear, and less so in large pieces."""
    if not shapes:
        return {}
    places, size = {}, 0
    for name, (shape, dtype) in shapes.items():
        places[name] = slice(size, size + math.prod(shape) * dtype.itemsize)
        size = -(-places[name].stop // _ALIGNED) * _ALIGNED
    memory = new_bytes(size)
    return {name: memory[places[name]].view(dtype).view(shape) for name, (shape, dtype) in shapes.items()}


def _plain(tensor: Tensor) -> npt.NDArray[Any]:
    """The tensor's own memory as numpy sees it; bfloat16 as its bits."""
    array: npt.NDArray[Any] = tensor.view(torch.uint16).numpy() if tensor.dtype == torch.bfloat16 else tensor.numpy()
    return array


def _tensor(array: npt.NDArray[Any], dtype: str) -> Tensor:
    tensor = torch.from_numpy(array.copy())
    return tensor.view(torch.bfloat16) if dtype == "bfloat16" else tensor
