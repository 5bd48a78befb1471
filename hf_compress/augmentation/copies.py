"""Copies of texts with words replaced: what is drawn, and when the masked LM is asked (Algorithm 1 of arXiv 1909.10351).

    for each copy          for each word          with probability p it is replaced by one of its candidates
    drawn beforehand       two numbers a word     whether, and which: from seed, row, column and number of the copy alone

What is not going to be replaced is not asked about. The first open words of all copies are asked about together, then the second, and so
on, since the masked LM is to read the words that were put in before ("per_copy"); with "per_word" all of them at once, of the original.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from hf_compress.augmentation.masked_words import Question
from hf_compress.augmentation.settings import AugmentationSettings
from hf_compress.augmentation.words import Sentence, Word, in_case_of

Ask = Callable[[Sequence[Question]], Sequence[Sequence[str]]]
Neighbours = Callable[[Sequence[str]], Sequence[Sequence[str]]]


@dataclass(frozen=True)
class Sources:
    """Where candidates come from.

    Attributes:
        ask: a masked LM; None for none.
        neighbours: word vectors; None for none.
    """

    ask: Ask | None
    neighbours: Neighbours | None

    def asks(self, word: Word) -> bool:
        """Whether the masked LM is asked about this word: the single-piece ones, or all where there are no vectors."""
        return self.ask is not None and (word.single_piece or self.neighbours is None)


@dataclass(frozen=True)
class Request:
    """A text to be copied.

    Attributes:
        sentence: the text and its words.
        key: what its random numbers hang on, beside the number of the copy.
    """

    sentence: Sentence
    key: str


class _Copy:
    """A copy in the making: its words, and those that are still to be replaced, each with the number that chooses among candidates."""

    def __init__(self, request: Request, number: int, settings: AugmentationSettings) -> None:
        self.sentence = request.sentence
        self.words = [word.text for word in self.sentence.words]
        draw = random.Random(f"{settings.seed} {number} {request.key}")
        # Two numbers a word, whatever becomes of it.
        drawn = [(place, draw.random(), draw.random()) for place in range(len(self.words))]
        self.open = [(place, choice) for place, chance, choice in drawn if chance < settings.probability]

    def text(self) -> str:
        """The text as it stands."""
        return self._until(len(self.words)) + self.sentence.text[self.sentence.words[-1].end if self.words else 0 :]

    def question(self, place: int, settings: AugmentationSettings) -> Question:
        """What the masked LM is asked about a word."""
        word, original = self.sentence.words[place], self.sentence.text
        if settings.per_copy:
            # What stands before the word as it is by now, and what comes after it as it was: the algorithm goes from left to right.
            before = self._until(place)
            rest = original[self.sentence.words[place - 1].end if place else 0 :]
            start = len(before) + len(rest) - (len(original) - word.start)
            return Question(before + rest, start, start + len(word.text))
        return Question(original, word.start, word.end, original if settings.as_released else None)

    def replace(self, place: int, candidates: Sequence[str], choice: float) -> None:
        """Put a candidate in; with none the word stays."""
        if candidates:
            self.words[place] = in_case_of(candidates[int(choice * len(candidates))], self.sentence.words[place].text)

    def _until(self, count: int) -> str:
        """The text up to the end of its first `count` words."""
        parts, end = [], 0
        for word, now in zip(self.sentence.words[:count], self.words, strict=False):
            parts += [self.sentence.text[end : word.start], now]
            end = word.end
        return "".join(parts)


def make_copies(requests: Sequence[Request], sources: Sources, settings: AugmentationSettings) -> list[list[str]]:
    """The copies of each text: different from it and from each other, in the order in which they were drawn.

    Args:
        requests: texts.
        sources: of candidates.
        settings: the numbers.

    Returns:
        For each text up to `num_copies`; fewer where there are no more different ones.
    """
    texts: list[list[str]] = [[] for _ in requests]
    drawn = [0] * len(requests)
    while True:
        wanted = [
            min(settings.num_copies - (number if settings.as_released else len(found)), settings.most_draws - number)
            if request.sentence.words
            else 0
            for request, found, number in zip(requests, texts, drawn, strict=True)
        ]
        if not any(wanted):
            return texts
        copies = [
            [_Copy(request, number + more, settings) for more in range(count)]
            for request, number, count in zip(requests, drawn, wanted, strict=True)
        ]
        _fill([copy for some in copies for copy in some], sources, settings)
        for place, (request, some) in enumerate(zip(requests, copies, strict=True)):
            drawn[place] += len(some)
            for text in (copy.text() for copy in some):
                if text != request.sentence.text and text not in texts[place]:
                    texts[place].append(text)


def _fill(copies: Sequence[_Copy], sources: Sources, settings: AugmentationSettings) -> None:
    """Replace all words that were drawn."""
    _fill_by_vectors(copies, sources)
    while True:
        # The first open word of each copy, or all of them where none hangs on another.
        now = [(copy, place, choice) for copy in copies for place, choice in (copy.open[:1] if settings.per_copy else copy.open)]
        if not now:
            return
        assert sources.ask is not None
        answers = sources.ask([copy.question(place, settings) for copy, place, _ in now])
        for (copy, place, choice), candidates in zip(now, answers, strict=True):
            copy.replace(place, candidates, choice)
        for copy in copies:
            copy.open = copy.open[1:] if settings.per_copy else []


def _fill_by_vectors(copies: Sequence[_Copy], sources: Sources) -> None:
    """Replace the words whose candidates come from the vectors, which see no other word."""
    asked = [
        (copy, place, choice, copy.sentence.words[place])
        for copy in copies
        for place, choice in copy.open
        if not sources.asks(copy.sentence.words[place])
    ]
    if not asked:
        return
    assert sources.neighbours is not None
    found = sources.neighbours([word.text for *_, word in asked])
    for (copy, place, choice, _), candidates in zip(asked, found, strict=True):
        copy.replace(place, candidates, choice)
    for copy in copies:
        copy.open = [(place, choice) for place, choice in copy.open if sources.asks(copy.sentence.words[place])]
