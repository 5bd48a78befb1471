"""A teacher on disk as a `SignalSource`: what it said is read where batches are made, ahead of the step that needs it.

collator:  examples --collate--> batch --keys--> cache.read --> batch["hf_compress_teacher"] = StoredSignals
                      in a worker of the DataLoader: read there and then
                      in the training process:       read by a thread, while the model is busy with the batch before
trainer:   CachedTeacher.signals(batch)  takes them out
                      examples that were not there: the live teacher is asked, in the training process, if the run has one
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch.utils.data import get_worker_info

from hf_compress.cache.key import Canonical, canonical_examples
from hf_compress.cache.missing import MissingExamples
from hf_compress.cache.reader import TeacherCache
from hf_compress.packed_signals import PackedSignals
from hf_compress.signals import Signals, SignalSpec

# The batch's entry that holds the teacher's side; a number follows where there are several. It reaches no model.
ENTRY = "hf_compress_teacher"


# What a batch is read as: signals, side by side where they go to a device; or its examples, if not all of them are there.
Read = Signals | PackedSignals | Canonical


class StoredSignals:
    """The teacher's side of one batch, read or being read.

    Trainers and launchers move batches about: tensors, and what has `.to()` and `.pin_memory()`. It is no mapping and no list, so that
    nobody casts the teacher's numbers to the student's type on the way.
    """

    def __init__(self, signals: Read | Future[Read]) -> None:
        self._signals: Read | Future[Read] = signals
        self._device: torch.device | None = None

    def get(self, complete: Callable[[Canonical], Signals] | None = None) -> Signals:
        """The signals; waits until they are read.

        Args:
            complete: reads a batch of which not all was there; None where that is an error.

        Raises:
            CacheError: what went wrong in reading.
        """
        if isinstance(self._signals, Future):
            self._signals = self._signals.result()
        if isinstance(self._signals, Canonical):
            assert complete is not None
            self._signals = complete(self._signals)
        if self._device is not None:
            device, self._device = self._device, None
            self._signals = self._signals.moved(lambda tensor: tensor.to(device, non_blocking=True))
        if isinstance(self._signals, PackedSignals):
            self._signals = self._signals.unpack()
        return self._signals

    def to(self, device: Any, *args: Any, **kwargs: Any) -> StoredSignals:
        """Move there, when they are taken: nobody waits for the disk here."""
        self._device = torch.device(device)
        return self

    def pin_memory(self, device: Any = None) -> StoredSignals:
        """Pin what is read already."""
        if isinstance(self._signals, Signals | PackedSignals):
            self._signals = self._signals.moved(lambda tensor: tensor.pin_memory())
        return self


class CachedTeacher:
    """A finished cache that answers for its teacher.

    Args:
        cache: open.
        pad_token_id: tells padding from text where a batch has no attention_mask; None where it cannot.
        device: where the student is.

    Attributes:
        cache: as it is open now.
        missing: asks the live teacher for what the cache lacks; None where that is an error.
        entry: the batch's entry for what is read.
    """

    def __init__(self, cache: TeacherCache, *, pad_token_id: int | None, device: torch.device) -> None:
        self.cache, self.pad_token_id, self._device = cache, pad_token_id, device
        self.columns = frozenset(cache.manifest.input_columns)
        self.missing: MissingExamples | None = None
        self.entry = ENTRY
        self._reading: ReadingCollator | None = None

    def signals(self, inputs: Mapping[str, Any], spec: SignalSpec) -> Signals:
        """What was stored of a batch: what the collator read, or, where another one made the batch, what is read now."""
        stored = inputs.get(self.entry)
        if isinstance(stored, StoredSignals):
            return stored.get(lambda batch: self._read(batch, spec))
        read = self._read(canonical_examples(inputs, self.columns, pad_token_id=self.pad_token_id), spec)
        return read.moved(lambda tensor: tensor.to(self._device))

    def write_missing(self) -> None:
        """Append what was asked for since the last time, and read it from disk from now on."""
        if self.missing is not None and self.missing.write():
            self.cache = self.cache.refreshed()
            if self._reading is not None:
                self._reading.cache = self.cache.reader()  # and so in workers that are started from now on

    def close(self) -> None:
        """Let the files go; they are opened again when a batch is read."""
        self.write_missing()
        if self.missing is not None:
            self.missing.close()
        self.cache.close()
        if self._reading is not None:
            self._reading.cache.close()

    def reading(self, collator: Callable[[list[Any]], Mapping[str, Any]], spec: SignalSpec) -> ReadingCollator:
        """A collator that adds the teacher's side to what another one makes."""
        may_lack = self.missing is not None
        # A reader of its own: its thread reads ahead while this one completes a batch, or reads one that another collator made.
        self._reading = ReadingCollator(
            collator,
            self.cache.reader(),
            self.columns,
            self.pad_token_id,
            spec,
            may_lack=may_lack,
            packs=self._device.type != "cpu",
            entry=self.entry,
        )
        return self._reading

    def _read(self, batch: Canonical, spec: SignalSpec) -> Signals:
        if self.missing is None:
            return self.cache.read(batch, spec)
        signals = self.cache.read_with(batch, spec, self.missing.records(self.cache, batch))
        if self.missing.is_full:
            self.write_missing()
        return signals


class ReadingCollator:
    """See `CachedTeacher.reading`."""

    def __init__(
        self,
        collator: Callable[[list[Any]], Mapping[str, Any]],
        cache: TeacherCache,
        columns: frozenset[str],
        pad_token_id: int | None,
        spec: SignalSpec,
        *,
        may_lack: bool = False,
        packs: bool = False,
        entry: str = ENTRY,
    ) -> None:
        self.collator, self.cache, self.columns, self.pad_token_id, self.spec = collator, cache, columns, pad_token_id, spec
        self.may_lack, self.packs, self.entry = may_lack, packs, entry
        self._thread: ThreadPoolExecutor | None = None

    def __call__(self, examples: list[Any]) -> dict[str, Any]:
        """Collate, and read."""
        batch = dict(self.collator(examples))
        known = canonical_examples(batch, self.columns, pad_token_id=self.pad_token_id)
        if get_worker_info() is not None:
            batch[self.entry] = StoredSignals(self._read(self.cache, known))
        else:
            if self._thread is None:
                self._thread = ThreadPoolExecutor(1, thread_name_prefix="teacher-cache")
            batch[self.entry] = StoredSignals(self._thread.submit(self._read, self.cache, known))
        return batch

    def _read(self, cache: TeacherCache, known: Canonical) -> Read:
        """The signals; the examples themselves, where not all are there and the training process completes them."""
        decoded = not self.packs
        signals = (cache.read_if_whole if self.may_lack else cache.read)(known, self.spec, decoded=decoded)
        if signals is None:
            # A copy: what `known` has is the batch's own memory, which a worker gives away when it hands the batch over.
            return known.take(range(len(known)))
        return PackedSignals.pack(signals) if self.packs else signals

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_thread": None}  # a worker reads by itself
