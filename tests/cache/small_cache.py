"""A small cache, written by the package's own writers, and read the way a reader goes: what was stored comes back, or CacheError."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hf_compress.cache.index import Index, split_places, write_index
from hf_compress.cache.manifest import INDEX_FILE, SHARED_FILE, Manifest, TeacherIdentity
from hf_compress.cache.shard import Column, ShardInfo, shard_name, write_shard
from hf_compress.cache.shard_reader import Shard
from hf_compress.cache.tensor_file import read_tensors, write_tensor_file
from hf_compress.errors import CacheError

COLUMNS = (
    Column("hidden_states.layers.2.values", "selected.layers.2", "float16", (3,)),
    Column("hidden_states.layers.2.positions", "selected.layers.2", "uint8", ()),
    Column("hidden_states.layers.4.values", "tokens.layers", "bfloat16", (2,)),
    Column("hidden_states.layers.4.scales", "tokens.layers", "float32", ()),
    Column("logits.values", "", "float32", (2,)),
)
STORAGE = {"float16": np.float16, "uint8": np.uint8, "bfloat16": np.uint16, "float32": np.float32}
TEACHER = TeacherIdentity(
    name="tiny",
    model_class="BertForSequenceClassification",
    weights="ab" * 16,
    dtype="float32",
    stacks={"layers": {"num_layers": 4, "hidden_size": 3, "num_attention_heads": 1}},
    labels=("no", "yes"),
    vocab_size=30,
    scores={"accuracy": 0.875},
)


@dataclass
class SmallCache:
    """The folder, what was written to it, and for each example its record."""

    folder: Path
    manifest: Manifest
    keys: npt.NDArray[np.uint64]  # (examples, 2)
    records: dict[tuple[int, int], dict[str, npt.NDArray[Any]]] = field(default_factory=dict)

    def keys_of(self, number: int) -> npt.NDArray[np.uint64]:
        """The keys of a shard, read from it."""
        info = self.manifest.shards[number]
        return Shard.open(self.folder / info.name, info, COLUMNS).keys.copy()

    @property
    def files(self) -> list[Path]:
        return sorted(self.folder.iterdir())


def random_keys(generator: np.random.Generator, count: int) -> npt.NDArray[np.uint64]:
    return generator.integers(0, 2**64, (count, 2), dtype=np.uint64)


def random_values(generator: np.random.Generator, rows: int, column: Column) -> npt.NDArray[Any]:
    return generator.integers(0, 100, (rows, *column.item)).astype(STORAGE[column.dtype])


def random_shard(generator: np.random.Generator, examples: int) -> tuple[dict[str, npt.NDArray[Any]], dict[str, npt.NDArray[Any]]]:
    """Values and counts; the first record has no rows of one group."""
    counts = {group: generator.integers(1, 5, examples) for group in ("selected.layers.2", "tokens.layers")}
    counts["selected.layers.2"][0] = 0
    rows = {group: int(count.sum()) for group, count in counts.items()} | {"": examples}
    return {column.name: random_values(generator, rows[column.group], column) for column in COLUMNS}, counts


def slices(values: dict[str, Any], counts: dict[str, Any], record: int) -> dict[str, npt.NDArray[Any]]:
    """One record's values, by a plain sum over the counts before it."""
    result = {}
    for column in COLUMNS:
        begin = record if column.group == "" else int(counts[column.group][:record].sum())
        rows = 1 if column.group == "" else int(counts[column.group][record])
        result[column.name] = values[column.name][begin : begin + rows]
    return result


def build(folder: Path, sizes: tuple[int, ...] = (5, 4), seed: int = 0, keys_seed: int = 1) -> SmallCache:
    """Write a cache; the last record of the last shard is of the first shard's second example, once more."""
    generator, keys_generator = np.random.default_rng(seed), np.random.default_rng(keys_seed)
    folder.mkdir(exist_ok=True)
    shards: list[ShardInfo] = []
    all_keys: list[npt.NDArray[np.uint64]] = []
    records: dict[tuple[int, int], dict[str, npt.NDArray[Any]]] = {}
    for number, examples in enumerate(sizes):
        keys = random_keys(keys_generator, examples)
        if number == len(sizes) - 1:
            keys[-1] = all_keys[0][1]
        values, counts = random_shard(generator, examples)
        shards.append(write_shard(folder / shard_name(number), keys, COLUMNS, values, counts))
        all_keys.append(keys)
        for row, (high, low) in enumerate(keys.tolist()):
            records.setdefault((high, low), slices(values, counts, row))
    index = write_index(folder / INDEX_FILE, all_keys)
    shared = write_tensor_file(folder / SHARED_FILE, {"mask": ("uint8", generator.integers(0, 255, 6).astype(np.uint8))})
    manifest = Manifest(
        format_version=1,
        created="2026-01-31T12:00:00+00:00",
        hf_compress_version="0.1",
        teacher=TEACHER,
        tokenizer="cd" * 16,
        input_columns=("input_ids", "token_type_ids"),
        selection={"depth": {"layers": 1}, "width": 0.1},
        distillation={"recipe": "mud", "layer_map": [[1, 2], [2, 4]]},
        columns=COLUMNS,
        shared=shared.hash,
        index=index.hash,
        shards=tuple(shards),
        examples=index.examples,
        tokens=99,
        bytes=index.bytes + shared.bytes + sum(shard.bytes for shard in shards),
    )
    manifest.save(folder)
    return SmallCache(folder, manifest, np.array(list(records), np.uint64), records)


def read_all(cache: SmallCache) -> None:
    """Read every example as a training run does.

    Raises:
        CacheError: if anything is refused.
        AssertionError: if something was read that is not what was stored.
    """
    manifest = Manifest.load(cache.folder)
    assert manifest == cache.manifest
    read_tensors(cache.folder / SHARED_FILE, manifest.shared or "")
    index = Index.open(cache.folder / manifest.index_file, manifest.examples)
    shards = [Shard.open(cache.folder / info.name, info, manifest.columns) for info in manifest.shards]
    places = index.find(cache.keys)
    if (places < 0).any():
        raise CacheError("an example is not in the cache")
    for key, number, row in zip(cache.keys, *split_places(places), strict=True):
        if number >= len(shards):
            raise CacheError("there is no such shard")
        (record,) = shards[number].records([int(row)], keys=key[None])
        same(record, cache.records[tuple(key.tolist())])
        same(shards[number].record(int(row), key=tuple(key.tolist())), record)


def same(found: dict[str, npt.NDArray[Any]], expected: dict[str, npt.NDArray[Any]]) -> None:
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert found[name].dtype == values.dtype and found[name].shape == values.shape, name
        assert found[name].tobytes() == values.tobytes(), name
