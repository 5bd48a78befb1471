"""Each doubt about a header has its own words; the files are the safetensors library's too."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from hf_compress.cache.shard import Column, shard_name, write_shard
from hf_compress.cache.shard_reader import Shard
from hf_compress.cache.tensor_file import TensorFile, read_tensors, write_tensor_file
from hf_compress.errors import CacheError

TENSORS = {"a": ("int8", np.arange(3, dtype=np.int8)), "b": ("float64", np.eye(2)), "c": ("int64", np.zeros((0, 4), np.int64))}


def put(path: Path, header: str | dict[str, Any], data: bytes) -> None:
    text = (header if isinstance(header, str) else json.dumps(header, separators=(",", ":"))).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def test_round_trip(tmp_path: Path) -> None:
    info = write_tensor_file(tmp_path / "a", TENSORS, {"more": "ü"})
    ours, theirs = read_tensors(tmp_path / "a", info.hash), load_file(tmp_path / "a")
    assert ours.keys() == theirs.keys() == TENSORS.keys()
    for name, (_, values) in TENSORS.items():
        assert ours[name].dtype == theirs[name].dtype == values.dtype
        assert ours[name].tolist() == theirs[name].tolist() == values.tolist()
        assert not ours[name].flags.writeable and ours[name].flags.aligned
    assert TensorFile(tmp_path / "a").metadata == {"more": "ü"}
    with pytest.raises(CacheError, match=f"its hash is {info.hash}; expected 00, as the manifest says"):
        read_tensors(tmp_path / "a", "00")


def test_values_of_another_type(tmp_path: Path) -> None:
    with pytest.raises(CacheError, match="'a' is float64; expected uint16, which holds bfloat16"):
        write_tensor_file(tmp_path / "a", {"a": ("bfloat16", np.eye(2))})
    with pytest.raises(CacheError, match="no dtype 'bool'"):
        write_tensor_file(tmp_path / "a", {"a": ("bool", np.ones(2, bool))})


def tensor(begin: int, end: int, dtype: str = "U8", **more: object) -> dict[str, object]:
    return {"dtype": dtype, "shape": [end - begin], "data_offsets": [begin, end], **more}


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"__metadata__": {}, "a": tensor(0, 8), "b": tensor(9, 12)}, "begin of 'b' is 9; expected 8, where the tensor before it ends"),
        ({"__metadata__": {}, "a": tensor(0, 8), "b": tensor(4, 12)}, "begin of 'b' is 4; expected 8"),
        ({"__metadata__": {}, "a": tensor(1, 12)}, "begin of 'a' is 1; expected 0"),
        ({"__metadata__": {}, "a": tensor(0, 11)}, "; expected \\d+ by its header"),
        ({"__metadata__": {}, "a": tensor(0, 13)}, r"data_offsets of 'a' is \[0, 13\]; expected two numbers, rising, from 0 to 12"),
        ({"__metadata__": {}, "a": {**tensor(0, 12), "shape": [11]}}, r"bytes of 'a' is 12; expected 11 for uint8 \(11,\)"),
        ({"__metadata__": {}, "a": {**tensor(0, 12), "shape": [2**32, 2**32]}}, r"bytes of 'a' is 12; expected 18446744073709551616"),
        ({"__metadata__": {}, "a": {**tensor(0, 12), "shape": [12] + [1] * 8}}, "number of dimensions of 'a' is 9; expected at most 8"),
        ({"__metadata__": {}, "a": {**tensor(0, 12), "shape": [-12]}}, r"shape\[0\] is -12; expected a whole number from 0"),
        ({"__metadata__": {}, "a": tensor(0, 12, "F8")}, "dtype is 'F8'; expected one of F64"),
        ({"__metadata__": {}, "a": tensor(0, 12, more=1)}, r"the fields \['more'\] are not known"),
        ({"a": tensor(0, 12)}, "__metadata__ is None; expected an object"),
        ({"__metadata__": {"a": 1}, "a": tensor(0, 12)}, "__metadata__: a is 1; expected text"),
        (json.dumps({"__metadata__": {}, "a": tensor(0, 12)}), "not written as hf_compress writes it"),  # spaces after commas
        ({"a": tensor(0, 12), "__metadata__": {}}, "not written as hf_compress writes it"),
        ('{"__metadata__":{"a":"b","a":"b"}}', "a key stands there twice"),
        ('{"__metadata__":{},"a":1e999}', "1e999 is too large a number"),
        ('{"__metadata__":{},"a":NaN}', "NaN is no number"),
        ("[1]", r"is \[1\]; expected an object"),
    ],
)
def test_doubts(tmp_path: Path, header: str | dict[str, Any], message: str) -> None:
    put(tmp_path / "a", header, bytes(12))
    with pytest.raises(CacheError, match=message) as caught:
        TensorFile(tmp_path / "a")
    assert str(tmp_path / "a") in str(caught.value)


def test_what_is_right_passes(tmp_path: Path) -> None:
    put(tmp_path / "a", {"__metadata__": {}, "a": tensor(0, 12)}, bytes(12))
    assert TensorFile(tmp_path / "a").array("a").tolist() == [0] * 12


def test_length_of_the_header(tmp_path: Path) -> None:
    for length in (1, 5, 2**24 + 8, 2**64 - 1):
        (tmp_path / "a").write_bytes(length.to_bytes(8, "little") + b"{}  ")
        with pytest.raises(CacheError, match=f"length of the header is {length}; expected at most 4, as the file has 12 bytes"):
            TensorFile(tmp_path / "a")


def test_a_file_of_the_library_is_not_ours(tmp_path: Path) -> None:
    save_file({"a": np.eye(2)}, tmp_path / "a")
    with pytest.raises(CacheError, match="__metadata__"):
        TensorFile(tmp_path / "a")


def test_offsets_of_a_shard_that_no_manifest_tells_of(tmp_path: Path) -> None:
    path, column = tmp_path / shard_name(0), Column("a", "group", "uint8", ())
    counts = {"group": np.array([2, 3])}
    write_shard(path, np.ones((2, 2), np.uint64), [column], {"a": np.arange(5, dtype=np.uint8)}, counts)
    data = path.read_bytes()
    offsets = data.index(np.array([0, 2, 5], "<u4").tobytes())
    for position, value, message in ((0, 1, "rows.group[0] is 1; expected 0"), (8, 4, "found 5, expected 4")):
        changed = bytearray(data)
        changed[offsets + position] = value
        path.unlink()
        path.write_bytes(changed)
        with pytest.raises(CacheError, match=re.escape(message)):
            Shard.open(path, None, [column])
