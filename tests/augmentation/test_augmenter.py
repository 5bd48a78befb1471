"""The augmenter: rows with their copies, for `datasets.map`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from datasets import ClassLabel, Dataset, Features, Value
from datasets.fingerprint import Hasher

from hf_compress import Augmenter
from hf_compress.errors import ArgumentError, DataError
from tests.augmentation.small_masked_lms import ARCHITECTURES, TEXTS, WORDS, masked_lm, write_vectors

VECTORS = {word: (place, 10 - place % 7, place % 5) for place, word in enumerate([*WORDS, "rans", "mats"], start=1)}


@pytest.fixture
def vectors(tmp_path: Path) -> str:
    return str(write_vectors(tmp_path / "vectors.txt", VECTORS))


def pairs() -> Dataset:
    features = Features({"label": ClassLabel(names=["no", "yes"]), "a": Value("string"), "b": Value("string"), "idx": Value("int32")})
    rows = [{"label": i % 2, "a": TEXTS[i % 4], "b": f"{TEXTS[(i + 1) % 4]} {WORDS[i]}", "idx": i} for i in range(7)]
    return Dataset.from_list(rows, features=features)


def augmented(augmenter: Augmenter, data: Dataset, batch_size: int) -> Dataset:
    return data.map(augmenter, batched=True, batch_size=batch_size, remove_columns=data.column_names)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("settings", [{}, {"candidates": "per_word"}, {"faithful": "released_code"}], ids=["paper", "per_word", "released"])
def test_the_same_rows_whatever_the_batch(architecture: str, settings: dict[str, Any], vectors: str) -> None:
    model, tokenizer = masked_lm(architecture)
    known = {"vectors": vectors, "num_copies": 3, **settings}
    data = pairs()
    first = augmented(Augmenter(["a", "b"], model, tokenizer, **known), data, batch_size=7).to_list()
    assert augmented(Augmenter(["a", "b"], model, tokenizer, batch_tokens=40, **known), data, batch_size=2).to_list() == first
    turned = data.select(range(6, -1, -1))
    again = augmented(Augmenter(["a", "b"], model, tokenizer, **known), turned, batch_size=3).to_list()
    assert sorted(map(str, again)) == sorted(map(str, first))
    assert augmented(Augmenter(["a", "b"], model, tokenizer, seed=1, **known), data, batch_size=7).to_list() != first


def test_a_pair_is_changed_on_one_side_at_a_time_and_the_rest_is_copied(vectors: str) -> None:
    data = pairs()
    rows = augmented(Augmenter(["a", "b"], vectors=vectors, num_copies=4), data, batch_size=4).to_list()
    originals = {row["idx"]: row for row in data}
    by_row: dict[int, list[dict[str, Any]]] = {}
    for row in rows:
        by_row.setdefault(row["idx"], []).append(row)
    assert list(by_row) == list(range(7))
    for number, found in by_row.items():
        original = originals[number]
        assert found[0] == original
        changed = [("a" if row["a"] != original["a"] else "") + ("b" if row["b"] != original["b"] else "") for row in found[1:]]
        assert changed == sorted(changed) and set(changed) == {"a", "b"}
        assert changed.count("a") <= 4 and changed.count("b") == 4
        assert all(row["label"] == original["label"] for row in found)
        assert len({(row["a"], row["b"]) for row in found}) == len(found)


def test_the_features_stay(vectors: str) -> None:
    data = pairs()
    out = data.map(Augmenter(["a"], vectors=vectors, num_copies=1), batched=True, remove_columns=data.column_names, features=data.features)
    assert out.features == data.features and len(out) == 14


def test_words_of_several_pieces_come_from_the_vectors_and_others_from_the_masked_lm(vectors: str) -> None:
    model, tokenizer = masked_lm("bert")
    augmenter = Augmenter(["a"], model, tokenizer, vectors=vectors, probability=1.0, num_copies=12)
    (sentence,) = augmenter.sentences(["The rans , cat"])
    assert [(word.text, word.single_piece) for word in sentence.words] == [("The", True), ("rans", False), ("cat", True)]
    assert augmenter.vectors is not None and augmenter.masked_words is not None
    ((copies,),) = augmenter.copies([("The rans , cat",)])
    near = {word for (found,) in [augmenter.vectors.candidates(["rans"])] for word in found}
    assert {copy.split()[1] for copy in copies} <= near
    assert all(copy[0].isupper() and copy.split()[2] == "," for copy in copies)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_masked_lm_alone_replaces_all_words(architecture: str) -> None:
    model, tokenizer = masked_lm(architecture)
    augmenter = Augmenter(["a"], model, tokenizer, probability=1.0, num_copies=3)
    text = "Zebras ran (quickly) ."
    ((copies,),) = augmenter.copies([(text,)])
    assert len(copies) == 3
    for copy in copies:
        first, second, third, _ = copy.split()
        assert first != "Zebras" and second != "ran" and third != "(quickly)" and third[0] == "(" and third[-1] == ")"
        assert "##" not in copy and "\u0120" not in copy


def test_the_released_code_keeps_stop_words_and_numbers(vectors: str) -> None:
    text = ("She saw 12 birds on the table",)
    ((released,),) = Augmenter(["a"], vectors=vectors, faithful="released_code", probability=1.0).copies([text])
    assert released and all(copy.startswith("She ") and " 12 " in copy and " on the " in copy for copy in released)
    ((kept,),) = Augmenter(["a"], vectors=vectors, keep_stop_words=True, probability=1.0).copies([text])
    assert all(copy.startswith("She ") and " on the " in copy for copy in kept) and any(" 12 " not in copy for copy in kept)


def test_datasets_knows_an_augmenter_again(vectors: str) -> None:
    model, tokenizer = masked_lm("bert")
    augmenter = Augmenter(["a"], model, tokenizer, vectors=vectors, num_copies=2)
    before = Hasher.hash(augmenter)
    copies = augmenter.copies([(TEXTS[0],)])
    assert Hasher.hash(augmenter) == before
    other = Augmenter(["a"], model, tokenizer, vectors=vectors, num_copies=2, seed=1)
    assert Hasher.hash(other) != before and other.copies([(TEXTS[0],)]) != copies


def test_what_cannot_be_augmented_is_refused(vectors: str) -> None:
    model, _ = masked_lm("bert")
    with pytest.raises(ArgumentError, match="nothing to take words from"):
        Augmenter(["a"])
    with pytest.raises(ArgumentError, match="needs its tokenizer"):
        Augmenter(["a"], model)
    with pytest.raises(ArgumentError, match="expected a list of names"):
        Augmenter("a", vectors=vectors)
    augmenter = Augmenter(["a", "b"], vectors=vectors)
    with pytest.raises(DataError, match="has no column 'b'; its columns are: a, label"):
        augmenter({"a": ["the cat"], "label": [1]})
    with pytest.raises(DataError, match="The column 'b' holds 3, which is no text"):
        augmenter({"a": ["the cat"], "b": [3]})
