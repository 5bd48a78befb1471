"""In which batches the teacher runs, and which of them make a shard: settled before the first forward.

The plan hangs on the examples alone, not on how many processes share the work or where an earlier build stopped. So a build that was
killed, and goes on with other processes, writes the shards that one at a stroke would have written, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from hf_compress.cache.key import Integers, Keys

# A shard is what a killed build loses at most.
SHARD_BYTES = 64 * 2**20
SHARD_EXAMPLES = 2048
# Fewer examples are cut into so many shards nevertheless, of so many examples at least: processes cannot share two shards well.
SHARDS, LEAST_EXAMPLES = 32, 64


@dataclass(frozen=True)
class Plan:
    """Which example is computed when.

    Attributes:
        order: (unique examples,) places in the data set: the sample first; each part by falling length, so that the batch that needs most
            memory comes early, and batches hold examples of about one length.
        keys: (unique examples, 2), in this order.
        lengths: (unique examples,), in this order.
        batches: for each batch, the slice of `order` that it is.
        shards: for each shard, the slice of `batches` that it is.
        duplicates: how many examples of the data set were seen before.
        sample: how many examples stand before the others, in batches of their own: a sample that is looked at before anything is stored.
    """

    order: Integers
    keys: Keys
    lengths: Integers
    batches: tuple[slice, ...]
    shards: tuple[slice, ...]
    duplicates: int
    sample: int = 0

    @property
    def examples(self) -> int:
        """Unique examples."""
        return len(self.order)

    @property
    def tokens(self) -> int:
        """Real tokens of unique examples."""
        return int(self.lengths.sum())

    @property
    def by_key(self) -> Integers:
        """(unique examples,) places in this order, by rising key: as good as drawn at random, and the same for everybody."""
        return np.lexsort((self.keys[:, 1], self.keys[:, 0]))

    def span(self, shard: int) -> slice:
        """The slice of `order` that a shard is."""
        batches = self.batches[self.shards[shard]]
        return slice(batches[0].start, batches[-1].stop)


def make_plan(
    keys: Keys,
    lengths: Integers,
    *,
    batch_tokens: int,
    example_bytes: Callable[[int], float],
    sample_size: Callable[[Integers], int] = lambda lengths: 0,
) -> Plan:
    """Sort, batch, and group into shards.

    Args:
        keys: (examples, 2), in the order of the data set; an example that comes twice is computed once.
        lengths: (examples,) real tokens.
        batch_tokens: how many tokens, padding included, a batch may have; one example at least.
        example_bytes: what an example of that many tokens takes on disk.
        sample_size: how many of the examples, of these lengths, by rising key, make a sample; those come first.
    """
    _, by_key = np.unique(keys, axis=0, return_index=True)
    sample = sample_size(lengths[by_key])
    parts = [_by_length(part, keys, lengths) for part in (by_key[:sample], by_key[sample:])]
    order = np.concatenate(parts)
    batches = (*_batches(lengths[parts[0]], batch_tokens, 0), *_batches(lengths[parts[1]], batch_tokens, sample))
    shards = tuple(_shards(lengths[order], batches, example_bytes))
    return Plan(order.astype(np.int64), keys[order], lengths[order], batches, shards, len(keys) - len(order), sample)


def _by_length(places: Integers, keys: Keys, lengths: Integers) -> Integers:
    return places[np.lexsort((keys[places, 1], keys[places, 0], -lengths[places]))]


def _batches(lengths: Integers, batch_tokens: int, before: int) -> Iterator[slice]:
    start = 0
    while start < len(lengths):
        size = max(1, batch_tokens // max(1, int(lengths[start])))  # the first of a batch is its longest
        yield slice(before + start, before + min(start + size, len(lengths)))
        start += size


def _shards(lengths: Integers, batches: tuple[slice, ...], example_bytes: Callable[[int], float]) -> Iterator[slice]:
    return grouped([(sum(example_bytes(length) for length in lengths[batch].tolist()), batch.stop - batch.start) for batch in batches])


def shard_examples(of: int | None) -> int:
    """How many examples are enough for a shard, of so many in all; None where that is not known."""
    return SHARD_EXAMPLES if of is None else min(SHARD_EXAMPLES, max(LEAST_EXAMPLES, -(-of // SHARDS)))


def fills_a_shard(size: float, examples: int, of: int | None = None) -> bool:
    """Whether so many bytes and examples are enough for a shard, of so many examples in all."""
    return size >= SHARD_BYTES or examples >= shard_examples(of)


def grouped(batches: Sequence[tuple[float, int]]) -> Iterator[slice]:
    """Which batches make a shard, of batches of so many bytes and examples each."""
    total = sum(examples for _, examples in batches)
    first, size, examples, number = 0, 0.0, 0, -1
    for number, (more_bytes, more_examples) in enumerate(batches):
        size += more_bytes
        examples += more_examples
        if fills_a_shard(size, examples, total):
            yield slice(first, number + 1)
            first, size, examples = number + 1, 0.0, 0
    if first <= number:
        yield slice(first, number + 1)
