"""The words of a text: where they stand, which may be replaced, and in which case a replacement is written.

Words are found by their place in the text, so that everything else of it stays as it is: spaces, punctuation, other words' case.

    "The U.S. didn't say."  ->  The, U, S, say        (the parts of didn't are not replaced one by one)
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

from hf_compress.augmentation.stop_words import STOP_WORDS

# Signs that belong to the letter before them, as vowels do in Hindi; `re` does not count them as letters.
_MARKS = "".join(chr(code) for code in range(0x300, 0x10000) if unicodedata.category(chr(code)).startswith("M")) + "\u200c\u200d"
_RUN = rf"[^\W_](?:[^\W_]|[{_MARKS}])*"
_WORD = re.compile(rf"\d+(?:[.,]\d+)+|{_RUN}")
_APOSTROPHES = "'\u2019"
_ENDINGS = {"s", "t", "d", "m", "ll", "re", "ve"}  # of contractions, and the possessive
_LETTERS = re.compile(r"[a-zA-Z]+")
# What may be put in place of a word: letters and digits, parts of it joined by one other sign or space (well-known, New York).
_WHOLE_WORD = re.compile(rf"{_RUN}(?:[-.,'\u2019/& ]{_RUN})*")

Span = tuple[int, int]


@dataclass(frozen=True)
class Word:
    """A word of a text.

    Attributes:
        start, end: its characters.
        text: as it stands there.
        single_piece: whether it is one token of the masked LM's tokenizer; False where there is none.
    """

    start: int
    end: int
    text: str
    single_piece: bool = False


@dataclass(frozen=True)
class Sentence:
    """A text, and those of its words that may be replaced, in order."""

    text: str
    words: tuple[Word, ...]


def spans_of(text: str, parts: Sequence[Span] | None = None) -> list[Span]:
    """Where words stand that may be replaced.

    Args:
        text: the text.
        parts: what the tokenizer takes for words (Chinese characters one by one, digits apart from letters); a word does not reach from
            one into the next. None for the whole text.
    """
    spans = []
    for part_start, part_end in [(0, len(text))] if parts is None else parts:
        for found in _WORD.finditer(text, part_start, part_end):
            if not _in_contraction(text, *found.span()):
                spans.append(found.span())
    return spans


def may_be_replaced(word: str, *, as_released: bool, skip_stop_words: bool) -> bool:
    """Whether the reading of the algorithm allows it: the released code replaces words of the letters a-z only."""
    if as_released and not _LETTERS.fullmatch(word):
        return False
    return not (skip_stop_words and word.lower() in STOP_WORDS)


def is_whole_word(text: str) -> bool:
    """Whether this may stand in place of a word: letters and digits, no mere punctuation."""
    return _WHOLE_WORD.fullmatch(text) is not None


def in_case_of(word: str, replaced: str) -> str:
    """A replacement as the word that it replaces was written: Title, UPPER; else as it is.

    >>> in_case_of("dog", "Cat"), in_case_of("dog", "CAT"), in_case_of("Paris", "cat")
    ('Dog', 'DOG', 'Paris')
    """
    if len(replaced) > 1 and replaced.isupper():
        return word.upper()
    if replaced[:1].isupper():
        return word[:1].upper() + word[1:]
    return word


def _in_contraction(text: str, start: int, end: int) -> bool:
    """Whether this is the s of it's (or of it 's), or the didn of didn't."""
    if start and text[start - 1] in _APOSTROPHES and text[start:end].lower() in _ENDINGS:
        return True
    after = text[end : end + 3].lower()
    return len(after) > 1 and after[0] in _APOSTROPHES and after[1] == "t" and not after[2:].isalnum()
