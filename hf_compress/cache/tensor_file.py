"""One safetensors file, written as a stream and read with every number in its header doubted.

    8 bytes   length of the header, little endian
    header    JSON: {"__metadata__": {str: str}, name: {"dtype": "F16", "shape": [3, 4], "data_offsets": [begin, end]}, ...}, then spaces
              until its length is a multiple of 8
    data      the tensors without gaps, those of wide items first, so that each one is aligned

The safetensors library reads these files too. It is not used here: it checks less (a file may be longer than its header says), copies the
file where it should be mapped, and holds all tensors in memory to write them.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from hf_compress.cache.files import FileInfo, atomic_file, hash_file, map_file
from hf_compress.cache.strict_json import Fields, difference, parse
from hf_compress.errors import CacheError

Dtype = Literal["float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint64", "uint32", "uint16", "uint8"]
Array = npt.NDArray[Any]

# name -> (safetensors' name, numpy's): numpy has no bfloat16, so its bits travel as uint16.
_DTYPES: dict[str, tuple[str, np.dtype[Any]]] = {
    "float64": ("F64", np.dtype("<f8")),
    "float32": ("F32", np.dtype("<f4")),
    "float16": ("F16", np.dtype("<f2")),
    "bfloat16": ("BF16", np.dtype("<u2")),
    "int64": ("I64", np.dtype("<i8")),
    "int32": ("I32", np.dtype("<i4")),
    "int16": ("I16", np.dtype("<i2")),
    "int8": ("I8", np.dtype("i1")),
    "uint64": ("U64", np.dtype("<u8")),
    "uint32": ("U32", np.dtype("<u4")),
    "uint16": ("U16", np.dtype("<u2")),
    "uint8": ("U8", np.dtype("u1")),
}
_NAMES = {code: name for name, (code, _) in _DTYPES.items()}
_LONGEST_HEADER = 1 << 24
_MOST_DIMENSIONS = 8
_METADATA = "__metadata__"
assert set(_DTYPES) == set(get_args(Dtype))


def storage(dtype: str) -> np.dtype[Any]:
    """The numpy type that holds `dtype`.

    Raises:
        CacheError: if there is none of that name.
    """
    if dtype not in _DTYPES:
        raise CacheError(f"There is no dtype {dtype!r}; there are {', '.join(_DTYPES)}.")
    return _DTYPES[dtype][1]


@dataclass(frozen=True)
class Tensor:
    """One tensor of a file: its type, its shape, and where it is among the data, in bytes."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def write_tensor_file(path: Path, tensors: Mapping[str, tuple[str, Array]], metadata: Mapping[str, str] | None = None) -> FileInfo:
    """Write tensors to a file that is whole or not there; no tensor is held in memory twice.

    Args:
        path: the file.
        tensors: by name, the dtype's name and the values; bfloat16 as its bits, uint16.
        metadata: text by name.

    Raises:
        CacheError: if values do not have the type they are said to have, or the file cannot be written.
    """
    for name, (dtype, values) in tensors.items():
        if values.dtype != storage(dtype):
            raise CacheError(f"{path.name}: the tensor {name!r} is {values.dtype}; expected {storage(dtype)}, which holds {dtype}.")
    places = _places({name: (dtype, values.shape) for name, (dtype, values) in tensors.items()})
    header = _header(places, metadata or {})
    with atomic_file(path, len(header) + sum(values.nbytes for _, values in tensors.values())) as file:
        file.write(header)
        for name in places:
            for part in _parts(tensors[name][1]):
                file.write(part)
    return file.info


def file_bytes(tensors: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, str] | None = None) -> int:
    """How large a file `write_tensor_file` makes of tensors of these types and shapes."""
    places = _places(tensors)
    return len(_header(places, metadata or {})) + max((place.end for place in places.values()), default=0)


def read_tensors(path: Path, expected: str) -> dict[str, Array]:
    """Read all tensors of a small file, whose hash is checked first.

    Args:
        path: the file.
        expected: its xxh3_128 as the manifest has it.

    Returns:
        Arrays by name, read-only, mapped to the file; bfloat16 as its bits, uint16.

    Raises:
        CacheError: if the file is not the one that was written.
    """
    found = hash_file(path).hash
    if found != expected:
        raise CacheError(f"{path} is damaged: its hash is {found}; expected {expected}, as the manifest says. Build the cache again.")
    file = TensorFile(path)
    return {name: file.array(name) for name in file.tensors}


