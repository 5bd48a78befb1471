"""Words of a text: which, where, and in which case they are written."""

from __future__ import annotations

import pytest

from hf_compress.augmentation.stop_words import STOP_WORDS
from hf_compress.augmentation.words import in_case_of, is_whole_word, may_be_replaced, spans_of


def words(text: str) -> list[str]:
    return [text[start:end] for start, end in spans_of(text)]


def test_words_are_runs_of_letters_and_digits() -> None:
    assert words('The old "cat" (a mat_red) , 12 x-rays .') == ["The", "old", "cat", "a", "mat", "red", "12", "x", "rays"]
    assert words("für 3.5 Äpfel; 1,200") == ["für", "3.5", "Äpfel", "1,200"]
    assert words("\u0939\u093f\u0928\u094d\u0926\u0940 \u092f\u0939") == ["\u0939\u093f\u0928\u094d\u0926\u0940", "\u092f\u0939"]
    assert words(" ...  ") == []


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("It's here", ["It", "here"]),
        ("John 's dog", ["John", "dog"]),
        ("they didn't go", ["they", "go"]),
        ("'tomorrow' we'll", ["tomorrow", "we"]),
    ],
)
def test_parts_of_contractions_are_left_alone(text: str, left: list[str]) -> None:
    assert words(text) == left
    assert words(text.replace("'", "\u2019")) == left


def test_a_word_does_not_reach_from_one_part_of_the_tokenizer_into_the_next() -> None:
    assert spans_of("猫狗 cat.", [(0, 1), (1, 2), (3, 7)]) == [(0, 1), (1, 2), (3, 6)]


def test_the_released_code_replaces_letters_only_and_no_stop_words() -> None:
    def replaced(word: str, **reading: bool) -> bool:
        return may_be_replaced(word, **{"as_released": False, "skip_stop_words": False, **reading})

    assert all(replaced(word) for word in ("the", "12", "cat", "für"))
    assert not replaced("The", skip_stop_words=True) and replaced("cat", skip_stop_words=True)
    assert not replaced("12", as_released=True) and not replaced("für", as_released=True) and replaced("cat", as_released=True)


def test_stop_words_are_function_words_and_no_question_words() -> None:
    assert {"i", "the", "not", "wouldn", "very", "should"} <= STOP_WORDS
    assert not {"what", "who", "why", "cat", ""} & STOP_WORDS
    assert all(word.isalpha() and word.islower() for word in STOP_WORDS)


@pytest.mark.parametrize(
    ("word", "replaced", "written"),
    [
        ("dog", "cat", "dog"),
        ("dog", "Cat", "Dog"),
        ("dog", "CAT", "DOG"),
        ("Paris", "cat", "Paris"),
        ("dog", "A", "Dog"),
        ("x-ray", "Cat", "X-ray"),
    ],
)
def test_a_replacement_is_written_as_the_word_was(word: str, replaced: str, written: str) -> None:
    assert in_case_of(word, replaced) == written


def test_what_may_stand_in_place_of_a_word() -> None:
    assert all(map(is_whole_word, ("cat", "12", "well-known", "New York", "u.s", "für")))
    assert not any(map(is_whole_word, ("", ".", "--", "'s", "cat.", "a  b", "[MASK]")))
