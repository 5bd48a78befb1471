"""Word vectors from text, as GloVe and word2vec write them, to a file that is mapped into memory.

    text      [words dimensions]         the header line, word2vec's only
              word 0.418 0.24968 ...     a word may hold spaces (word2vec, GloVe 840B): its numbers are the last ones of the line
    mapped    float32 (words, dimensions) | the words, one a line | JSON {key, words, dimensions, bytes} | 8 bytes: its length | magic

The mapped vectors have length 1 (or are 0). The key is the text's size and time: a text that changed is read again.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import IO, Any

import numpy as np
from huggingface_hub.constants import HF_HOME
from numpy.typing import NDArray

from hf_compress.cache.files import atomic_file
from hf_compress.errors import DataError

Floats = NDArray[np.float32]
_Lines = list[tuple[int, str]]  # each with its number, counted from 1

_MAGIC = b"hfcvec1\n"
_AT_ONCE = 4096  # lines
_LOOKED_AT = 100  # lines that tell how many numbers there are a word
_MOST_SPACES = 10  # in a word
_BLANK = " \t\r\n"


@dataclass(frozen=True)
class VectorFile:
    """Words and their vectors.

    Attributes:
        words: each once, in the order of the text.
        vectors: (words, dimensions) float32 of length 1, mapped.
    """

    words: list[str]
    vectors: Floats


def read_vectors(path: Path) -> VectorFile:
    """The vectors of a text file; it is read once, and its mapped file from then on.

    The mapped file lies beside the text, or, where that folder cannot be written, in the cache of Hugging Face.

    Raises:
        DataError: there is no such file, it is empty, or a line is short or broken, with its number.
        CacheError: the mapped file cannot be written.
    """
    if not path.is_file():
        raise DataError(f"There are no word vectors in {path}. Give a text file of GloVe or word2vec.")
    status = path.stat()
    key = f"{status.st_size} {status.st_mtime_ns}"
    places = mapped_places(path)
    for place in places:
        found = _mapped(place, key)
        if found is not None:
            return found
    place = next((place for place in places[:1] if os.access(place.parent, os.W_OK)), places[-1])
    place.parent.mkdir(parents=True, exist_ok=True)
    _write(path, place, key)
    found = _mapped(place, key)
    assert found is not None
    return found


def mapped_places(path: Path) -> tuple[Path, Path]:
    """Where the mapped file of a text may lie: beside it, or in the cache of Hugging Face."""
    digest = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:16]
    return path.with_name(f"{path.name}.mapped"), Path(HF_HOME) / "hf_compress" / "vectors" / f"{path.name}.{digest}.mapped"


# --- the mapped file ---


def _write(path: Path, place: Path, key: str) -> None:
    words: dict[str, None] = {}
    dimensions = 0
    with atomic_file(place, path.stat().st_size) as writer:
        for some, vectors in _blocks(path):
            # A word that stands there twice keeps its first vector.
            fresh = []
            for number, word in enumerate(some):
                if word not in words:
                    words[word] = None
                    fresh.append(number)
            dimensions = vectors.shape[1]
            length = np.linalg.norm(vectors, axis=1, keepdims=True)
            writer.write(np.ascontiguousarray((vectors / np.where(length > 0, length, 1))[fresh], dtype=np.float32).tobytes())
        text = "\n".join(words).encode()
        writer.write(text)
        about = json.dumps({"key": key, "words": len(words), "dimensions": dimensions, "bytes": len(text)}).encode()
        writer.write(about + len(about).to_bytes(8, "little") + _MAGIC)


def _mapped(place: Path, key: str) -> VectorFile | None:
    """What lies there, if it is of the text with that key."""
    try:
        with place.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            end = size - len(_MAGIC) - 8
            file.seek(max(0, end))
            tail = file.read()
            if end < 0 or tail[8:] != _MAGIC:
                return None
            start = end - int.from_bytes(tail[:8], "little")
            file.seek(start)
            about: dict[str, Any] = json.loads(file.read(end - start))
            count, dimensions = about["words"], about["dimensions"]
            if about["key"] != key or 4 * count * dimensions + about["bytes"] != start:
                return None
            file.seek(4 * count * dimensions)
            words = file.read(about["bytes"]).decode().split("\n")
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return VectorFile(words, np.memmap(place, np.float32, "r", shape=(count, dimensions)))


# --- the text ---


def _blocks(path: Path) -> Iterator[tuple[list[str], NDArray[np.float64]]]:
    """Words and vectors, some thousand lines at a time."""
    # Only "\n" ends a line: words of GloVe hold other separators of Unicode.
    with path.open(encoding="utf-8", errors="replace", newline="\n") as file:
        lines = enumerate(_stripped(file), start=1)
        head = list(islice(lines, _LOOKED_AT))
        if not any(line for _, line in head):
            raise DataError(f"{path} is empty; expected a line a word: the word and its numbers.")
        announced = _header(head[0][1])
        head = head[1:] if announced else head
        dimensions = announced[1] if announced else _dimensions(head)
        rest = chain(head, lines)
        number = count = 0
        while block := list(islice(rest, _AT_ONCE)):
            number = block[-1][0]
            block = [line for line in block if line[1]]
            count += len(block)
            if block:
                yield _read(path, block, dimensions)
        if announced and count != announced[0]:
            raise DataError(
                f"{path} was cut off: line 1 announces {announced[0]:,} words, and it ends after {count:,}, in line {number:,}. "
                "Get the whole file, or correct its first line."
            )


def _stripped(file: IO[str]) -> Iterator[str]:
    return (line.strip(_BLANK).replace("\t", " ") for line in file)


def _header(line: str) -> tuple[int, int] | None:
    """Numbers of words and dimensions, if the first line is word2vec's header."""
    parts = line.split(" ")
    return (int(parts[0]), int(parts[1])) if len(parts) == 2 and all(part.isdecimal() for part in parts) else None


