"""Shards: what is written is read back as views, by this package and by the safetensors library, and each record's checksum is its own."""

from __future__ import annotations

import struct
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import xxhash
from safetensors import safe_open

from hf_compress.cache.shard import Column, ShardInfo, is_shard_name, offsets_dtype, shard_name, write_shard
from hf_compress.cache.shard_reader import Shard, read_shard_info
from hf_compress.errors import CacheError
from tests.cache.small_cache import COLUMNS, random_keys, random_shard, same, slices

Written = tuple[Path, ShardInfo, Any, Any, Any]


@pytest.fixture
def written(tmp_path: Path) -> Written:
    generator = np.random.default_rng(0)
    keys = random_keys(generator, 6)
    values, counts = random_shard(generator, 6)
    path = tmp_path / shard_name(3)
    return path, write_shard(path, keys, COLUMNS, values, counts), keys, values, counts


def test_records(written: Written) -> None:
    path, info, keys, values, counts = written
    shard = Shard.open(path, info, COLUMNS)
    assert len(shard) == 6 and (shard.keys == keys).all()
    expected = [slices(values, counts, row) for row in range(6)]
    assert len(expected[0]["hidden_states.layers.2.values"]) == 0
    for row in range(6):
        same(shard.record(row), expected[row])
        same(shard.record(row, verify=False), expected[row])
        assert shard.counts(row) == {group: count[row] for group, count in counts.items()}
    rows = [5, 0, 0, 3]
    for found, row in zip(shard.records(rows, keys=keys[rows]), rows, strict=True):
        same(found, expected[row])
    (some,) = shard.records(np.array([2]), ("logits.values",))
    same(some, {"logits.values": expected[2]["logits.values"]})
    assert shard.record(1, ()) == {} and shard.records([]) == []


def test_views_of_the_file(written: Written) -> None:
    path, info, *_ = written
    values = Shard.open(path, info, COLUMNS).record(2)["logits.values"]
    assert not values.flags.owndata and not values.flags.writeable and values.flags.aligned
    with pytest.raises(ValueError, match="read-only"):
        values[:] = 0


def test_info(written: Written) -> None:
    path, info, _, _, counts = written
    assert (info.name, info.examples) == ("shard-00003.safetensors", 6)
    assert info.rows == {group: count.sum() for group, count in counts.items()}
    assert info.bytes == path.stat().st_size and info.hash == xxhash.xxh3_128_hexdigest(path.read_bytes())
    assert read_shard_info(path, COLUMNS) == info


def test_the_safetensors_library_reads_it(written: Written) -> None:
    path, _, keys, values, counts = written
    loaded = safetensors.torch.load_file(path)
    assert loaded["hidden_states.layers.4.values"].dtype == torch.bfloat16
    assert (loaded["hidden_states.layers.4.values"].view(torch.uint16).numpy() == values["hidden_states.layers.4.values"]).all()
    assert (loaded["rows.tokens.layers"].numpy() == np.cumsum([0, *counts["tokens.layers"]])).all()
    with safe_open(path, "numpy") as file:
        assert file.metadata()["groups"].startswith('{"hidden_states.layers.2.positions":"selected.layers.2"')
        assert (file.get_tensor("keys") == keys).all()
        assert (file.get_tensor("logits.values") == values["logits.values"]).all()
        assert len(list(file.keys())) == 4 + len(COLUMNS)


def test_checksums_as_the_readme_defines_them(written: Written) -> None:
    path, _, keys, values, counts = written
    checksums = safetensors.torch.load_file(path)["checksums"].view(torch.int64).numpy().view(np.uint64)
    for row, key in enumerate(keys.tolist()):
        record = slices(values, counts, row)
        text = struct.pack("<4Q", *key, counts["selected.layers.2"][row], counts["tokens.layers"][row])
        text += b"".join(record[name].tobytes() for name in sorted(record))
        assert checksums[row] == xxhash.xxh3_64_intdigest(text)


