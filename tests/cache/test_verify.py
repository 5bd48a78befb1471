"""Whatever is done to the files of a cache, `verify` names it, and reading refuses it or gives what was stored: never another value."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hf_compress.cache.index import write_index
from hf_compress.cache.manifest import INDEX_FILE, MANIFEST_FILE, SHARED_FILE, Manifest
from hf_compress.cache.shard import shard_name, write_shard
from hf_compress.cache.verify import verify
from hf_compress.errors import CacheError
from tests.cache.small_cache import COLUMNS, SmallCache, build, random_shard, read_all

FILES = (INDEX_FILE, MANIFEST_FILE, SHARED_FILE, shard_name(0), shard_name(1))
TENSOR_FILES = tuple(name for name in FILES if name != MANIFEST_FILE)


@pytest.fixture
def cache(tmp_path: Path) -> SmallCache:
    return build(tmp_path / "cache")


@contextmanager
def replaced(path: Path, data: bytes) -> Iterator[None]:
    """The file with other bytes, for a while; a new file, since the old one may still be mapped."""
    before = path.read_bytes()
    assert data != before
    try:
        path.unlink()
        path.write_bytes(data)
        yield
    finally:
        path.unlink()
        path.write_bytes(before)


def refused(cache: SmallCache) -> bool:
    """Whether reading it is refused; if it is not, all values are as they were stored."""
    try:
        read_all(cache)
    except CacheError:
        return True
    return False


def found_by_verify(cache: SmallCache, name: str, what: object) -> None:
    problems = verify(cache.folder).problems
    assert any(name in problem for problem in problems), (what, problems)


def flip_bytes(cache: SmallCache, name: str, step: int) -> int:
    """Flip bits of every `step`-th byte of the file, one byte at a time; the number of those that reading refuses."""
    generator = np.random.default_rng(step)
    data = (cache.folder / name).read_bytes()
    count = 0
    for position in range(int(generator.integers(step)), len(data), step):
        flipped = bytearray(data)
        flipped[position] ^= int(generator.integers(1, 256))
        with replaced(cache.folder / name, bytes(flipped)):
            found_by_verify(cache, name, position)
            count += refused(cache)
    return count


def test_a_whole_cache(cache: SmallCache) -> None:
    seen: list[int] = []
    report = verify(cache.folder, seen.append)
    assert report.problems == ()
    assert (report.examples, report.bytes) == (8, cache.manifest.bytes)
    assert sum(seen) == cache.manifest.bytes == sum(path.stat().st_size for path in cache.files if path.name != MANIFEST_FILE)
    assert report.seconds > 0
    read_all(cache)


@pytest.mark.parametrize("name", FILES)
def test_some_bytes_flipped(cache: SmallCache, name: str) -> None:
    refusals = flip_bytes(cache, name, step=23)
    # What reading does not see is never used: the second record of an example, and the index's order.
    assert refusals > 10 if name != SHARED_FILE else refusals > 3


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_every_byte_flipped(cache: SmallCache, name: str) -> None:
    assert flip_bytes(cache, name, step=1) > 0


@pytest.mark.parametrize("name", FILES)
def test_cut_and_extended(cache: SmallCache, name: str) -> None:
    data = (cache.folder / name).read_bytes()
    generator = np.random.default_rng(3)
    lengths = {0, 1, 7, 8, 9, len(data) - 1, len(data) - 8, *generator.integers(0, len(data), 20).tolist()}
    for changed in [
        *(data[:length] for length in lengths),
        data + b"\0",
        data + bytes(8),
        data + data,
        b"\0" * len(data),
        data[8:],
        b" " + data,
    ]:
        with replaced(cache.folder / name, changed):
            found_by_verify(cache, name, len(changed))
            assert refused(cache), len(changed)


@pytest.mark.parametrize("name", FILES)
def test_regions_swapped(cache: SmallCache, name: str) -> None:
    data = (cache.folder / name).read_bytes()
    generator = np.random.default_rng(4)
    tried = 0
    while tried < 60:
        size = int(generator.choice([1, 2, 4, 8, 16, 64]))
        first, second = sorted(generator.integers(0, len(data) - size + 1, 2).tolist())
        swapped = bytearray(data)
        swapped[first : first + size], swapped[second : second + size] = data[second : second + size], data[first : first + size]
        if second - first < size or swapped == data:
            continue
        tried += 1
        with replaced(cache.folder / name, bytes(swapped)):
            found_by_verify(cache, name, (first, second, size))
            refused(cache)


@pytest.mark.parametrize("name", TENSOR_FILES)
def test_length_of_the_header(cache: SmallCache, name: str) -> None:
    data = (cache.folder / name).read_bytes()
    for length in (0, 1, 2, 9, 2**16, 2**24 + 1, 2**31, 2**32 + 8, 2**63, 2**64 - 1):
        with replaced(cache.folder / name, length.to_bytes(8, "little") + data[8:]):
            found_by_verify(cache, name, length)
            assert refused(cache), length


Header = dict[str, Any]


def _set(tensor: int, field: str, value: object) -> Callable[[Header], None]:
    def edit(header: Header) -> None:
        header[_names(header)[tensor]][field] = value

    return edit


def _names(header: Header) -> list[str]:
    return [name for name in header if name != "__metadata__"]


def _shift(by: int) -> Callable[[Header], None]:
    def edit(header: Header) -> None:
        tensor = header[_names(header)[-1]]
        tensor["data_offsets"] = [offset + by for offset in tensor["data_offsets"]]

    return edit


def _rename(header: Header) -> None:
    header["other"] = header.pop(_names(header)[0])


def _remove(header: Header) -> None:
    header.pop(_names(header)[-1])


def _add(header: Header) -> None:
    header["other"] = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}


def _transpose(header: Header) -> None:
    tensor = header[_names(header)[0]]
    tensor["shape"] = [*tensor["shape"], 1]


def _overlap(header: Header) -> None:
    header[_names(header)[-1]]["data_offsets"] = [0, 1]


def _metadata(header: Header) -> None:
    header["__metadata__"]["more"] = "x"


def _metadata_number(header: Header) -> None:
    header["__metadata__"] = {"groups": 1}


def _no_metadata(header: Header) -> None:
    header.pop("__metadata__", None)


EDITS: dict[str, Callable[[Header], None]] = {
    "dtype unknown": _set(0, "dtype", "F8"),
    "dtype of the same width": _set(0, "dtype", "I64"),
    "dtype no text": _set(0, "dtype", None),
    "shape absurd": _set(0, "shape", [2**62, 2**62]),
    "shape overflowing to nothing": _set(0, "shape", [2**32, 2**32]),
    "shape with nothing": _set(0, "shape", [0, 2**62]),
    "shape negative": _set(0, "shape", [-1]),
    "shape of floats": _set(0, "shape", [1.0]),
    "shape of booleans": _set(0, "shape", [True]),
    "shape of text": _set(0, "shape", "12"),
    "shape without end": _set(0, "shape", [1] * 100),
    "shape transposed": _transpose,
    "offsets absurd": _set(-1, "data_offsets", [2**63, 2**64]),
    "offsets enormous": _set(-1, "data_offsets", [0, 10**400]),
    "offsets falling": _set(-1, "data_offsets", [8, 0]),
    "offsets negative": _set(-1, "data_offsets", [-8, 0]),
    "offsets one": _set(-1, "data_offsets", [0]),
    "offsets nested": _set(-1, "data_offsets", [[0], [1]]),
    "offsets shifted": _shift(1),
    "offsets shifted back": _shift(-1),
    "offsets overlapping": _overlap,
    "field more": _set(0, "extra", 1),
    "tensor renamed": _rename,
    "tensor removed": _remove,
    "tensor added": _add,
    "tensor no object": lambda header: header.update({_names(header)[0]: [1, 2]}),
    "metadata more": _metadata,
    "metadata no text": _metadata_number,
    "metadata none": _no_metadata,
}


def with_header(data: bytes, header: bytes) -> bytes:
    length = int.from_bytes(data[:8], "little")
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + data[8 + length :]


@pytest.mark.parametrize("name", TENSOR_FILES)
def test_header_edited(cache: SmallCache, name: str) -> None:
    data = (cache.folder / name).read_bytes()
    for edit, change in EDITS.items():
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        change(header)
        with replaced(cache.folder / name, with_header(data, json.dumps(header, separators=(",", ":")).encode())):
            found_by_verify(cache, name, edit)
            assert refused(cache), edit


@pytest.mark.parametrize("name", TENSOR_FILES)
def test_header_is_something_else(cache: SmallCache, name: str) -> None:
    odd = [b"", b"{}", b"[]", b"null", b"NaN", b'"', b"\xff\xfe", b"[" * 100_000, b'{"a":' * 50_000, b'{"a": 1e999}', b"1" * 10_000]
    odd += [b'{"__metadata__": {}}', b'{"keys": {}, "keys": {}}', b'{"__metadata__": {"a": "\\ud800"}}']
    for header in odd:
        with replaced(cache.folder / name, with_header((cache.folder / name).read_bytes(), header)):
            found_by_verify(cache, name, header[:10])
            assert refused(cache), header[:10]


def test_shards_exchanged(cache: SmallCache) -> None:
    first, second = (cache.folder / shard_name(number) for number in range(2))
    data = first.read_bytes()
    with replaced(first, second.read_bytes()), replaced(second, data):
        found_by_verify(cache, first.name, "exchanged")
        assert refused(cache)


def test_a_shard_of_another_teacher_for_the_same_examples(cache: SmallCache, tmp_path: Path) -> None:
    """Same keys, same sizes, every checksum right in itself: only the seal in the manifest tells."""
    values, counts = random_shard(np.random.default_rng(0), 5)
    values["logits.values"] = values["logits.values"] + 1
    other = tmp_path / "other"
    other.mkdir()
    info = write_shard(other / shard_name(0), cache.keys_of(0), COLUMNS, values, counts)
    assert info.bytes == cache.manifest.shards[0].bytes
    with replaced(cache.folder / shard_name(0), (other / shard_name(0)).read_bytes()):
        found_by_verify(cache, shard_name(0), "foreign")
        with pytest.raises(CacheError, match="seal"):
            read_all(cache)


@pytest.mark.parametrize("name", TENSOR_FILES)
def test_missing_linked_folder_pipe(cache: SmallCache, name: str, tmp_path: Path) -> None:
    path, aside = cache.folder / name, tmp_path / "aside"
    shutil.move(path, aside)
    for put in (lambda: None, lambda: path.symlink_to(aside), lambda: path.mkdir(), lambda: os.mkfifo(path)):
        put()
        found_by_verify(cache, name, put)
        assert refused(cache)
        if path.is_dir():
            path.rmdir()
        else:
            path.unlink(missing_ok=True)


def test_an_index_that_leads_astray(cache: SmallCache) -> None:
    """Well-formed, and the manifest has its hash: found by holding it against the shards, and by the key that a record is read with."""
    keys = [cache.keys_of(number) for number in range(2)]
    index = write_index(cache.folder / INDEX_FILE, [keys[0][::-1].copy(), keys[1]])
    values = {field: getattr(cache.manifest, field) for field in cache.manifest.__dataclass_fields__}
    cache.manifest = Manifest(**{**values, "index": index.hash})
    cache.manifest.save(cache.folder)
    problems = verify(cache.folder).problems
    assert any("does not know where" in problem for problem in problems)
    assert any("lead to no record" in problem for problem in problems)
    with pytest.raises(CacheError, match="do not belong together"):
        read_all(cache)


def test_many_damaged_records_are_counted(cache: SmallCache) -> None:
    path = cache.folder / shard_name(0)
    data = bytearray(path.read_bytes())
    length = 8 + int.from_bytes(data[:8], "little")
    begin, end = json.loads(data[8:length])["logits.values"]["data_offsets"]
    data[length + begin : length + end] = bytes(end - begin)
    with replaced(path, bytes(data)):
        problems = verify(cache.folder).problems
    assert len([problem for problem in problems if "its checksum is" in problem]) == 5


def test_not_finished(cache: SmallCache) -> None:
    (cache.folder / MANIFEST_FILE).unlink()
    (problem,) = verify(cache.folder).problems
    assert "no manifest.json" in problem
    assert refused(cache)
