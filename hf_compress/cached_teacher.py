"""A teacher on disk as a `SignalSource`: what it said is read where batches are made, ahead of the step that needs it.

collator:  examples --collate--> batch --keys--> cache.read --> batch["hf_compress_teacher"] = StoredSignals
                      in a worker of the DataLoader: read there and then
                      in the training process:       read by a thread, while the model is busy with the batch before
trainer:   CachedTeacher.signals(batch)  takes them out
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch.utils.data import get_worker_info

from hf_compress.cache.key import canonical_examples
from hf_compress.cache.reader import TeacherCache
from hf_compress.signals import Signals, SignalSpec

# The batch's entry that holds the teacher's side. It reaches no model.
ENTRY = "hf_compress_teacher"


class StoredSignals:
    """The teacher's side of one batch, read or being read.

    Trainers and launchers move batches about: tensors, and what has `.to()` and `.pin_memory()`. It is no mapping and no list, so that
    nobody casts the teacher's numbers to the student's type on the way.
    """

    def __init__(self, signals: Signals | Future[Signals]) -> None:
        self._signals = signals
        self._device: torch.device | None = None

    def get(self) -> Signals:
        """The signals; waits until they are read.

        Raises:
            CacheError: what went wrong in reading.
        """
        if isinstance(self._signals, Future):
            self._signals = self._signals.result()
        if self._device is not None:
            device, self._device = self._device, None
            self._signals = self._signals.moved(lambda tensor: tensor.to(device, non_blocking=True))
        return self._signals

    def to(self, device: Any, *args: Any, **kwargs: Any) -> StoredSignals:
        """Move there, when they are taken: nobody waits for the disk here."""
        self._device = torch.device(device)
        return self

    def pin_memory(self, device: Any = None) -> StoredSignals:
        """Pin what is read already."""
        if isinstance(self._signals, Signals):
            self._signals = self._signals.moved(lambda tensor: tensor.pin_memory())
        return self


class CachedTeacher:
    """A finished cache that answers for its teacher.

    Args:
        cache: open.
        pad_token_id: tells padding from text where a batch has no attention_mask; None where it cannot.
        device: where the student is.
    """

    def __init__(self, cache: TeacherCache, *, pad_token_id: int | None, device: torch.device) -> None:
        self.cache, self._pad, self._device = cache, pad_token_id, device
        self.columns = frozenset(cache.manifest.input_columns)

    def signals(self, inputs: Mapping[str, Any], spec: SignalSpec) -> Signals:
        """What was stored of a batch: what the collator read, or, where another one made the batch, what is read now."""
        stored = inputs.get(ENTRY)
        if isinstance(stored, StoredSignals):
            return stored.get()
        read = self.cache.read(canonical_examples(inputs, self.columns, pad_token_id=self._pad), spec)
        return read.moved(lambda tensor: tensor.to(self._device))

    def close(self) -> None:
        """Let the files go; they are opened again when a batch is read."""
        self.cache.close()

    def reading(self, collator: Callable[[list[Any]], Mapping[str, Any]], spec: SignalSpec) -> ReadingCollator:
        """A collator that adds the teacher's side to what another one makes."""
        return ReadingCollator(collator, self.cache, self.columns, self._pad, spec)


class ReadingCollator:
    """See `CachedTeacher.reading`."""

    def __init__(
        self,
        collator: Callable[[list[Any]], Mapping[str, Any]],
        cache: TeacherCache,
        columns: frozenset[str],
        pad_token_id: int | None,
        spec: SignalSpec,
    ) -> None:
        self.collator, self.cache, self.columns, self.pad_token_id, self.spec = collator, cache, columns, pad_token_id, spec
        self._thread: ThreadPoolExecutor | None = None

    def __call__(self, examples: list[Any]) -> dict[str, Any]:
        """Collate, and read."""
        batch = dict(self.collator(examples))
        known = canonical_examples(batch, self.columns, pad_token_id=self.pad_token_id)
        if get_worker_info() is not None:
            batch[ENTRY] = StoredSignals(self.cache.read(known, self.spec))
        else:
            if self._thread is None:
                self._thread = ThreadPoolExecutor(1, thread_name_prefix="teacher-cache")
            batch[ENTRY] = StoredSignals(self._thread.submit(self.cache.read, known, self.spec))
        return batch

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_thread": None}  # a worker reads by itself
