"""The corpus: its labels against an evaluator that only reads the words, and what else the demo takes for granted."""

from __future__ import annotations

import re

import pytest

from hf_compress.errors import DataError
from hf_compress.report import corpus
from hf_compress.report.contenders import BagOfWords, MajorityClass
from hf_compress.report.corpus import Example, with_wrong_labels, write_corpus
from hf_compress.report.measure import accuracy

PAIRED = set(corpus.GOOD) | set(corpus.STEMS)
OPPOSED = set(corpus.BAD) | {f"un{stem}" for stem in corpus.STEMS}


def clause_is_good(clause: str) -> bool:
    """Read a clause as a person would: what is said last and by the writer counts; each negation turns it round."""
    clause = re.sub(r", which they call \w+ ,", "", clause)
    clause = re.sub(r"i was told that .* , but it", "it", clause)
    clause = clause.replace("not only", "").replace("but also", "and")
    clause = re.sub(r"not \w+ but", "", clause)
    words = clause.split()
    verdicts = {word in PAIRED for word in words if word in PAIRED | OPPOSED}
    assert len(verdicts) == 1, clause
    negations = sum(word in ("not", "never", "neither", "nobody", "hardly", "wish") for word in words)
    return verdicts.pop() == (negations % 2 == 0)


def review_is_good(review: str) -> bool:
    text = review.removesuffix(" .")
    if text.startswith("it hardly mattered that "):
        return clause_is_good(text.split(" , because ")[1])
    if text.startswith("although "):
        return clause_is_good(re.split(r" , (?=the |i |everyone |nobody |hardly )", text.removeprefix("although "))[-1])
    if " , although " in text:
        return clause_is_good(text.split(" , although ")[0])
    return clause_is_good(re.split(r" , (?:but|and|while) (?!it was)", text)[-1])


def answer(example: Example) -> int:
    opposite = bool(re.search(r"disagree|opposite|not what", example.reply))
    return int(review_is_good(example.review) != opposite)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_labels_are_what_the_words_say(seed: int) -> None:
    (examples,) = write_corpus((1500,), seed=seed)
    wrong = [example for example in examples if answer(example) != example.label]
    assert wrong == []


def test_the_evaluator_reads_each_kind_of_clause() -> None:
    (examples,) = write_corpus((3000,), seed=0)
    text = " ".join(example.review for example in examples)
    for phrase in ("neither", "nobody said", "i wish", "which they call", "not only", "i was told", "although", "because", " un", ", but"):
        assert phrase in text, phrase


def test_the_same_seed_writes_the_same_corpus_and_another_one_another() -> None:
    assert write_corpus((50, 30), seed=3) == write_corpus((50, 30), seed=3)
    assert write_corpus((50,), seed=3) != write_corpus((50,), seed=4)
    assert corpus.Lexicon.draw(3) != corpus.Lexicon.draw(4)


def test_parts_are_balanced_and_share_no_example() -> None:
    parts = write_corpus((400, 101, 200), seed=1)
    assert [len(part) for part in parts] == [400, 101, 200]
    assert [sum(example.label for example in part) for part in parts] == [200, 50, 100]
    texts = [(example.review, example.reply) for part in parts for example in part]
    assert len(set(texts)) == len(texts)


def test_more_examples_than_the_grammar_has_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "SHARE_OF_SINGLE", 1.0)
    monkeypatch.setattr(corpus, "CLAUSES", ((1.0, "the {noun} was {same}"),))
    with pytest.raises(DataError, match="1000 different examples; ask for fewer"):
        write_corpus((1000,))


def test_wrong_labels_are_as_many_as_asked_for() -> None:
    (examples,) = write_corpus((200,))
    spoilt = with_wrong_labels(examples, 0.1, seed=5)
    assert sum(before.label != after.label for before, after in zip(examples, spoilt, strict=True)) == 20
    assert [example.review for example in spoilt] == [example.review for example in examples]
    assert with_wrong_labels(examples, 0.1, seed=5) == spoilt != with_wrong_labels(examples, 0.1, seed=6)


def test_words_alone_decide_little() -> None:
    train, test = write_corpus((4000, 1000))
    assert accuracy(MajorityClass(train), test) == 0.5
    assert 0.5 < accuracy(BagOfWords(train), test) < 0.7
