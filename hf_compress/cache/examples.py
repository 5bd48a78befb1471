"""The examples of a data set as the teacher will read them, whatever the collator makes of them in training."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from hf_compress.cache.key import Canonical, Integers, Keys, canonical_examples
from hf_compress.errors import DataError

READ_BATCH = 256


class Examples:
    """A data set and its collator. In multiple choice each choice is an example of its own: example 1's choices, then example 2's, ...

    Args:
        dataset: with a length and places, its columns those that the collator takes.
        collator: makes a batch of a list of examples, as in training.
        columns: the names of what the teacher's forward takes.
        special_ids: token ids that are special.
        pad_token_id: see `canonical_examples`.
        num_workers: processes that read ahead.
        may_change: whether the collator may draw new inputs each time.

    Raises:
        DataError: if the data set has no length, or the collator draws new inputs each time.
    """

    def __init__(
        self,
        dataset: Any,
        collator: Callable[[list[Any]], Mapping[str, Any]],
        columns: frozenset[str],
        special_ids: Sequence[int] = (),
        pad_token_id: int | None = None,
        num_workers: int = 0,
        *,
        may_change: bool = False,
    ) -> None:
        if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
            raise DataError(
                "The training data set has no length, so which examples a teacher on disk must hold is not known. Give a map-style data "
                "set, or distil from a live teacher (no --teacher_cache_dir)."
            )
        self._dataset, self._collator, self._num_workers = dataset, collator, num_workers
        self.columns, self._special_ids, self._pad = columns, torch.tensor(list(special_ids), dtype=torch.int64), pad_token_id
        self._choices = self._choices_of_the_first(may_change)

    def __len__(self) -> int:
        return len(self._dataset) * (self._choices or 1)

    def canonical(self, places: Sequence[int]) -> Canonical:
        """The examples at these places."""
        if self._choices is None:
            return self._read(self._collator([self._dataset[place] for place in places]))
        whole = sorted({place // self._choices for place in places})
        rows = {example: row for row, example in enumerate(whole)}
        read = self._read(self._collator([self._dataset[example] for example in whole]))
        return read.take([rows[place // self._choices] * self._choices + place % self._choices for place in places])

    def scan(self) -> Iterator[Canonical]:
        """All examples, a batch at a time, in the order of the data set.

        Raises:
            DataError: there are none.
        """
        if not len(self):
            raise DataError("The training data set is empty. Look at the file, and at --max_train_samples.")
        loader = DataLoader(self._dataset, READ_BATCH, shuffle=False, collate_fn=self._collator, num_workers=self._num_workers)
        yield from map(self._read, loader)

    def padded(self, examples: Canonical) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """See `padded` below."""
        return padded(examples, self._special_ids, self._pad)

    def _read(self, batch: Mapping[str, Any]) -> Canonical:
        read = self._read_any(batch)
        if read.choices != self._choices:
            raise DataError(
                f"The first example of the data has {self._choices or 'no'} choices, and others have {read.choices or 'none'}: a teacher "
                "on disk holds examples of as many choices. Distil from a live teacher (no --teacher_cache_dir)."
            )
        return read

    def _read_any(self, batch: Mapping[str, Any]) -> Canonical:
        return canonical_examples(batch, self.columns, pad_token_id=self._pad)

    def _choices_of_the_first(self, may_change: bool) -> int | None:
        """How many choices an example has, None for texts; seen on the first examples.

        A collator that masks words at random makes other examples of them each time: no cache can hold them, unless `may_change`.
        """
        places = range(min(len(self._dataset), 1 if may_change else 8))
        if not places:
            return None
        first, *more = (self._read_any(self._collator([self._dataset[place] for place in places])) for _ in range(1 if may_change else 2))
        if any(not np.array_equal(first.keys(), again.keys()) for again in more):
            raise DataError(
                f"The collator ({type(self._collator).__name__}) makes other inputs of the same examples each time, as masked language "
                "modelling does, so no teacher on disk can hold them. Mask once, when the data is tokenized, or distil from a live teacher "
                "(no --teacher_cache_dir)."
            )
        return first.choices


def padded(examples: Canonical, special_ids: Tensor, pad_token_id: int | None) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """The teacher's inputs of some examples: right-padded, no wider than the longest.

    Args:
        examples: unpadded.
        special_ids: (ids,) int64, the token ids that are special.
        pad_token_id: what stands at padding; None for 0.

    Returns:
        inputs: int64 (batch, tokens) by name, attention_mask among them; real: (batch, tokens) bool; special: (batch, tokens) bool.
    """
    width = max(1, int(examples.lengths.max(initial=0)))
    real = torch.arange(width) < torch.from_numpy(examples.lengths)[:, None]
    inputs = {}
    for name in examples.columns:
        values = np.zeros((len(examples), width), dtype=np.int64)
        for row, length in enumerate(examples.lengths.tolist()):
            values[row, :length] = examples.rows(name, row)
        inputs[name] = torch.from_numpy(values)
    if pad_token_id is not None:
        inputs["input_ids"].masked_fill_(~real, pad_token_id)
    special = torch.isin(inputs["input_ids"], special_ids) & real
    return {**inputs, "attention_mask": real.long()}, real, special


def keys_and_lengths(examples: Examples, progress: Callable[[int], object]) -> tuple[Keys, Integers]:
    """Every example's key and number of tokens, in the order of the data set; `progress` hears how many more are read."""
    keys: list[Keys] = []
    lengths: list[Integers] = []
    for batch in examples.scan():
        keys.append(batch.keys())
        lengths.append(batch.lengths)
        progress(len(batch))
    return np.concatenate(keys), np.concatenate(lengths)
