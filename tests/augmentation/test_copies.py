"""What is drawn, what the masked LM is asked, and which copies stay."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from hf_compress.augmentation.copies import Request, Sources, make_copies
from hf_compress.augmentation.masked_words import Question
from hf_compress.augmentation.settings import AugmentationSettings
from hf_compress.augmentation.words import Sentence, Word, spans_of
from hf_compress.errors import ArgumentError

TEXT = 'The cat  sat, "quickly", on a mat.'


def sentence(text: str, single: Sequence[str] = ()) -> Sentence:
    return Sentence(text, tuple(Word(start, end, text[start:end], text[start:end] in single) for start, end in spans_of(text)))


def numbered(words: Sequence[str]) -> list[tuple[str, ...]]:
    return [tuple(f"{word}{number}" for number in range(9)) for word in words]


def by_vectors(text: str, key: str = "k", **settings: object) -> list[str]:
    (copies,) = make_copies([Request(sentence(text), key)], Sources(None, numbered), AugmentationSettings(**settings))  # type: ignore[arg-type]
    return copies


def test_probability_1_replaces_each_word_and_nothing_else_of_the_text() -> None:
    for copy in by_vectors(TEXT, probability=1.0, num_copies=5):
        words = copy.replace('"', "").replace(",", "").replace(".", "").split()
        assert [word[:-1] for word in words] == ["The", "cat", "sat", "quickly", "on", "a", "mat"]
        assert all(word[-1].isdigit() for word in words)
        assert "".join(sign for sign in copy if not sign.isalnum()) == "".join(sign for sign in TEXT if not sign.isalnum())


def test_probability_0_gives_no_copy() -> None:
    assert by_vectors(TEXT, probability=0.0) == []


def test_the_share_of_replaced_words_is_the_probability() -> None:
    text = " ".join(f"word{letter}" for letter in "abcdefghij")
    copies = by_vectors(text, probability=0.3, num_copies=400)
    replaced = sum(word[-1].isdigit() for copy in copies for word in copy.split())
    assert len(copies) == 400 and 0.27 < replaced / 4000 < 0.33
    first = {copy.split()[0] for copy in copies} - {"worda"}
    assert first == {f"worda{number}" for number in range(9)}


def test_copies_are_different_and_as_many_as_asked_for() -> None:
    copies = by_vectors("cat", num_copies=8)
    assert sorted(copies) == sorted(set(copies)) and "cat" not in copies
    assert 5 < len(copies) <= 8  # of 9 that there are, in 24 draws at most
    assert len(by_vectors(TEXT, num_copies=30)) == 30
    assert len(by_vectors("cat", num_copies=8, faithful="released_code")) < len(copies)


def test_a_copy_hangs_on_seed_key_and_number_alone() -> None:
    three, seven = by_vectors(TEXT, num_copies=3), by_vectors(TEXT, num_copies=7)
    assert seven[:3] == three
    assert by_vectors(TEXT, num_copies=3, seed=1) != three and by_vectors(TEXT, "other", num_copies=3) != three
    requests = [Request(sentence(text), "k") for text in ("A dog ran .", TEXT, "It is .")]
    assert make_copies(requests, Sources(None, numbered), AugmentationSettings(num_copies=3))[1] == three


def test_the_masked_lm_reads_the_copy_as_it_stands_word_after_word() -> None:
    rounds: list[list[Question]] = []

    def ask(questions: Sequence[Question]) -> list[tuple[str, ...]]:
        rounds.append(list(questions))
        return [("XX",)] * len(questions)

    request = Request(sentence("a bb ccc dddd", single=("a", "ccc", "dddd")), "k")
    settings = AugmentationSettings(probability=1.0, num_copies=2)
    (copies,) = make_copies([request], Sources(ask, lambda words: [("vv",)] * len(words)), settings)
    assert copies == ["XX vv XX XX"]
    # bb, of several pieces, comes from the vectors, and is seen by the words after it.
    asked = [{(found.text, found.text[found.start : found.end]) for found in some} for some in rounds[:3]]
    assert asked == [{("a bb ccc dddd", "a")}, {("XX vv ccc dddd", "ccc")}, {("XX vv XX dddd", "dddd")}]


@pytest.mark.parametrize("faithful", [None, "released_code"])
def test_per_word_asks_about_the_original_at_once(faithful: str | None) -> None:
    rounds: list[list[Question]] = []

    def ask(questions: Sequence[Question]) -> list[tuple[str, ...]]:
        rounds.append(list(questions))
        return [("XX",)] * len(questions)

    text = "cats bb dogs"
    settings = AugmentationSettings(probability=1.0, num_copies=2, candidates="per_word", faithful=faithful)  # type: ignore[arg-type]
    (copies,) = make_copies([Request(sentence(text, single=("cats", "dogs")), "k")], Sources(ask, numbered), settings)
    assert {copy.split()[0] for copy in copies} == {"XX"}
    assert {(found.text, found.beside) for some in rounds for found in some} == {(text, text if faithful else None)}
    assert {text[found.start : found.end] for found in rounds[0]} == {"cats", "dogs"}


def test_what_is_not_replaced_is_not_asked_about() -> None:
    asked = []

    def ask(questions: Sequence[Question]) -> list[tuple[str, ...]]:
        asked.extend(questions)
        return [("XX",)] * len(questions)

    text = " ".join("abcdefghijklmnopqrst")
    settings = AugmentationSettings(probability=0.25, num_copies=40, faithful=None)
    (copies,) = make_copies([Request(sentence(text, single=text.split()), "k")], Sources(ask, None), settings)
    assert len(asked) == sum(copy.count("XX") for copy in copies)


def test_without_vectors_the_masked_lm_serves_for_all_words_and_without_candidates_a_word_stays() -> None:
    settings = AugmentationSettings(probability=1.0, num_copies=1)
    (copies,) = make_copies([Request(sentence("bb cc"), "k")], Sources(lambda asked: [("XX",)] * len(asked), None), settings)
    assert copies == ["XX XX"]
    assert make_copies([Request(sentence("bb cc"), "k")], Sources(None, lambda words: [()] * len(words)), settings) == [[]]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"num_copies": 0}, "--num_copies is 0; expected at least 1"),
        ({"num_candidates": 0}, "--num_candidates is 0; expected at least 1"),
        ({"probability": 1.5}, "--probability is 1.5; expected a number from 0 to 1"),
        ({"probability": -0.1}, "--probability is -0.1"),
        ({"probability": float("nan")}, "--probability is nan"),
        ({"candidates": "once"}, "--candidates is 'once'; expected per_copy or per_word"),
        ({"faithful": "paper"}, "--faithful is 'paper'; expected released_code"),
        ({"faithful": "released_code", "candidates": "per_copy"}, "--candidates per_copy contradicts --faithful released_code"),
    ],
)
def test_numbers_out_of_range_are_refused(settings: dict[str, object], words: str) -> None:
    with pytest.raises(ArgumentError) as raised:
        AugmentationSettings(**settings)  # type: ignore[arg-type]
    assert words in str(raised.value)
