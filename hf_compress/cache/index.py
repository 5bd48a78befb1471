"""Where the record of an example is: sorted keys, searched in the file itself.

    keys     (examples, 2) uint64     sorted by high word, then by low word; none twice
    places   (examples,) uint64       number of the shard << 32 | record in it

That is 24 bytes an example, mapped and never read whole: a search touches some pages of them, and no memory grows with their number.
A damaged index cannot give a wrong record in silence as long as the key goes along to the shard, which knows whose each record is
(`Shard.record(..., key=)`).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from hf_compress.cache.files import hash_file
from hf_compress.cache.tensor_file import TensorFile, file_bytes, write_tensor_file
from hf_compress.errors import CacheError

Keys = npt.NDArray[np.uint64]
_KIND = {"kind": "hf_compress teacher cache, index, version 1"}
_STEPS, _REACH = 2, 16  # of the search: guesses mended, and the rows looked at on either side of the last one
_WINDOW = np.arange(2 * _REACH)


@dataclass(frozen=True)
class IndexInfo:
    """What the manifest says of the index: its examples, its size in bytes, and xxh3_128 over all of it."""

    examples: int
    bytes: int
    hash: str


def write_index(path: Path, keys: Iterable[Keys]) -> IndexInfo:
    """Write the index of some shards; it takes some 60 bytes of memory a record.

    Args:
        path: the file.
        keys: of each shard in order, (records, 2) uint64. Of examples that have several records the first is kept.

    Raises:
        CacheError: if there are no keys, or the file cannot be written.
    """
    parts = [np.asarray(part) for part in keys]
    for number, part in enumerate(parts):
        if part.dtype != np.uint64 or part.ndim != 2 or part.shape[1] != 2:
            raise CacheError(f"{path.name}: the keys of shard {number} are {part.dtype} {part.shape}; expected uint64 (records, 2).")
    if not sum(map(len, parts)):
        raise CacheError(f"{path.name}: there are no records to find; a cache has one at least.")
    places = np.concatenate([_places(number, len(part)) for number, part in enumerate(parts)])
    return _write(path, np.concatenate(parts), places)


def write_longer_index(path: Path, index: Index, keys: Keys, shard: int) -> IndexInfo:
    """Write the index of a cache that one more shard was appended to.

    Args:
        path: the file; not that of `index`.
        index: of the cache before.
        keys: of the new shard, (records, 2) uint64.
        shard: its number.

    Raises:
        CacheError: if the file cannot be written.
    """
    return _write(path, np.concatenate([index.keys, keys]), np.concatenate([index.places, _places(shard, len(keys))]))


def _places(shard: int, records: int) -> Keys:
    return np.arange(records, dtype=np.uint64) | np.uint64(shard << 32)


def _write(path: Path, everything: Keys, places: Keys) -> IndexInfo:
    order = np.lexsort((everything[:, 1], everything[:, 0]))  # stable: of equal keys the first comes first
    everything, places = everything[order], places[order]
    first = np.ones(len(everything), bool)
    first[1:] = (everything[1:] != everything[:-1]).any(1)
    if not first.all():
        everything, places = everything[first], places[first]
    file = write_tensor_file(path, {"keys": ("uint64", everything), "places": ("uint64", places)}, _KIND)
    return IndexInfo(len(everything), file.bytes, file.hash)


def index_bytes(examples: int) -> int:
    """How large the index of so many examples is."""
    return file_bytes({"keys": ("uint64", (examples, 2)), "places": ("uint64", (examples,))}, _KIND)


def longer_index_name(shards: int) -> str:
    """The file's name of the index of a cache that shards were appended to, and that has so many now: a name of its own each time."""
    return f"index-{shards:05d}.safetensors"


def split_places(places: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Places that `find` found -> number of the shard, record in it."""
    return places >> 32, places & 0xFFFFFFFF


class Index:
    """An open index.

    Attributes:
        path: the file.
        keys: (examples, 2) uint64, a view of the file.
        places: (examples,) uint64, a view of the file.
    """

    def __init__(self, file: TensorFile) -> None:
        self.path = file.path
        self.keys: Keys = file.array("keys")
        self.places: Keys = file.array("places")
        self._high: Keys = self.keys[:, 0]

    @classmethod
    def open(cls, path: Path, examples: int, expected_hash: str | None = None) -> Index:
        """Open an index and hold its header against its size.

        Args:
            path: the file.
            examples: how many it must know.
            expected_hash: xxh3_128 of the file, to read it whole and compare; None leaves that to `verify`.

        Raises:
            CacheError: if it is missing, no regular file, damaged, or another cache's.
        """
        file = TensorFile(path)
        file.expect({"keys": ("uint64", (examples, 2)), "places": ("uint64", (examples,))}, _KIND)
        if expected_hash is not None and (found := hash_file(path).hash) != expected_hash:
            raise file.damaged("hash", found, expected_hash)
        return cls(file)

    def __len__(self) -> int:
        return len(self.places)

    def find(self, keys: Keys) -> npt.NDArray[np.int64]:
        """Look some examples up.

        Args:
            keys: (examples, 2) uint64.

        Returns:
            (examples,) int64 places, -1 where an example is not there.

        Raises:
            CacheError: if a place that was found cannot be one.
        """
        at = self._first_not_below(np.ascontiguousarray(keys[:, 0]))
        at[at == len(self)] = 0
        found = self.keys[at]
        right = (found == keys).all(1)
        if not right.all():
            same_high = found[:, 0] == keys[:, 0]
            for row in np.flatnonzero(same_high & ~right).tolist():  # two examples with the same 64 bits: hardly ever
                at[row] = self._find_low(int(at[row]), keys[row])
                right[row] = (self.keys[at[row]] == keys[row]).all()
        places = self.places[at].astype(np.int64)
        if (places[right] < 0).any():
            raise CacheError(f"{self.path} is damaged: it tells of a shard of a number above {2**31}. Build the cache again.")
        places[~right] = -1
        return places

    def _first_not_below(self, high: Keys) -> npt.NDArray[np.int64]:
        """Where the first key lies whose high word is not below each of `high`; the number of examples, if none is.

        A bisection of 10 million keys touches some 12 distant pages for each example looked up. Keys are hashes, so their place can be
        guessed from their value, and the guess be mended from the key found there: an error of e rows becomes one of about sqrt(e).
        What the guess does not bracket in the end, as where keys are no hashes, is bisected.
        """
        examples, wanted = len(self), high.astype(np.float64)
        rows_by_value = examples * 2.0**-64
        guess = wanted * rows_by_value
        for _ in range(_STEPS):
            found = self._high[np.minimum(guess, examples - 1).astype(np.int64)]
            guess += (wanted - found) * rows_by_value
            np.maximum(guess, 0, out=guess)
        begin = np.clip(guess.astype(np.int64) - _REACH, 0, max(0, examples - len(_WINDOW)))
        window = self._high[begin[:, None] + _WINDOW[:examples]]
        below = (window < high[:, None]).sum(1)
        at: npt.NDArray[np.int64] = begin + below
        # At a window's edge the key may lie beyond it, unless there is no beyond.
        unsure = ((below == 0) & (begin > 0)) | ((below == window.shape[1]) & (at < examples))
        if unsure.any():
            # Strided, and still searched where it lies: numpy copies only what is smaller than the needles.
            at[unsure] = self._high.searchsorted(high[unsure])
        return at

    def _find_low(self, begin: int, key: Keys) -> int:
        end = int(self._high.searchsorted(key[0], side="right"))
        return min(begin + int(self.keys[begin:end, 1].searchsorted(key[1])), end - 1)
