"""The augmenter: rows in, and rows with copies of their texts out; for `datasets.map`, and for files (`augment_file.py`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import repeat
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_compress.augmentation.copies import Request, Sources, make_copies
from hf_compress.augmentation.masked_words import MaskedWords, words_in
from hf_compress.augmentation.settings import AugmentationSettings, Candidates, Faithful
from hf_compress.augmentation.word_vectors import WordVectors
from hf_compress.augmentation.words import Sentence, Span, may_be_replaced, spans_of
from hf_compress.errors import ArgumentError, DataError

Texts = tuple[str, ...]


class Augmenter:
    """Makes copies of texts in which words were replaced by others that fit (TinyBERT, arXiv 1909.10351, Algorithm 1).

    Each word is replaced with probability p by one of K candidates: of a word that is one token of the masked LM, the K most probable
    in its place; of any other, its K nearest neighbours among word vectors. With only one of the two, that one serves for all words.
    Nothing else of a text changes. In a row with two texts either is changed in turn beside the original of the other.

    Args:
        text_columns: the columns whose texts are copied.
        masked_lm: a masked LM, such as BertForMaskedLM; None to use vectors alone.
        tokenizer: the masked LM's own, a fast one.
        vectors: a text file of GloVe or word2vec; None to use the masked LM alone.
        probability, num_copies, num_candidates, seed, candidates, keep_stop_words, faithful: see `AugmentationSettings`.
        batch_tokens: tokens a forward of the masked LM, padding included; it changes the speed, not the copies.

    The copies of a row hang on the seed and on its texts alone: not on its place, the batch, or the rows beside it. On CPU and in float32
    that is exact.

    Raises:
        ArgumentError: neither masked LM nor vectors, a tokenizer that will not do, or a number out of its range.
        DataError: the vectors cannot be read.

    Example:
        >>> augmenter = Augmenter(["sentence1", "sentence2"], model, tokenizer, vectors="glove.6B.300d.txt", num_copies=4)  # doctest: +SKIP
        >>> more = train.map(augmenter, batched=True, remove_columns=train.column_names)  # doctest: +SKIP
    """

    def __init__(
        self,
        text_columns: Sequence[str],
        masked_lm: PreTrainedModel | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        vectors: str | None = None,
        probability: float = 0.4,
        num_copies: int = 20,
        num_candidates: int = 15,
        seed: int = 42,
        candidates: Candidates | None = None,
        keep_stop_words: bool = False,
        faithful: Faithful | None = None,
        batch_tokens: int | None = None,
    ) -> None:
        self.settings = AugmentationSettings(probability, num_copies, num_candidates, seed, candidates, keep_stop_words, faithful)
        if isinstance(text_columns, str) or not text_columns:
            raise ArgumentError(f"text_columns is {text_columns!r}; expected a list of names, such as ['sentence1', 'sentence2'].")
        if masked_lm is None and vectors is None:
            raise ArgumentError("There is nothing to take words from: give a masked LM (--mlm), word vectors (--vectors), or both.")
        if masked_lm is not None and tokenizer is None:
            raise ArgumentError("The masked LM needs its tokenizer as well: Augmenter(columns, model, tokenizer).")
        self.text_columns = tuple(text_columns)
        known: dict[str, Any] = {"num_candidates": num_candidates, "as_released": self.settings.as_released}
        self.vectors = None if vectors is None else WordVectors(vectors, **known)
        self.masked_words: MaskedWords | None = None
        if masked_lm is not None and tokenizer is not None:
            self.masked_words = MaskedWords(masked_lm, tokenizer, batch_tokens=batch_tokens, **known)
        self.sources = Sources(
            self.masked_words.candidates if self.masked_words else None, self.vectors.candidates if self.vectors else None
        )

    def __call__(self, batch: Mapping[str, Sequence[Any]]) -> dict[str, list[Any]]:
        """A batch of `datasets.map(batched=True, remove_columns=...)`: each row, followed by its copies, the other columns the same.

        Raises:
            DataError: a text column is missing, or holds something that is no text.
        """
        missing = [column for column in self.text_columns if column not in batch]
        if missing:
            raise DataError(f"The data has no column '{missing[0]}'; its columns are: {', '.join(batch)}.")
        rows = list(zip(*(batch[column] for column in self.text_columns), strict=True))
        for column, values in batch.items():
            for value in values if column in self.text_columns else ():
                if not isinstance(value, str):
                    raise DataError(f"The column '{column}' holds {value!r}, which is no text.")
        out: dict[str, list[Any]] = {column: [] for column in batch}
        for number, copies in enumerate(self.copies(rows)):
            for texts in with_copies(rows[number], copies):
                changed = dict(zip(self.text_columns, texts, strict=True))
                for column, values in batch.items():
                    out[column].append(changed.get(column, values[number]))
        return out

    def copies(self, rows: Sequence[Texts]) -> list[list[list[str]]]:
        """The copies of each row's texts: by row, by column, up to `num_copies` of them.

        Args:
            rows: each with a text for every text column.
        """
        sentences = iter(self.sentences([text for row in rows for text in row]))
        requests = []
        for row in rows:
            content = "\x1f".join(row)
            requests += [Request(next(sentences), f"{column} {content}") for column in range(len(row))]
        found = iter(make_copies(requests, self.sources, self.settings))
        return [[next(found) for _ in row] for row in rows]

    def sentences(self, texts: Sequence[str]) -> list[Sentence]:
        """The texts with those of their words that may be replaced."""
        settings = self.settings
        nothing: tuple[None, set[Span]] = (None, set())
        parts = self.masked_words.parts_of(texts) if self.masked_words else repeat(nothing, len(texts))
        return [
            Sentence(
                text,
                tuple(
                    word
                    for word in words_in(text, spans_of(text, places), single)
                    if may_be_replaced(word.text, as_released=settings.as_released, skip_stop_words=settings.skips_stop_words)
                ),
            )
            for text, (places, single) in zip(texts, parts, strict=True)
        ]


def with_copies(row: Texts, copies: Sequence[Sequence[str]]) -> list[Texts]:
    """A row and its copies, no two the same: the row itself, then those with another first text, then those with another second one."""
    rows = {row: None}
    for column, texts in enumerate(copies):
        rows.update({(*row[:column], text, *row[column + 1 :]): None for text in texts})
    return list(rows)
