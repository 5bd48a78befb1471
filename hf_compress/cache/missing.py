"""Examples that a cache lacks: the teacher is asked for each of them once, and what it says is appended to the cache.

    batch -> which examples are not on disk? -> in memory already? -> else ask -> encode as the cache is -> records
                                                                                    -> append a shard, when there is enough for one

What is compared with the student is the record, as if it had been read: a later run that reads it learns the same.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from hf_compress.cache.append import Key, NewRecord, append_records, records_of
from hf_compress.cache.build import BATCH_TOKENS, CPU_BATCH_TOKENS
from hf_compress.cache.encode import Encoder, Rows
from hf_compress.cache.examples import padded
from hf_compress.cache.key import Canonical
from hf_compress.cache.plan import fills_a_shard
from hf_compress.cache.price import readable
from hf_compress.cache.reader import TeacherCache
from hf_compress.cache.shard_reader import Record
from hf_compress.cache.spaces import read_spaces
from hf_compress.cache.teacher_rows import TeacherRun
from hf_compress.errors import CacheError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class HowToAsk:
    """Whom to ask, and how.

    Attributes:
        load: gives the teacher; called when the first example is missing, if one ever is.
        special_ids: token ids that are special.
        pad_token_id: what stands at padding; None for 0.
        examples: how many the training data has: who asks for more has data that changes. None where that is not known.
    """

    load: Callable[[], TeacherRun]
    special_ids: Sequence[int] = ()
    pad_token_id: int | None = None
    examples: int | None = None


class MissingExamples:
    """Asks for the examples that a cache lacks, and keeps them until they are written.

    Args:
        cache: that lacks them.
        how: whom to ask.

    Attributes:
        asked: for how many examples the teacher was asked.
        appended: how many records this process wrote.
    """

    def __init__(self, cache: TeacherCache, how: HowToAsk) -> None:
        self.asked = self.appended = 0
        self._cache, self._how = cache, how
        self._run: TeacherRun | None = None
        self._encoder = Encoder(cache.stored.selection, cache.stored.codec, read_spaces(cache.folder, cache.stored.selection))
        self._pending: dict[Key, NewRecord] = {}
        self._bytes = 0
        self._cannot_write = self._warned = False
        self._limit = len(cache) if how.examples is None else how.examples

    @property
    def is_full(self) -> bool:
        """Whether there is enough for a shard, and it can be written."""
        return self._holds_a_shard and not self._cannot_write

    def records(self, cache: TeacherCache, batch: Canonical) -> dict[Key, Record]:
        """The records of those examples of a batch that a cache lacks.

        Args:
            cache: the same one as it is open now.
            batch: the examples.

        Raises:
            CacheError: the teacher shows other signals than those stored.
            TeacherError: it gives values that are not finite.
        """
        rows = cache.missing_rows(batch)
        wanted = {(high, low): row for row, (high, low) in zip(rows.tolist(), batch.keys()[rows].tolist(), strict=True)}
        found = {key: self._pending[key].columns for key in wanted if key in self._pending}
        unknown = sorted((row for key, row in wanted.items() if key not in found), key=lambda row: -int(batch.lengths[row]))
        start = 0
        while start < len(unknown):  # the longest first, as many as the teacher reads at a time
            size = max(1, self._batch_tokens // max(1, int(batch.lengths[unknown[start]])))
            found |= self._ask(batch.take(unknown[start : start + size]))
            start += size
        return found

    def write(self) -> bool:
        """Append what there is; whether there was something. Training goes on if it cannot be written, and then that is said."""
        if not self._pending:
            return False
        try:
            manifest, appended = append_records(self._cache.folder, self._cache.manifest, self._pending)
        except (CacheError, OSError) as error:
            if not self._cannot_write:
                logger.warning(
                    "%d examples that the teacher was asked for cannot be appended to the teacher on disk: %s Training goes on, with the "
                    "teacher asked again where memory does not suffice.",
                    len(self._pending),
                    error,
                )
            self._cannot_write = True
            return False
        self._cannot_write = False
        self.appended += appended
        logger.info(
            "teacher on disk: %d examples appended to %s, which has %d now, %s",
            appended,
            self._cache.folder,
            manifest.examples,
            readable(manifest.bytes),
        )
        self._pending, self._bytes = {}, 0
        return True

    def close(self) -> None:
        """Take the hooks off the teacher, and say how often it was asked."""
        if self._run is not None:
            self._run.source.close()
            logger.info("%d examples were not on disk: the teacher was asked for them, %d were appended", self.asked, self.appended)

    @property
    def _holds_a_shard(self) -> bool:
        return fills_a_shard(self._bytes, len(self._pending))

    @property
    def _batch_tokens(self) -> int:
        return BATCH_TOKENS.get(self._teacher.device.type, CPU_BATCH_TOKENS)

    @property
    def _teacher(self) -> TeacherRun:
        if self._run is None:
            logger.info("the teacher is asked for examples that are not on disk, in %s", self._cache.folder)
            self._run = self._how.load()
        return self._run

    def _ask(self, batch: Canonical) -> dict[Key, Record]:
        inputs, real, special = padded(batch, torch.tensor(list(self._how.special_ids), dtype=torch.int64), self._how.pad_token_id)
        rows = self._teacher.ask(inputs, real, special).rows(self._encoder)
        self._refuse_other_columns(rows)
        self.asked += len(batch)
        found: dict[Key, Record] = {}
        for (high, low), record, tokens in zip(batch.keys().tolist(), records_of(rows), batch.lengths.tolist(), strict=True):
            found[high, low] = record
            if not (self._cannot_write and self._holds_a_shard):  # memory does not grow without end
                self._pending[high, low] = NewRecord(record, tokens)
                self._bytes += self._pending[high, low].bytes
        self._warn_of_changing_data()
        return found

    def _refuse_other_columns(self, rows: Rows) -> None:
        shown, stored = ({column.name: column for column in columns} for columns in (rows.columns.values(), self._cache.manifest.columns))
        if differ := sorted(name for name in {*shown, *stored} if shown.get(name) != stored.get(name)):
            raise CacheError(
                f"The teacher shows other signals than the teacher on disk in {self._cache.folder} holds ({', '.join(differ)}), so "
                "examples cannot be appended. Build another in another folder (--teacher_cache_dir)."
            )

    def _warn_of_changing_data(self) -> None:
        if self._warned or self.asked <= self._limit:
            return
        self._warned = True
        each = np.mean([record.bytes for record in self._pending.values()]) if self._pending else 0
        logger.warning(
            "The teacher was asked for %d examples, more than the %d of the %s: the data changes in every epoch (masking, augmentation). "
            "So the cache grows in every epoch, by %s an example, and saves no time. Where that is not meant, distil from a live teacher: "
            "leave --teacher_cache_dir out.",
            self.asked,
            self._limit,
            "cache" if self._how.examples is None else "training data",
            readable(float(each)),
        )