def test_every_byte_of_a_record_is_checked(written: Written) -> None:
    """With no manifest, so with no seal: the checksum alone."""
    path, *_ = written
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    for position in range(start, len(data)):
        flipped = bytearray(data)
        flipped[position] ^= 16
        path.unlink()
        path.write_bytes(flipped)
        with pytest.raises(CacheError, match="shard-00003"):
            read_shard_info(path, COLUMNS)


def test_what_a_damaged_record_says(written: Written) -> None:
    path, info, keys, values, _ = written
    data = path.read_bytes()
    where = data.index(values["logits.values"].tobytes()) + 8 * 4
    path.unlink()
    path.write_bytes(data[:where] + b"\xff" + data[where + 1 :])
    shard = Shard.open(path, info, COLUMNS)
    for read in (lambda: shard.record(4), lambda: shard.records([0, 4]), lambda: shard.record(4, ("hidden_states.layers.2.values",))):
        with pytest.raises(CacheError, match=f"shard-00003.*record 4, of the example {keys[4, 0]:016x}{keys[4, 1]:016x}.*checksum"):
            read()
    assert shard.damaged_rows() == [4]
    assert shard.record(4, verify=False)["logits.values"].shape == (1, 2)
    shard.record(3)


def test_another_example(written: Written) -> None:
    path, info, keys, *_ = written
    shard = Shard.open(path, info, COLUMNS)
    with pytest.raises(CacheError, match="do not belong together"):
        shard.record(0, key=tuple(keys[1].tolist()))
    with pytest.raises(CacheError, match=f"record 2 is of the example {keys[2, 0]:016x}"):
        shard.records([1, 2], keys=keys[[1, 1]])


@pytest.mark.parametrize("row", [-1, 6, 2**31])
def test_no_such_record(written: Written, row: int) -> None:
    path, info, *_ = written
    shard = Shard.open(path, info, COLUMNS)
    for read in (shard.record, shard.counts, lambda number: shard.records([number])):
        with pytest.raises(CacheError, match=f"has 6 records; there is no record {row}"):
            read(row)


def test_no_such_column(written: Written) -> None:
    path, info, *_ = written
    with pytest.raises(CacheError, match="no column 'other'; it has hidden_states"):
        Shard.open(path, info, COLUMNS).record(0, ("other",))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"examples": 7}, r"keys\.shape\[0\]: found 6, expected 7"),
        ({"bytes": 1}, "size is .*; expected 1, as the manifest"),
        ({"seal": "0" * 32}, "seal .* expected 0000"),
        ({"rows": {"tokens.layers": 14, "selected.layers.2": 3}}, "found .* expected"),
        ({"rows": {"tokens.layers": 14}}, "groups"),
    ],
)
def test_another_shard_than_the_manifest_means(written: Written, change: dict[str, Any], message: str) -> None:
    path, info, *_ = written
    with pytest.raises(CacheError, match=message):
        Shard.open(path, replace(info, **change), COLUMNS)


@pytest.mark.parametrize(
    "change", [{"dtype": "bfloat16"}, {"item": (3, 1)}, {"item": (2,)}, {"name": "b"}, {"group": "tokens.layers"}, {"group": ""}]
)
def test_other_columns(written: Written, change: dict[str, Any]) -> None:
    path, info, *_ = written
    with pytest.raises(CacheError, match=r"damaged or from another cache: .*found .*, expected"):
        Shard.open(path, info, (replace(COLUMNS[0], **change), *COLUMNS[1:]))


def test_fewer_and_more_columns(written: Written) -> None:
    path, info, *_ = written
    for columns in (COLUMNS[1:], (*COLUMNS, Column("more", "", "uint8", ()))):
        with pytest.raises(CacheError, match="damaged or from another cache"):
            Shard.open(path, info, columns)


