"""Accuracy and times, counted by hand."""

from __future__ import annotations

import time
from collections.abc import Sequence

import pytest

from hf_compress.errors import DataError
from hf_compress.report.contenders import BagOfWords, MajorityClass
from hf_compress.report.corpus import Example
from hf_compress.report.measure import accuracy, milliseconds_per_example

EXAMPLES = [Example(f"the bed was clean {number} .", "i agree .", number % 2) for number in range(8)]


class Sleeper:
    """Says 1, after a while."""

    def __init__(self, seconds: float, log: list[str], name: str) -> None:
        self.seconds, self.log, self.name = seconds, log, name

    def predict(self, examples: Sequence[Example]) -> list[int]:
        self.log.append(self.name)
        time.sleep(self.seconds)
        return [1] * len(examples)

    def size(self) -> tuple[int, int]:
        return 0, 0


def test_accuracy_counts_over_batches_of_any_size() -> None:
    assert accuracy(Sleeper(0, [], "a"), EXAMPLES[1:4], batch_size=2) == pytest.approx(2 / 3)


def test_accuracy_of_nothing_is_refused() -> None:
    with pytest.raises(DataError, match="no examples"):
        accuracy(Sleeper(0, [], "a"), [])


def test_times_are_per_example_and_contenders_take_turns() -> None:
    log: list[str] = []
    times = milliseconds_per_example({"a": Sleeper(0.004, log, "a"), "b": Sleeper(0.02, log, "b")}, EXAMPLES, repeats=4, batch_size=4)
    assert 1.0 <= times["a"] < times["b"]
    assert times["b"] >= 5.0
    assert log[2:] == ["a", "b", "b", "a", "a", "b", "b", "a"]


def test_times_need_a_whole_batch() -> None:
    with pytest.raises(DataError, match="batches of 9 examples, but there are 8"):
        milliseconds_per_example({}, EXAMPLES, batch_size=9)


def test_majority_class_and_sizes() -> None:
    majority = MajorityClass([*EXAMPLES, Example("a", "b", 1)])
    assert majority.predict(EXAMPLES) == [1] * 8
    assert majority.size() == (0, 0)


def test_bag_of_words_forgets_the_order_but_not_who_said_it() -> None:
    words = BagOfWords([Example("good bed", "yes", 1), Example("bad bed", "yes", 0)] * 20)
    assert words.predict([Example("bed good", "yes", 0), Example("bed bad", "yes", 1)]) == [1, 0]
    assert words.size() == (5, 40)  # good, bad, bed, reply:yes, and the intercept; float64
