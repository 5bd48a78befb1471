"""Word vectors: read from text once, mapped, and the nearest words of a word."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import numpy as np
import pytest

from hf_compress.augmentation.vector_file import mapped_places, read_vectors
from hf_compress.augmentation.word_vectors import WordVectors
from hf_compress.errors import DataError
from tests.augmentation.small_masked_lms import write_vectors

# At angles of 0, 10, 25, 60 and 90 degrees, of different lengths.
ANGLES = {"cat": 0, "kitten": 10, "dog": 25, "car": 60, "tree": 90}
CIRCLE = {word: (5 * np.cos(np.radians(a)), 5 * np.sin(np.radians(a))) for word, a in ANGLES.items()}
CIRCLE["dog"] = (CIRCLE["dog"][0] * 9, CIRCLE["dog"][1] * 9)


def test_the_nearest_by_cosine_by_hand(tmp_path: Path) -> None:
    vectors = WordVectors(write_vectors(tmp_path / "v.txt", CIRCLE), num_candidates=2)
    # A set, in the order of the file.
    assert vectors.candidates(["cat", "tree", "nowhere", "dog"]) == [("kitten", "dog"), ("dog", "car"), (), ("cat", "kitten")]
    assert "cat" in vectors and "nowhere" not in vectors and len(vectors) == 5


def test_many_words_as_a_plain_loop_and_in_whatever_company(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    numbers = random.normal(size=(300, 8)).round(4)
    vectors = WordVectors(write_vectors(tmp_path / "v.txt", {f"w{i}": row for i, row in enumerate(numbers)}), num_candidates=7)
    unit = numbers / np.linalg.norm(numbers, axis=1, keepdims=True)
    expected = []
    for row in unit:
        order = [place for place in np.argsort(-(unit @ row)) if not np.array_equal(unit[place], row)][:7]
        expected.append(tuple(f"w{place}" for place in sorted(order)))
    assert vectors.candidates([f"w{i}" for i in range(300)]) == expected
    alone = WordVectors(tmp_path / "v.txt", num_candidates=7)
    assert [alone.candidates([f"w{i}"])[0] for i in range(20)] == expected[:20]


def test_case_as_it_is_and_then_lower(tmp_path: Path) -> None:
    file = write_vectors(tmp_path / "v.txt", {**CIRCLE, "Cat": CIRCLE["tree"], "us": CIRCLE["car"]})
    vectors = WordVectors(file, num_candidates=1)
    assert vectors.candidates(["Cat", "CAT", "Us"]) == [("tree",), ("kitten",), ("car",)]


def test_neighbours_are_words_and_phrases_are_spaced(tmp_path: Path) -> None:
    file = write_vectors(tmp_path / "v.txt", {"cat": (1, 0), "--": (1, 0.1), "New_York": (1, 0.2), "CAT": (1, 0.05), "dog": (0, 1)})
    assert WordVectors(file, num_candidates=1).candidates(["cat"]) == [("New York",)]
    assert WordVectors(file, num_candidates=2, as_released=True).candidates(["cat"]) == [("--", "CAT")]


def test_headers_spaces_and_duplicates_of_word2vec(tmp_path: Path) -> None:
    file = tmp_path / "v.txt"
    file.write_text("5 2\ncat 1 0 \nnew york 0 2\n. . 1 1\ncat 7 7\n</s> 0 0\n", encoding="utf-8")
    read = read_vectors(file)
    assert read.words == ["cat", "new york", ". .", "</s>"]
    np.testing.assert_allclose(read.vectors, [[1, 0], [0, 1], [0.5**0.5, 0.5**0.5], [0, 0]], atol=1e-7)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("cat 1 2\ndog 3 4\nbird 5\n", "line 3: 'bird 5' has 1 numbers after its word; expected 2"),
        ("cat 1 2\ndog 3 x\n", "line 2: 'dog 3 x': 'x' is no number"),
        ("cat 1 2\ndog 3 nan\n", "line 2: 'dog 3 nan': 'nan' is no number"),
        ("cat 1 2\ndog 3 4 5 6 7 8 9 1 2 3 4 5 6 7 8\nbird 1 2\n", "line 2: 'dog 3 4"),
        ("3 2\ncat 1 2\ndog 3 4\n", "line 1 announces 3 words, and it ends after 2, in line 3"),
        ("", "is empty"),
    ],
)
def test_a_short_or_broken_file_is_refused_with_the_line(tmp_path: Path, text: str, words: str) -> None:
    file = tmp_path / "v.txt"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(DataError) as raised:
        read_vectors(file)
    assert words in str(raised.value) and str(file) in str(raised.value)
    assert list(tmp_path.iterdir()) == [file]


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="There are no word vectors in"):
        read_vectors(tmp_path / "v.txt")


def test_the_text_is_read_once_and_again_when_it_changed(tmp_path: Path) -> None:
    file = write_vectors(tmp_path / "v.txt", CIRCLE)
    mapped = mapped_places(file)[0]
    read_vectors(file)
    written = mapped.stat().st_mtime_ns
    again = read_vectors(file)
    assert mapped.stat().st_mtime_ns == written and isinstance(again.vectors, np.memmap)
    write_vectors(file, {"other": (1, 2)})
    os.utime(file, ns=(1, 1))
    assert read_vectors(file).words == ["other"]


@pytest.mark.parametrize("cut", [1, 20, 60])
def test_a_mapped_file_that_was_cut_off_is_made_again(tmp_path: Path, cut: int) -> None:
    file = write_vectors(tmp_path / "v.txt", CIRCLE)
    expected = read_vectors(file)
    mapped = mapped_places(file)[0]
    mapped.write_bytes(mapped.read_bytes()[:-cut])
    read = read_vectors(file)
    assert read.words == expected.words and np.array_equal(read.vectors, expected.vectors)


def test_a_pickled_one_holds_no_vectors(tmp_path: Path) -> None:
    file = write_vectors(tmp_path / "v.txt", {f"w{i}": (i, 1, 2, 3) for i in range(2000)})
    vectors = WordVectors(file, num_candidates=3)
    before = pickle.dumps(vectors)
    found = vectors.candidates(["w7"])
    assert pickle.dumps(vectors) == before and len(before) < 1000
    assert pickle.loads(before).candidates(["w7"]) == found
