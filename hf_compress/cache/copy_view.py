"""A smaller cache out of a larger one, without the teacher.

    record --read as the smaller selection--> selected states --encode--> record of the smaller cache
           ----- logits (or the largest), attention scores, vectors as they are ------>

A cache that holds everything in float32 gives the records that a build from the teacher would have given. What was stored coarser stays
as coarse: no view is better than what it is read from. The new cache appears whole or not at all.
"""

from __future__ import annotations

import datetime
import math
import os
import secrets
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from hf_compress.cache.build import CPU_BATCH_TOKENS
from hf_compress.cache.codec_name import CodecName
from hf_compress.cache.encode import Encoder, Rows
from hf_compress.cache.fields import field_of, tokens_group
from hf_compress.cache.files import hash_file
from hf_compress.cache.index import write_index
from hf_compress.cache.key import Canonical, Keys
from hf_compress.cache.manifest import INDEX_FILE, SHARED_FILE, Manifest
from hf_compress.cache.plan import fills_a_shard
from hf_compress.cache.predictions import VALUES, TopK
from hf_compress.cache.price import OFFSET_BYTES, RECORD_BYTES
from hf_compress.cache.reader import TeacherCache
from hf_compress.cache.selection import Depth, Selection
from hf_compress.cache.shard import ONE_ROW, Column, ShardInfo, shard_name, write_shard
from hf_compress.cache.shard_reader import Record, Shard
from hf_compress.cache.spaces import write_spaces
from hf_compress.errors import ArgumentError, CacheError
from hf_compress.selected_state import AllDimensions, KeptEntries, SelectedState, Space
from hf_compress.signals import HiddenState, Signals, SignalSpec
from hf_compress.top_logits import TopLogits

# Records read together where the lengths of examples are not known: only some of their tokens are stored, so they are small.
FEW_RECORDS = 64


@dataclass(frozen=True)
class View:
    """What a smaller cache holds of a larger one.

    Attributes:
        selection: of the hidden states; a depth without a scheme or pairs is the larger cache's own.
        codec: number format; None for the larger cache's.
        num_student_layers: where the depth's scheme needs it, see `layers_of_view`.
        attention_scores: whether those that are stored are kept, and vectors.
        top: how much of a language model's logits; None for what the larger cache has of them.
        version: of hf_compress, for the manifest.
    """

    selection: Selection
    version: str
    codec: CodecName | None = None
    num_student_layers: int | None = None
    attention_scores: bool = True
    top: TopK | None = None


def copy_view(folder: Path, smaller: Path, view: View, progress: Callable[[int], object] | None = None) -> Manifest:
    """Write a view of a cache as a cache of its own.

    Args:
        folder: the larger cache.
        smaller: where the smaller one goes; not there yet, or an empty folder.
        view: what it holds.
        progress: is told how many more examples are copied.

    Returns:
        The manifest of the smaller one.

    Raises:
        CacheError: if the larger cache is unfinished or damaged, does not hold what is asked, or there is something in `smaller`.
        ArgumentError: if the depth asks for more layers than there are.
    """
    if os.path.lexists(smaller) and (not smaller.is_dir() or any(smaller.iterdir())):
        raise CacheError(f"There is something in {smaller} already. Name a folder that is not there yet, or delete that one.")
    source, target = _Source(folder, view), smaller.absolute()
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_name(f"{target.name}.{secrets.token_hex(4)}.tmp")
    unfinished.mkdir()
    try:
        manifest = _write(source, unfinished, progress or (lambda examples: None))
        os.rename(unfinished, target)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    return manifest


def signals_of_view(folder: Path, view: View) -> SignalSpec:
    """Which signals a view would hold.

    Raises:
        CacheError, ArgumentError: as `copy_view`.
    """
    return _Source(folder, view).kept