class TensorFile:
    """A safetensors file, mapped into memory read-only, after its header was held against its size.

    Attributes:
        path: the file.
        size: its size in bytes.
        tensors: by name, in the order of the data.
        metadata: text by name.

    Raises:
        CacheError: if it is missing, is no regular file, or anything in its header is not as `write_tensor_file` writes it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._map = map_file(path, least=10)
        self.size = len(self._map)
        length = int.from_bytes(self._map[:8], "little")
        if not 2 <= length <= min(_LONGEST_HEADER, self.size - 8):
            raise self.damaged(
                "length of the header", length, f"at most {min(_LONGEST_HEADER, self.size - 8)}, as the file has {self.size} bytes"
            )
        self._start = 8 + length
        header = self._map[8 : self._start]
        fields = Fields(parse(header, f"The header of {path}"), f"The header of {path}")
        self.metadata = self._read_metadata(fields)
        self.tensors = dict(
            sorted(self._read_tensors(fields), key=lambda item: (item[1].begin, item[1].end, *_order(item[1].dtype, item[0])))
        )
        position = 0
        for name, tensor in self.tensors.items():
            if tensor.begin != position:
                raise self.damaged(f"begin of {name!r}", tensor.begin, f"{position}, where the tensor before it ends")
            position = tensor.end
        if self._start + position != self.size:
            raise self.damaged("size", self.size, f"{self._start + position} by its header")
        if self._map[: self._start] != _header(self.tensors, self.metadata):
            raise CacheError(f"{path} is damaged: its header is not written as hf_compress writes it. Build the cache again.")

    def array(self, name: str) -> Array:
        """A tensor's values as a read-only view of the file; bfloat16 as its bits, uint16."""
        tensor = self.tensors[name]
        flat = np.frombuffer(self._map, _DTYPES[tensor.dtype][1], math.prod(tensor.shape), self._start + tensor.begin)
        return flat.reshape(tensor.shape)

    def view(self, name: str) -> memoryview:
        """A tensor's bytes, as a view of the file."""
        tensor = self.tensors[name]
        return memoryview(self._map)[self._start + tensor.begin : self._start + tensor.end]

    def expect(self, tensors: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, str]) -> None:
        """Refuse a file that does not hold just these tensors, given as dtype and shape, and this metadata."""
        found = {name: {"dtype": tensor.dtype, "shape": tensor.shape} for name, tensor in self.tensors.items()}
        expected = {name: {"dtype": dtype, "shape": shape} for name, (dtype, shape) in tensors.items()}
        differs = difference(found, expected) or difference(self.metadata, metadata, "metadata")
        if differs:
            raise CacheError(f"{self.path} is damaged or from another cache: {differs}. Build the cache again.")

    def damaged(self, what: str, found: object, expected: object) -> CacheError:
        """The error that says so."""
        return CacheError(f"{self.path} is damaged: {what} is {found}; expected {expected}. Build the cache again.")

    def _read_metadata(self, fields: Fields) -> dict[str, str]:
        inner = fields.inner(_METADATA)
        return {name: inner.text(name, lambda text: True, "text") for name in inner.names}

    def _read_tensors(self, fields: Fields) -> Iterator[tuple[str, Tensor]]:
        for name in fields.names:
            if name == _METADATA:
                continue
            inner = fields.inner(name, ("dtype", "shape", "data_offsets"))
            dtype = _NAMES[inner.text("dtype", _NAMES.__contains__, f"one of {', '.join(_NAMES)}")]
            shape = tuple(inner.items("shape", _whole_number))
            offsets = inner.items("data_offsets", _whole_number)
            if len(shape) > _MOST_DIMENSIONS:
                raise self.damaged(f"number of dimensions of {name!r}", len(shape), f"at most {_MOST_DIMENSIONS}")
            data = self.size - self._start
            if len(offsets) != 2 or not 0 <= offsets[0] <= offsets[1] <= data:
                raise self.damaged(f"data_offsets of {name!r}", offsets, f"two numbers, rising, from 0 to {data}")
            needed = math.prod(shape) * _DTYPES[dtype][1].itemsize
            if offsets[1] - offsets[0] != needed:
                raise self.damaged(f"bytes of {name!r}", offsets[1] - offsets[0], f"{needed} for {dtype} {shape}")
            yield name, Tensor(dtype, shape, offsets[0], offsets[1])


def _places(tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> dict[str, Tensor]:
    """Where each tensor goes, of these types and shapes, in the order of the data."""
    places: dict[str, Tensor] = {}
    position = 0
    for name, (dtype, shape) in sorted(tensors.items(), key=lambda item: _order(item[1][0], item[0])):
        end = position + math.prod(shape) * storage(dtype).itemsize
        places[name] = Tensor(dtype, tuple(shape), position, end)
        position = end
    return places


def _order(dtype: str, name: str) -> tuple[int, str]:
    return -_DTYPES[dtype][1].itemsize, name


def _whole_number(value: object, where: str) -> int:
    return Fields({"": value}, where).count("")


def _header(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    content: dict[str, object] = {_METADATA: dict(sorted(metadata.items()))}
    for name, tensor in tensors.items():
        content[name] = {"dtype": _DTYPES[tensor.dtype][0], "shape": tensor.shape, "data_offsets": (tensor.begin, tensor.end)}
    text = json.dumps(content, separators=(",", ":")).encode("ascii")
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _parts(values: Array) -> Iterator[memoryview]:
    """The bytes of an array, in order; one that is not contiguous is copied in pieces."""
    if values.size == 0:
        return
    if values.flags.c_contiguous:
        yield values.reshape(-1).view(np.uint8).data
        return
    rows = max(1, (1 << 22) * len(values) // values.nbytes)
    for start in range(0, len(values), rows):
        yield np.ascontiguousarray(values[start : start + rows]).reshape(-1).view(np.uint8).data
