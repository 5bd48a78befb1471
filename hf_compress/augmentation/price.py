"""What augmenting will take, said before it begins."""

from __future__ import annotations

import datetime
import time
from collections.abc import Sequence
from dataclasses import dataclass

from hf_compress.augmentation.augmenter import Augmenter, Texts
from hf_compress.augmentation.masked_words import Question

_LOOKED_AT = 1000  # examples whose words are counted
_PROBED = 64  # questions that are timed


@dataclass(frozen=True)
class Price:
    """What augmenting will take.

    Attributes:
        examples, copies: how many, and of each text.
        words: that may be replaced, about.
        without_vector: share of the words left to the vectors that have none, and stay; None where there are no vectors.
        questions: of the masked LM, at most.
        forwards: of the masked LM, about.
        rate: questions a second, measured; None where nothing is asked.
    """

    examples: int
    copies: int
    words: int
    without_vector: float | None
    questions: int
    forwards: int
    rate: float | None

    def __str__(self) -> str:
        lines = [f"{self.examples:,} examples, about {self.words:,} words that may be replaced, {self.copies} copies of each text"]
        if self.without_vector:
            lines.append(f"{self.without_vector:.0%} of the words that are looked up have no vector, and stay")
        if self.rate is not None:
            duration = datetime.timedelta(seconds=round(self.questions / self.rate))
            lines.append(
                f"at most {self.questions:,} words asked of the masked LM, about {self.forwards:,} forwards: {duration} at "
                f"{self.rate:,.0f} words a second"
            )
        return "\n".join(lines)


def measure_price(augmenter: Augmenter, rows: Sequence[Texts], examples: int) -> Price:
    """Count the words of some examples, and time the masked LM on a few of them.

    Args:
        augmenter: what will do the work.
        rows: some examples, spread over all.
        examples: how many there are to do in all.
    """
    settings = augmenter.settings
    sentences = augmenter.sentences([text for row in rows for text in row])
    share = examples / max(1, len(rows))
    asked = [(sentence, word) for sentence in sentences for word in sentence.words if augmenter.sources.asks(word)]
    looked_up = [word for sentence in sentences for word in sentence.words if not augmenter.sources.asks(word)]
    without = None
    if augmenter.vectors is not None and looked_up:
        without = sum(word.text not in augmenter.vectors for word in looked_up) / len(looked_up)
    chance = settings.num_copies * settings.probability if settings.per_copy else 1 - (1 - settings.probability) ** settings.num_copies
    rate, forwards = None, 0
    if asked and augmenter.masked_words is not None:
        step = max(1, len(asked) // _PROBED)
        beside = settings.as_released
        questions = [Question(s.text, w.start, w.end, s.text if beside else None) for s, w in asked[::step][:_PROBED]]
        augmenter.masked_words.candidates(questions[: len(questions) // 4])  # the first forward of all is slower
        timed = questions[len(questions) // 4 :]
        before, started = augmenter.masked_words.forwards, time.perf_counter()
        augmenter.masked_words.candidates(timed)
        rate = len(timed) / (time.perf_counter() - started)
        forwards = round(len(asked) * share * chance * (augmenter.masked_words.forwards - before) / len(timed))
    return Price(
        examples,
        settings.num_copies,
        round(sum(len(sentence.words) for sentence in sentences) * share),
        without,
        round(len(asked) * share * chance) if rate else 0,
        forwards,
        rate,
    )


def sample(count: int) -> list[int]:
    """Places of the examples that are looked at, spread over all of them."""
    step = max(1, count // _LOOKED_AT)
    return list(range(0, count, step))[:_LOOKED_AT]