def _dimensions(head: _Lines) -> int:
    """How many numbers a word has: what most lines say."""
    return max(1, Counter(line.count(" ") for _, line in head if line).most_common(1)[0][0])


def _read(path: Path, block: _Lines, dimensions: int) -> tuple[list[str], NDArray[np.float64]]:
    split = [line.rsplit(" ", dimensions) if line.count(" ") != dimensions else line.split(" ", 1) for _, line in block]
    rests = [" ".join(parts[1:]) for parts in split]
    try:
        with warnings.catch_warnings():
            # What is no number ends the reading: with a warning before numpy 2.3, whose count then tells.
            warnings.simplefilter("ignore", DeprecationWarning)
            values = np.fromstring(" ".join(rests), sep=" ")
    except ValueError as error:
        raise _broken(path, block, dimensions) from error
    even = all(rest.count(" ") == dimensions - 1 for rest in rests) and all(
        line.count(" ") <= dimensions + _MOST_SPACES for _, line in block
    )
    if not even or values.size != len(block) * dimensions or not np.isfinite(values).all():
        raise _broken(path, block, dimensions)
    return [parts[0].strip(_BLANK) for parts in split], values.reshape(len(block), dimensions)


def _broken(path: Path, block: _Lines, dimensions: int) -> DataError:
    """What is wrong with the first broken line of some."""
    for number, line in block:
        parts = line.split(" ")
        found = f"{path}, line {number:,}: '{line[:40]}{'...' if line[40:] else ''}'"
        if len(parts) <= dimensions:
            return DataError(
                f"{found} has {len(parts) - 1} numbers after its word; expected {dimensions}, as the others. The file is broken there, or "
                "was cut off: get it again."
            )
        if len(parts) > dimensions + 1 + _MOST_SPACES:
            return DataError(f"{found} has {len(parts) - 1} numbers after its word; expected {dimensions}, as the others.")
        for part in parts[-dimensions:]:
            try:
                finite = bool(np.isfinite(float(part)))
            except ValueError:
                finite = False
            if not finite:
                return DataError(f"{found}: '{part}' is no number; expected a word and {dimensions} numbers.")
    raise AssertionError("no line is broken")