def test_missing(tmp_path: Path) -> None:
    with pytest.raises(CacheError, match=r"shard-00000\.safetensors is missing"):
        Shard.open(tmp_path / shard_name(0), None, COLUMNS)


def test_a_group_without_columns_and_columns_without_groups(tmp_path: Path) -> None:
    path, keys = tmp_path / shard_name(0), np.arange(6, dtype=np.uint64).reshape(3, 2)
    columns = [Column("a", "", "int8", (2,)), Column("empty", "none", "float32", (0,)), Column("also", "none", "uint8", (4,))]
    values = {"a": np.arange(6, dtype=np.int8).reshape(3, 2), "empty": np.ones((0, 0), np.float32), "also": np.ones((0, 4), np.uint8)}
    info = write_shard(path, keys, columns, values, {"none": np.zeros(3, np.int64), "tokens": np.array([4, 5, 6])})
    shard = Shard.open(path, info, columns)
    assert shard.record(1)["a"].tolist() == [[2, 3]] and shard.record(1)["empty"].shape == (0, 0)
    assert shard.counts(2) == {"none": 0, "tokens": 6}
    assert safetensors.torch.load_file(path)["empty"].shape == (0, 0)
    write_shard(path, keys, columns[:1], {"a": values["a"]}, {})
    assert Shard.open(path, None, columns[:1]).records([2, 0])[0]["a"].tolist() == [[4, 5]]


def test_arrays_that_are_not_contiguous(tmp_path: Path) -> None:
    path, keys = tmp_path / shard_name(0), np.arange(8, dtype=np.uint64).reshape(2, 4)[:, ::2].copy()
    wide = np.random.default_rng(0).normal(size=(2, 3, 4, 500)).astype(np.float32).transpose(0, 2, 1, 3)[:, ::2]
    column = Column("a", "", "float32", (2, 3, 500))
    info = write_shard(path, keys, [column], {"a": wide}, {})
    assert (Shard.open(path, info, [column]).record(1)["a"][0] == wide[1]).all()


def test_writing_takes_no_second_copy(tmp_path: Path) -> None:
    values = {name: np.ones((1000, 5000), np.float32) for name in ("a", "b")}
    columns = [Column(name, "", "float32", (5000,)) for name in values]
    keys = random_keys(np.random.default_rng(0), 1000)
    tracemalloc.start()
    try:
        write_shard(tmp_path / shard_name(0), keys, columns, values, {})
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < values["a"].nbytes / 20


def test_reading_takes_no_memory(tmp_path: Path) -> None:
    path, column = tmp_path / shard_name(0), Column("a", "", "float32", (100_000,))
    info = write_shard(path, random_keys(np.random.default_rng(0), 50), [column], {"a": np.ones((50, 100_000), np.float32)}, {})
    shard = Shard.open(path, info, [column])
    tracemalloc.start()
    try:
        records = shard.records(range(50))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(records) == 50 and peak < 100_000


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"keys": np.zeros((6, 2), np.int64)}, "keys are int64"),
        ({"keys": np.zeros((6, 3), np.uint64)}, r"keys are uint64 \(6, 3\)"),
        ({"keys": np.zeros((0, 2), np.uint64)}, "one record at least"),
        ({"logits.values": np.zeros((5, 2), np.float32)}, r"'logits.values' are float32 \(5, 2\); expected float32 \(6, 2\)"),
        ({"logits.values": np.zeros((6, 2), np.float64)}, "are float64"),
        ({"logits.values": np.zeros((6, 2), ">f4")}, "are >f4"),
        ({"logits.values": None}, "no values for the column 'logits.values'"),
        ({"more": np.zeros(6)}, "values for more, which is no column"),
        ({"counts:tokens.layers": None}, "no counts for the group 'tokens.layers'"),
        ({"counts:tokens.layers": np.zeros(6, np.float32)}, "counts of 'tokens.layers' are float32"),
        ({"counts:tokens.layers": np.full(6, -1)}, "from 0"),
        ({"counts:tokens.layers": np.ones(5, int)}, r"\(5,\)"),
        ({"counts:a/b": np.ones(6, int)}, "cannot be called 'a/b'"),
        ({"counts:": np.ones(6, int)}, "cannot be called ''"),
    ],
)
def test_values_that_do_not_fit(written: Written, change: dict[str, Any], message: str) -> None:
    path, _, keys, values, counts = written
    before = path.read_bytes()
    values, counts = dict(values), dict(counts)
    for name, value in change.items():
        where = counts if name.startswith("counts:") else values
        if name == "keys":
            keys = value
        elif value is None:
            del where[name.removeprefix("counts:")]
        else:
            where[name.removeprefix("counts:")] = value
    with pytest.raises(CacheError, match=message):
        write_shard(path, keys, COLUMNS, values, counts)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    "arguments",
    [
        ("keys", "", "int8", ()),
        ("rows.a", "", "int8", ()),
        ("__metadata__", "", "int8", ()),
        ("a/b", "", "int8", ()),
        ("", "", "int8", ()),
        ("a\n", "", "int8", ()),
        ("a", "../b", "int8", ()),
        ("a", "", "bool", ()),
        ("a", "", "int8", (-1,)),
        ("a", "", "int8", (True,)),
    ],
)
def test_columns_that_cannot_be(arguments: tuple[Any, ...]) -> None:
    with pytest.raises(CacheError):
        Column(*arguments)


