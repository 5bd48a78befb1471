"""What a teacher on disk costs, said before it is built.

Bytes are not estimated: an example of made-up zeros is encoded as the real ones will be, and counted.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch

from hf_compress.cache.encode import Encoder
from hf_compress.cache.key import Integers
from hf_compress.errors import CacheError
from hf_compress.signals import HiddenState, Signals

logger = logging.getLogger(__name__)

# A record's key and checksum in its shard, and its key and place in the index.
RECORD_BYTES = 16 + 8 + 24
OFFSET_BYTES = 4
# Headers, the manifest's line of a shard, the first of the offsets.
SHARD_OVERHEAD = 4096


@dataclass(frozen=True)
class Price:
    """What building will take.

    Attributes:
        examples, tokens: unique ones, and their real tokens.
        bytes: all files together, but for headers and the manifest, some kilobytes a shard.
        free: bytes free on that disk.
    """

    examples: int
    tokens: int
    bytes: int
    free: int

    def __str__(self) -> str:
        each = self.bytes / max(1, self.examples)
        token = self.bytes / max(1, self.tokens)
        bytes_of = f"{each:,.0f} bytes an example, {token:,.0f} a token"
        return f"{self.examples:,} examples, {self.tokens:,} tokens: {readable(self.bytes)}, {bytes_of}"


def example_bytes(encoder: Encoder, blank: Callable[[int], tuple[Signals, Mapping[HiddenState, torch.Tensor]]]) -> Callable[[int], float]:
    """How many bytes an example of some number of tokens takes.

    Args:
        encoder: of the cache.
        blank: made-up signals, and importances, of one example of so many tokens, in the shapes of the real ones.
    """

    @cache
    def measured(tokens: int) -> float:
        signals, importance = blank(tokens)
        real = torch.ones(1, tokens, dtype=torch.bool)
        rows = encoder.encode(signals, real, torch.zeros_like(real), importance)
        return RECORD_BYTES + OFFSET_BYTES * len(rows.counts) + sum(values.nbytes for values in rows.values.values())

    return measured


def epochs_to_pay_back(lengths: Integers, built_tokens: int, batch_size: int = 32) -> float:
    """After how many epochs building has cost less than a live teacher: the tokens that each of them reads, padding included.

    Args:
        lengths: (unique examples,) real tokens; a live teacher reads them in random batches, padded to the longest.
        built_tokens: tokens that the builder's batches have, padding included.
        batch_size: of the training.
    """
    shuffled = np.random.RandomState(0).permutation(lengths)
    whole = len(shuffled) // batch_size * batch_size
    batches = shuffled[:whole].reshape(-1, batch_size).max(1) if whole else shuffled[:0]
    live = int(batches.sum()) * batch_size + int(shuffled[whole:].max(initial=0)) * (len(shuffled) - whole)
    return built_tokens / max(1, live)


def free_bytes(folder: Path) -> int:
    """Bytes free where the folder is, or will be."""
    existing = next(parent for parent in (folder, *folder.resolve().parents) if parent.exists())
    return shutil.disk_usage(existing).free


def refuse_too_little_disk(price: Price, folder: Path, present: int) -> None:
    """Before the first forward.

    Args:
        price: of the whole cache.
        folder: where it goes.
        present: bytes that an earlier build left there.

    Raises:
        CacheError: if the disk is too small.
    """
    needed = price.bytes - present
    if needed > price.free:
        raise CacheError(
            f"The teacher on disk would take {readable(price.bytes)} ({price}), but only {readable(price.free)} are free in {folder}. "
            "Store less: fewer layers, tokens or dimensions (--hsk 1l_10t_0.1h), a smaller number format (--teacher_cache_dtype int8), or "
            "fewer of a language model's logits (--teacher_cache_logits_top_k 64)."
        )


def readable(count: float) -> str:
    """1234567 -> "1.2 MB"."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
