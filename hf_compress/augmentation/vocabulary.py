"""What the entries of a masked LM's vocabulary are to the text: whole words, continuations of words, or neither."""

from __future__ import annotations

from typing import Any

import torch
from tokenizers.models import WordPiece
from transformers import PreTrainedTokenizerBase

from hf_compress.augmentation.words import is_whole_word

# How byte-level and sentence-piece vocabularies mark that a space stands before.
_SPACES = ("\u0120", "\u2581")


class Vocabulary:
    """The entries of a tokenizer's vocabulary as candidates.

    Args:
        tokenizer: a fast one.
        size: how many logits the model has; entries beyond the tokenizer's are no candidates.
        words_only: whether entries that are special tokens or no word are left out.

    Attributes:
        texts: by entry, what it is in a text.
        groups: by entry, a number that entries share which differ in case, or in the space before, alone.
        joins: by entry, whether it stands without a space before: ##ing, and in byte-level vocabularies also what begins a text or
            follows a bracket. An entry is a candidate for those of its own kind only.
        allowed: bool (2, size), by whether the entry that is replaced joins.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, size: int, *, words_only: bool) -> None:
        backend: Any = tokenizer.backend_tokenizer
        count = min(size, len(tokenizer))
        pieces = [piece or "" for piece in tokenizer.convert_ids_to_tokens(list(range(count)))]
        prefix = backend.model.continuing_subword_prefix if isinstance(backend.model, WordPiece) else None
        if prefix is None:
            decoded = backend.decode_batch([[entry] for entry in range(count)], skip_special_tokens=False)
            self.texts = [text.strip() for text in decoded]
            self.joins = [not piece.startswith(_SPACES) for piece in pieces]
        else:
            self.texts = [piece.removeprefix(prefix) for piece in pieces]
            self.joins = [piece.startswith(prefix) for piece in pieces]
        self._numbers: dict[str, int] = {}
        self.groups = [self._numbers.setdefault(text.lower(), len(self._numbers)) for text in self.texts]
        special = set(tokenizer.all_special_ids)
        known, joins = torch.zeros(size, dtype=torch.bool), torch.zeros(size, dtype=torch.bool)
        joins[:count] = torch.tensor(self.joins, dtype=torch.bool)
        known[:count] = torch.tensor(
            [not words_only or (entry not in special and is_whole_word(self.texts[entry])) for entry in range(count)]
        )
        self.allowed = torch.stack([known & ~joins, known & joins]) if words_only else torch.stack([known, known])

    def group_of(self, word: str) -> int:
        """The group of a word of the text; -1 if no entry is that word."""
        return self._numbers.get(word.lower(), -1)