def records_at_once(longest: int) -> int:
    """How many records a view reads together, the longest of so many tokens; 0 where their lengths are not known."""
    return max(1, CPU_BATCH_TOKENS // longest) if longest else FEW_RECORDS


def layers_of_view(
    asked: Depth, stored: Depth, held: Collection[int], num_teacher_layers: int, own: Sequence[tuple[int, int]], students: int | None
) -> frozenset[int]:
    """Which teacher layers a view needs.

    Args:
        asked, stored: the two selections' depths; `asked` as `selection_of_view` gives it.
        held: the teacher layers that are stored, 0 the embedding output.
        num_teacher_layers: N.
        own: the pairs of the map that the cache was built with, where it was given by pairs; else empty, and the map rises.
        students: the student's number of layers, None if not known.

    Raises:
        ArgumentError: more layers than there are, or a scheme that needs `students`.
    """
    if asked.layers is None and asked.pairs == stored.pairs and asked.scheme == stored.scheme:
        return frozenset(held)
    if asked.pairs is not None:
        pairs = asked.layer_map_pairs(max(student for student, _ in asked.pairs), num_teacher_layers)
    elif asked.scheme is not None and (students is not None or asked.layers == 1):
        pairs = asked.layer_map_pairs(students or 1, num_teacher_layers)  # the top layer is the same for every student
    elif asked.scheme is not None and asked.scheme != stored.scheme:
        raise ArgumentError(f"Which layers {asked.scheme} chooses depends on the student's depth: give --num_layers, such as 4.")
    else:
        rising = tuple(own) or tuple(enumerate(sorted(set(held) - {0}), start=1))
        pairs = Depth(asked.layers).layer_map_pairs(max((s for s, _ in rising), default=0), num_teacher_layers, rising)
    return frozenset(teacher for _, teacher in pairs)


class _Source(TeacherCache):
    """A cache, read in its own order of records."""

    def __init__(self, folder: Path, view: View) -> None:
        stored = TeacherCache(folder).stored
        super().__init__(folder, selection=view.selection)
        if not self.spec.hidden_states and self.selection != stored.selection:
            raise CacheError(f"The teacher on disk in {folder} holds no hidden states to choose from.")
        self.codec: CodecName = view.codec or stored.codec
        self.view = view
        self.kept = SignalSpec(
            self.spec.logits,
            frozenset(key for stack in sorted(self.spec.stacks) for key in self._kept_states(stack)),
            self.spec.attention_scores if view.attention_scores else frozenset(),
            self.spec.attention_vectors if view.attention_scores else frozenset(),
        )
        self.spaces: dict[str, Space] = {}  # filled as the first states are read
        if view.top is not None and self.top is not None:
            self.keep_top(view.top.k)

    def _kept_states(self, stack: str) -> list[HiddenState]:
        states = [key for key in self.spec.hidden_states if key.stack == stack]
        held = {key.layer for key in states}
        if not held:
            return []
        depth = self.manifest.teacher.stacks[stack]["num_layers"]
        compared = self.manifest.distillation.get("compared_layers", [])  # where more layers are stored than the run's own map has
        own = _pairs_of(self.manifest.distillation.get("distill_layer_map")) or tuple(enumerate(sorted({*compared} - {0}), start=1))
        layers = layers_of_view(self.selection.depth, self.stored.selection.depth, held, depth, own, self.view.num_student_layers)
        # The rest was looked at when the cache was opened.
        reason = replace(self.stored.selection, depth=self.selection.depth).within(self.stored.selection, layers=layers, stored_layers=held)
        if layers - held and reason is not None:
            raise CacheError(f"The teacher on disk in {self.folder} cannot be read as {self.selection.describe()}: {reason}.")
        return [key for key in states if key.layer in layers]

    def batches(self) -> Iterator[tuple[Keys, Rows]]:
        """The records of the smaller cache, some at a time.

        Raises:
            CacheError: if a record is damaged, or a value is too large for the codec.
        """
        for info in self.manifest.shards:
            shard = Shard.open(self.folder / info.name, info, self.manifest.columns)
            start = 0
            while start < len(shard):
                places = range(start, min(start + records_at_once(self._longest(shard, start)), len(shard)))
                keys = np.ascontiguousarray(shard.keys[places.start : places.stop])
                yield keys, self._rows(shard.records(list(places), keys=keys))
                start = places.stop

    def _longest(self, shard: Shard, row: int) -> int:
        """The tokens of an example, 0 where that is not known. Examples stand by falling length: this is the longest of the next."""
        return max((count for group, count in shard.counts(row).items() if group.startswith(tokens_group(""))), default=0)

    def _rows(self, records: Sequence[Record]) -> Rows:
        rows = Rows()
        if self.kept.logits and (self.view.top is not None or (self.top is not None and self.codec != self.stored.codec)):
            self._add_top_logits(rows, records)
        elif self.kept.logits:
            for column in self.manifest.columns:
                if column.name.partition(".")[0].endswith("logits"):
                    _take(rows, column, records)
        if self.kept.hidden_states:
            self._add_states(rows, records)
        for score_key in sorted(self.kept.attention_scores):
            heads = self.manifest.teacher.stacks[score_key.stack]["num_attention_heads"]
            lengths = [math.isqrt(len(record[f"{field_of(score_key)}.values"]) // heads) for record in records]
            self._add_whole(rows, field_of(score_key), SignalSpec(attention_scores=frozenset({score_key})), records, lengths)
        for vector_key in sorted(self.kept.attention_vectors):
            lengths = [len(record[f"{field_of(vector_key)}.values"]) for record in records]
            self._add_whole(rows, field_of(vector_key), SignalSpec(attention_vectors=frozenset({vector_key})), records, lengths)
        return rows

    def _add_top_logits(self, rows: Rows, records: Sequence[Record]) -> None:
        """A language model's largest logits: fewer of them, or in another codec, or of whole ones."""
        batch = _batch([len(record[VALUES]) for record in records])
        signals = self._assembler.assemble(records, batch, SignalSpec(logits=True, temperatures=self.spec.temperatures))
        if signals.top_logits is None:
            assert self.view.top is not None
            signals = Signals(top_logits=TopLogits.of(signals.logits["logits"].float(), self.view.top.k, self.view.top.temperatures))
        self._encode(rows, signals, batch)

    def _encode(self, rows: Rows, signals: Signals, batch: Canonical) -> None:
        real = torch.arange(batch.width) < torch.from_numpy(batch.lengths)[:, None]
        encoded = Encoder(self.selection, self.codec, {}).encode(signals, real, torch.zeros_like(real), {})
        rows.values |= encoded.values
        rows.columns |= encoded.columns
        rows.counts |= encoded.counts

    def _add_states(self, rows: Rows, records: Sequence[Record]) -> None:
        keys = sorted(self.kept.hidden_states)
        dense = self.stored.selection.length == "all"
        for key in keys:
            counted = f"special.{key.stack}" if dense else f"{field_of(key)}.positions"
            batch = _batch([len(record[counted]) for record in records])
            signals = self._assembler.assemble(records, batch, SignalSpec(hidden_states=frozenset({key})))
            self._add_state(rows, key, _selected(signals, key, batch), records)

    def _add_state(self, rows: Rows, key: HiddenState, state: SelectedState, records: Sequence[Record]) -> None:
        """As `Encoder` does, of states that are selected already."""
        name, dense = field_of(key), self.selection.length == "all"
        if dense:
            for column in (f"special.{key.stack}", f"{name}.importance"):
                if column in self.columns:
                    _take(rows, self.columns[column], records)
        rows.add_state(key, state, self.codec, dense=dense)
        if not isinstance(state.space, AllDimensions | KeptEntries):
            self.spaces[name] = state.space

    def _add_whole(self, rows: Rows, name: str, spec: SignalSpec, records: Sequence[Record], lengths: Sequence[int]) -> None:
        """What no selection touches, one signal of examples of these lengths: as it is stored, or in another codec."""
        if self.codec == self.stored.codec:
            for part in ("values", "scales"):
                if f"{name}.{part}" in self.columns:
                    _take(rows, self.columns[f"{name}.{part}"], records)
            return
        batch = _batch(lengths)
        self._encode(rows, self._assembler.assemble(records, batch, spec), batch)


def _write(source: _Source, folder: Path, progress: Callable[[int], object]) -> Manifest:
    """All files of the smaller cache."""
    infos: list[ShardInfo] = []
    keys_of_shards: list[Keys] = []
    columns: tuple[Column, ...] = ()
    for keys, parts in _shards(source, progress):
        rows = Rows.joined(parts)
        columns = tuple(rows.columns.values())
        infos.append(write_shard(folder / shard_name(len(infos)), keys, columns, rows.values, rows.counts))
        keys_of_shards.append(keys)
    if not columns:
        raise CacheError(f"Nothing is left of {source.folder}: it holds neither logits nor hidden states. Look at `cache info`.")
    write_spaces(folder, source.spaces)
    shared = hash_file(folder / SHARED_FILE) if source.spaces else None
    index = write_index(folder / INDEX_FILE, keys_of_shards)
    narrowed = source.selection != source.stored.selection
    manifest = replace(
        source.manifest,
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        hf_compress_version=source.view.version,
        selection={**source.selection.to_json(), "codec": source.codec},
        # What the larger one was allowed to take is not said of this one.
        distillation={
            **{name: value for name, value in source.manifest.distillation.items() if name != "budget"},
            **({"selected": True} if narrowed else {}),
        },
        columns=columns,
        shared=shared.hash if shared else None,
        index=index.hash,
        shards=tuple(infos),
        bytes=sum(info.bytes for info in infos) + index.bytes + (shared.bytes if shared else 0),
        appended=0,
    )
    manifest.save(folder)
    return manifest


def _shards(source: _Source, progress: Callable[[int], object]) -> Iterator[tuple[Keys, list[Rows]]]:
    """Batches put together until they are a shard, as `plan` does it."""
    keys: list[Keys] = []
    parts: list[Rows] = []
    size, examples = 0, 0
    for few, rows in source.batches():
        keys.append(few)
        parts.append(rows)
        examples += len(few)
        size += len(few) * (RECORD_BYTES + OFFSET_BYTES * len(rows.counts)) + sum(values.nbytes for values in rows.values.values())
        progress(len(few))
        if fills_a_shard(size, examples, len(source)):
            yield np.concatenate(keys), parts
            keys, parts, size, examples = [], [], 0, 0
    if parts:
        yield np.concatenate(keys), parts


def _take(rows: Rows, column: Column, records: Sequence[Mapping[str, npt.NDArray[Any]]]) -> None:
    """Take a column over as it is."""
    rows.values[column.name] = np.concatenate([record[column.name] for record in records])
    rows.columns[column.name] = column
    if column.group != ONE_ROW:
        rows.counts[column.group] = np.array([len(record[column.name]) for record in records], dtype=np.int64)


def _batch(lengths: Sequence[int]) -> Canonical:
    """Right-padded examples of which nothing but their lengths is known."""
    counts = np.array(lengths, dtype=np.int64)
    return Canonical({}, np.zeros_like(counts), counts, max(1, int(counts.max(initial=0))))


def _selected(signals: Signals, key: HiddenState, batch: Canonical) -> SelectedState:
    """The state that was read; a whole one as the selection of all its tokens."""
    if key in signals.selected_states:
        return signals.selected_states[key]
    at = torch.arange(batch.width).expand(len(batch), -1)
    return SelectedState(signals.hidden_states[key], at, at < torch.from_numpy(batch.lengths)[:, None], AllDimensions())


def _pairs_of(layer_map: object) -> tuple[tuple[int, int], ...]:
    """The pairs that a manifest's layer map names, in the order of the student's layers; none where it has only a name."""
    if isinstance(layer_map, dict):
        layer_map = list(layer_map.items())
    if isinstance(layer_map, str) and ":" in layer_map:
        layer_map = [pair.split(":") for pair in layer_map.split(",")]
    if not isinstance(layer_map, list):
        return ()
    return tuple(sorted((int(student), int(teacher)) for student, teacher in layer_map))
