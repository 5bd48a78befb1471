"""The words that lie next to a word in a space of word vectors."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hf_compress.augmentation.settings import FIRST_VECTORS
from hf_compress.augmentation.vector_file import read_vectors
from hf_compress.augmentation.words import is_whole_word

_BLOCK_BYTES = 1 << 26  # similarities at a time
_SPARE = 64  # more neighbours are looked at than are wanted: float32 chooses them, float64 their order, and some are no words


class WordVectors:
    """Word vectors, and the nearest neighbours of words among them by cosine.

    Args:
        path: a text file of GloVe or word2vec. It is read once, into a file beside it, `NAME.mapped`, that is mapped into memory.
        num_candidates: K.
        as_released: among the first 100,000 words only, and what is no word (punctuation) may be a neighbour too.

    A word is looked up as it is written, and then in lower case. It is no neighbour of itself, whatever its case.

    Raises:
        DataError: there is no such file, or one of its lines is broken.
    """

    def __init__(self, path: str | Path, *, num_candidates: int = 15, as_released: bool = False) -> None:
        self.path, self.num_candidates, self.as_released = Path(path), num_candidates, as_released
        file = read_vectors(self.path)
        limit = FIRST_VECTORS if as_released else len(file.words)
        self._words, self._vectors = file.words[:limit], file.vectors[:limit]
        self._places = {word: place for place, word in enumerate(self._words)}
        self._neighbours: dict[int, tuple[str, ...]] = {}

    def __len__(self) -> int:
        return len(self._words)

    def __contains__(self, word: str) -> bool:
        return self._place(word) is not None

    def __getstate__(self) -> dict[str, Any]:
        # What is mapped is opened again, not copied, so that datasets.map may hash it and hand it to other processes.
        return {"path": self.path, "num_candidates": self.num_candidates, "as_released": self.as_released}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def candidates(self, words: Sequence[str]) -> list[tuple[str, ...]]:
        """The K nearest neighbours of each word, sorted by their place in the file; none for a word without a vector."""
        places = [self._place(word) for word in words]
        self._find({place for place in places if place is not None} - self._neighbours.keys())
        return [() if place is None else self._neighbours[place] for place in places]

    def _place(self, word: str) -> int | None:
        place = self._places.get(word)
        return self._places.get(word.lower()) if place is None else place

    def _find(self, places: Iterable[int]) -> None:
        queries = sorted(places)
        count = min(self.num_candidates + _SPARE, len(self._words))
        together = max(1, _BLOCK_BYTES // (4 * len(self._words)))
        for start in range(0, len(queries), together):
            some = queries[start : start + together]
            # (queries, words)
            similar = self._vectors[some] @ self._vectors.T
            nearest = np.argpartition(-similar, count - 1, axis=1)[:, :count]
            for query, found in zip(some, nearest, strict=True):
                self._neighbours[query] = self._chosen(query, found)

    def _chosen(self, query: int, found: NDArray[np.intp]) -> tuple[str, ...]:
        """The nearest of those found, in an order that no batch can change."""
        exact = self._vectors[found].astype(np.float64)
        similar = np.round((exact * self._vectors[query].astype(np.float64)).sum(1), 12)
        own = self._words[query].lower()
        chosen = []
        for _, place in sorted(zip((-similar).tolist(), found.tolist(), strict=True)):
            word = self._words[place]
            if place == query or (not self.as_released and (word.lower() == own or not is_whole_word(_spaced(word)))):
                continue
            chosen.append(place)
            if len(chosen) == self.num_candidates:
                break
        return tuple(_spaced(self._words[place]) for place in sorted(chosen))


def _spaced(word: str) -> str:
    """A phrase of word2vec as a text has it: New_York is New York."""
    return word.replace("_", " ") if len(word) > 1 and not word.startswith("_") else word