def test_columns_twice_or_none(tmp_path: Path) -> None:
    keys, column = np.ones((1, 2), np.uint64), Column("a", "", "uint8", ())
    for columns, message in (([column, column], "a twice"), ([], "none")):
        with pytest.raises(CacheError, match=message):
            write_shard(tmp_path / shard_name(0), keys, columns, {"a": np.ones(1, np.uint8)}, {})


@pytest.mark.parametrize(
    ("codec", "kept", "expected"), [("float16", False, 1600), ("int8", False, 880), ("float16", True, 2580), ("int8", True, 1852)]
)
def test_bytes_an_example_as_the_readme_counts_them(tmp_path: Path, codec: str, kept: bool, expected: int) -> None:
    """`1l_10t_0.1h` of a teacher 768 wide, two classes; `kept`: the numbers that magnitude keeps, and which they are."""
    examples, name = 1000, "hidden_states.layers.10"
    columns = [Column(f"{name}.positions", "selected.layers", "uint16", ()), Column("logits.values", "", "float32", (2,))]
    counts = {"selected.layers": np.full(examples, 10)}
    if kept:
        columns += [Column(f"{name}.mask", "selected.layers", "uint8", (96,)), Column(f"{name}.values", "kept.layers", codec, ())]
        counts["kept.layers"] = np.full(examples, 768)
    else:
        columns += [Column(f"{name}.values", "selected.layers", codec, (76,))]
    if codec == "int8":
        columns += [Column(f"{name}.scales", "selected.layers", "float32", ())]
    rows = {"selected.layers": 10 * examples, "kept.layers": 768 * examples, "": examples}
    values = {column.name: np.zeros((rows[column.group], *column.item), column.dtype) for column in columns}
    info = write_shard(tmp_path / shard_name(0), random_keys(np.random.default_rng(0), examples), columns, values, counts)
    assert expected <= info.bytes / examples + 24 < expected + 2  # and the header


def test_names_and_sizes() -> None:
    assert shard_name(12) == "shard-00012.safetensors" and shard_name(123456) == "shard-123456.safetensors"
    assert (
        is_shard_name(shard_name(123456))
        and not is_shard_name("shard-00012.safetensors.0123abcd.tmp")
        and not is_shard_name("shard-1.safetensors")
    )
    assert offsets_dtype(2**32 - 1) == "uint32" and offsets_dtype(2**32) == "uint64"
    assert Column("a", "", "bfloat16", (3, 4)).row_bytes == 24
