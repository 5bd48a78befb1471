"""The index finds what is there, says -1 of what is not, whatever the keys, and needs no memory for it."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from safetensors.numpy import load_file

from hf_compress.cache.index import Index, split_places, write_index
from hf_compress.errors import CacheError
from tests.cache.small_cache import random_keys

Keys = npt.NDArray[np.uint64]


def opened(path: Path, shards: list[Keys]) -> Index:
    info = write_index(path, shards)
    assert info.bytes == path.stat().st_size
    return Index.open(path, info.examples, info.hash)


def plain(shards: list[Keys]) -> dict[tuple[int, int], tuple[int, int]]:
    places: dict[tuple[int, int], tuple[int, int]] = {}
    for number, keys in enumerate(shards):
        for row, (high, low) in enumerate(keys.tolist()):
            places.setdefault((high, low), (number, row))
    return places


def keys_of(kind: str, count: int) -> Keys:
    """Hashes, and what no hash gives: crowded, equal in one word, at the ends, twice."""
    keys = random_keys(np.random.default_rng(count), count)
    if kind == "same_high":
        keys[:, 0] = 7
    elif kind == "few_high":
        keys[:, 0] %= np.uint64(3)
    elif kind == "small":
        keys[:] = np.arange(2 * count).reshape(count, 2)
    elif kind == "ends":
        keys[: count // 2, 0] = 2**64 - 1
        keys[count // 2 :, 0] = 0
    elif kind == "crowded":
        keys[:, 0] = (keys[:, 0] >> np.uint64(40)) + np.uint64(2**63)
    elif kind == "twice":
        keys[count // 2 :] = keys[: count - count // 2]
    return keys


@pytest.mark.parametrize("kind", ["hashes", "same_high", "few_high", "small", "ends", "crowded", "twice"])
@pytest.mark.parametrize("count", [1, 2, 31, 32, 33, 40, 3000])
def test_as_a_dictionary(tmp_path: Path, kind: str, count: int) -> None:
    keys = keys_of(kind, count)
    shards = [part for part in np.array_split(keys, 3) if len(part)]
    index, expected = opened(tmp_path / "index", shards), plain(shards)
    assert len(index) == len(expected)
    numbers, rows = split_places(index.find(keys))
    assert [(int(number), int(row)) for number, row in zip(numbers, rows, strict=True)] == [expected[tuple(key)] for key in keys.tolist()]
    # Neighbours of what is there, the ends, and some more: present only where the dictionary says so.
    others = np.concatenate(
        [keys + np.uint64([0, 1]), keys - np.uint64([1, 0]), keys[:, ::-1], np.uint64([[0, 0], [2**64 - 1, 2**64 - 1]])]
    )
    absent = np.array([tuple(key) not in expected for key in others.tolist()])
    assert ((index.find(others) == -1) == absent).all()
    for key in keys[:20]:
        assert index.find(key[None]) == index.find(keys)[(keys == key).all(1)][:1]


def test_layout(tmp_path: Path) -> None:
    shards = [random_keys(np.random.default_rng(0), 5), random_keys(np.random.default_rng(1), 4)]
    opened(tmp_path / "index", shards)
    tensors = load_file(tmp_path / "index")
    expected = sorted((*key, place) for key, place in plain(shards).items())
    assert tensors["keys"].tolist() == [[high, low] for high, low, _ in expected]
    assert tensors["places"].tolist() == [(number << 32) | row for _, _, (number, row) in expected]


def test_24_bytes_an_example(tmp_path: Path) -> None:
    info = write_index(tmp_path / "index", [random_keys(np.random.default_rng(0), 10_000)])
    assert (info.bytes - 24 * info.examples) < 300


def test_no_memory_with_the_number_of_keys(tmp_path: Path) -> None:
    keys = random_keys(np.random.default_rng(0), 300_000)
    info = write_index(tmp_path / "index", [keys])
    tracemalloc.start()
    try:
        index = Index.open(tmp_path / "index", info.examples)
        for start in range(0, 3200, 32):
            assert (index.find(keys[start : start + 32]) == np.arange(start, start + 32)).all()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 200_000  # the index has 7,200,000 bytes


def test_nothing_asked(tmp_path: Path) -> None:
    assert opened(tmp_path / "index", [random_keys(np.random.default_rng(0), 5)]).find(np.empty((0, 2), np.uint64)).shape == (0,)


def test_another_index(tmp_path: Path) -> None:
    info = write_index(tmp_path / "index", [random_keys(np.random.default_rng(0), 5)])
    with pytest.raises(CacheError, match=r"shape\[0\]: found 5, expected 6"):
        Index.open(tmp_path / "index", 6)
    with pytest.raises(CacheError, match=f"hash is {info.hash}; expected 00"):
        Index.open(tmp_path / "index", 5, "00")


def test_an_impossible_place(tmp_path: Path) -> None:
    keys = random_keys(np.random.default_rng(0), 5)
    write_index(tmp_path / "index", [keys])
    data = bytearray((tmp_path / "index").read_bytes())
    data[-1] |= 128  # the highest bit of the last place, which is that of the greatest key
    (tmp_path / "index").write_bytes(data)
    greatest = np.array([max(keys.tolist())], np.uint64)
    with pytest.raises(CacheError, match="damaged"):
        Index.open(tmp_path / "index", 5).find(greatest)


def test_keys_that_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(CacheError, match="no records"):
        write_index(tmp_path / "index", [])
    with pytest.raises(CacheError, match="keys of shard 1 are int64"):
        write_index(tmp_path / "index", [np.ones((1, 2), np.uint64), np.ones((1, 2), np.int64)])
