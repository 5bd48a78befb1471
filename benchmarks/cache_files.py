"""The files of a cache by themselves: bytes an example, look-ups in the index, reading in random order."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measuring import Bar, median

from hf_compress.cache.codec_name import CodecName
from hf_compress.cache.encode import Encoder
from hf_compress.cache.index import Index, write_index
from hf_compress.cache.key import Canonical
from hf_compress.cache.manifest import INDEX_FILE
from hf_compress.cache.reader import TeacherCache
from hf_compress.cache.selection import Selection, WidthScheme
from hf_compress.cache.shard import shard_name, write_shard
from hf_compress.cache.spaces import make_spaces
from hf_compress.signals import HiddenState, Signals

HIDDEN, TOKENS, EXAMPLES = 768, 128, 2048
STATE = HiddenState("layers", 12)


def made_up_keys(count: int) -> np.ndarray[Any, np.dtype[np.uint64]]:
    """(count, 2), as a hash would be."""
    return np.random.default_rng(0).integers(0, 2**64, (count, 2), dtype=np.uint64)


def bytes_per_example(text: str, width: WidthScheme | None, codec: CodecName) -> float:
    """A shard of 2,048 examples of 128 tokens and its index, 768 wide, two classes: bytes on disk, all told, an example."""
    selection = Selection.parse(text, width_scheme=width)
    sample = {"hidden_states.layers.12": torch.randn(4 * HIDDEN, HIDDEN)}
    encoder = Encoder(selection, codec, make_spaces(selection, {"hidden_states.layers.12": HIDDEN}, sample))
    parts = []
    real = torch.ones(64, TOKENS, dtype=torch.bool)
    for _ in range(EXAMPLES // 64):
        signals = Signals(logits={"logits": torch.randn(64, 2)}, hidden_states={STATE: torch.randn(64, TOKENS, HIDDEN)})
        parts.append(encoder.encode(signals, real, torch.zeros_like(real), {STATE: torch.rand(64, TOKENS)}))
    columns = list(parts[0].columns.values())
    values = {column.name: np.concatenate([part.values[column.name] for part in parts]) for column in columns}
    counts = {group: np.concatenate([part.counts[group] for part in parts]) for group in parts[0].counts}
    folder = Path(tempfile.mkdtemp(prefix="cache_"))
    keys = made_up_keys(EXAMPLES)
    shard = write_shard(folder / shard_name(0), keys, columns, values, counts)
    return (shard.bytes + write_index(folder / INDEX_FILE, [keys]).bytes) / EXAMPLES


def size_bars() -> list[Bar]:
    """The issue of bytes."""
    bars = [
        Bar(f"bytes an example, 1l_10t_0.1h, {width} {codec}", bytes_per_example("1l_10t_0.1h", width, codec), limit)
        for width, codec, limit in (
            ("pca", "float16", 2000.0),
            ("random", "float16", 2000.0),
            ("magnitude", "float16", 2600.0),
            ("magnitude", "int8", 2000.0),
        )
    ]
    whole = {codec: bytes_per_example("1l", None, codec) for codec in ("int8", "float32")}
    return [*bars, Bar("hidden states on disk, int8 / float32", whole["int8"] / whole["float32"], 0.26)]


def index_bars(count: int) -> list[Bar]:
    """A look-up of 32 keys among `count` against among ten thousand, and the anonymous memory that the large index takes."""
    folder = Path(tempfile.mkdtemp(prefix="index_"))
    indexes, wanted = [], []
    before = 0
    for number, examples in enumerate((10_000, count)):
        keys = made_up_keys(examples)
        write_index(folder / f"{number}.safetensors", [keys])
        chosen = np.random.default_rng(1).choice(examples, (400, 32))
        wanted.append([np.ascontiguousarray(keys[rows]) for rows in chosen])
        del keys
    before = anonymous_bytes()
    for number, examples in enumerate((10_000, count)):
        indexes.append(Index.open(folder / f"{number}.safetensors", examples))
    seconds: list[list[float]] = [[], []]
    for few, many in zip(*wanted, strict=True):
        for index, keys, times in zip(indexes, (few, many), seconds, strict=True):
            started = time.perf_counter()
            found = index.find(keys)
            times.append(time.perf_counter() - started)
            assert (found >= 0).all()
    grown = (anonymous_bytes() - before) / 1e6
    ratio = median(seconds[1]) / median(seconds[0])
    return [
        Bar(f"32 keys among {count:,} / among 10,000", ratio, 2.0),
        Bar("anonymous memory of the large index", grown, 100.0, " MB"),
    ]


def anonymous_bytes() -> float:
    """What this process holds of memory that no file stands behind."""
    for line in Path("/proc/self/smaps_rollup").read_text(encoding="utf-8").splitlines():
        if line.startswith("Anonymous:"):
            return float(line.split()[1]) * 1024
    return 0.0


def read_bar(folder: Path, size: int, rounds: int = 60) -> Bar:
    """Batches in random order out of a cache, checksums and padding included, against a numpy memmap that gives the same bytes."""
    cache = TeacherCache(folder)
    shard = cache._shard(0)
    rows = np.random.default_rng(2).integers(0, len(shard), (rounds, size))
    file = Path(shard.path)
    each = file.stat().st_size // len(shard)
    plain = np.memmap(file, np.uint8, "r")[: each * len(shard)].reshape(len(shard), each)
    seconds: list[list[float]] = [[], []]
    for chosen in rows:
        started = time.perf_counter()
        read_batch(cache, chosen)
        between = time.perf_counter()
        np.stack([plain[row] for row in chosen])
        ended = time.perf_counter()
        seconds[0].append(between - started)
        seconds[1].append(ended - between)
    return Bar("random batches of 32, float16 full: cache / numpy memmap, time", median(seconds[0]) / median(seconds[1]), 2.0)


class OfKeys(Canonical):
    """Examples whose keys are known, and not their tokens."""

    def __init__(self, keys: np.ndarray[Any, np.dtype[np.uint64]], lengths: np.ndarray[Any, np.dtype[np.int64]]) -> None:
        super().__init__({}, np.zeros_like(lengths), lengths, int(lengths.max()))
        object.__setattr__(self, "_keys", keys)

    def keys(self) -> np.ndarray[Any, np.dtype[np.uint64]]:
        """They are given: tokens are hashed by whoever reads them."""
        return self._keys  # type: ignore[attr-defined, no-any-return]


def read_batch(cache: TeacherCache, rows: np.ndarray[Any, np.dtype[np.int64]]) -> Signals:
    """One batch of examples as a training step gets it."""
    shard = cache._shard(0)
    lengths = np.array([shard.counts(int(row))["tokens.layers"] for row in rows], dtype=np.int64)
    return cache.read(OfKeys(np.ascontiguousarray(shard.keys[rows]), lengths), cache.spec)
