"""What a masked language model would put in place of words: many sentences' questions in one forward.

    questions -> those not asked before -> tokenized -> the word's tokens become one [MASK] -> sorted by length, so many tokens a batch
              -> hidden states of the masked positions alone -> vocabulary projection -> the K most probable

A question is a text and a place in it. The answer is a set, sorted by entry of the vocabulary, and the same in whatever company it was
asked: float noise depends on the batch, so where the K-th and the next are nearly equal the question is asked once more, alone.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_compress.augmentation.vocabulary import Vocabulary
from hf_compress.augmentation.words import Span, Word
from hf_compress.errors import ArgumentError

# What one forward gets, padding included: enough for a GPU to be busy, little enough for a processor's caches.
BATCH_TOKENS = {"cuda": 32768}
CPU_BATCH_TOKENS = 1024
_LOGITS_BYTES = 1 << 28  # of one forward's answers: with a large vocabulary a batch has fewer questions
_SPARE = 16  # more entries are looked at than are wanted, since some are other spellings of the same word
_NOISE = 2e-5  # logits that differ by less, as a share of the largest, may change places from batch to batch
_REMEMBERED = 200_000  # answers


@dataclass(frozen=True)
class Question:
    """Which words could stand there?

    Attributes:
        text: with the word still in it.
        start, end: the word's characters.
        beside: a second text for the model to read beside it, unmasked; None for none.
    """

    text: str
    start: int
    end: int
    beside: str | None = None


@dataclass(frozen=True)
class _Row:
    """A question as the model reads it.

    Attributes:
        inputs: ids by name, without padding.
        position: of the mask.
        joins: whether the masked token stands without a space before; see Vocabulary.
        group: the vocabulary's group of the word itself.
    """

    inputs: dict[str, list[int]]
    position: int
    joins: bool
    group: int


class MaskedWords:
    """A masked LM that is asked for words.

    Args:
        model: with a masked-LM head; it is put into evaluation mode. Answers are independent of the batch in float32 only.
        tokenizer: the model's own, a fast one with a mask token.
        num_candidates: K.
        as_released: the K most probable entries of any kind, and of these the ones that begin a word; by default the K most probable
            whole words, without the one that is replaced.
        batch_tokens: tokens a forward, padding included; by default 32768 on a GPU and 1024 elsewhere.

    Raises:
        ArgumentError: the tokenizer is slow or has no mask token, or the model has no head that gives a logit for each word.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        num_candidates: int = 15,
        as_released: bool = False,
        batch_tokens: int | None = None,
    ) -> None:
        check_tokenizer(tokenizer)
        self.model = cast(Any, model)
        head = self.model.get_output_embeddings()
        if not isinstance(head, nn.Module):
            raise ArgumentError(
                f"{type(model).__name__} has no head that predicts words, so it is no masked LM. Give a model such as BertForMaskedLM."
            )
        self.model.eval()
        self.tokenizer, self.num_candidates, self.as_released = tokenizer, num_candidates, as_released
        self._batch_tokens = batch_tokens or BATCH_TOKENS.get(model.device.type, CPU_BATCH_TOKENS)
        self._head = head
        self._size = int(model.config.get_text_config().vocab_size)
        self.vocabulary = Vocabulary(tokenizer, self._size, words_only=not as_released)
        self._longest = longest_input(model, tokenizer)
        self._takes = set(inspect.signature(model.forward).parameters)
        self.forwards = 0  # so far
        self._answers: dict[Question, tuple[int, ...]] = {}
        self._allowed = self.vocabulary.allowed.to(model.device)

    def __getstate__(self) -> dict[str, Any]:
        # What it has answered makes it no other: datasets.map goes by the hash of this.
        return {**self.__dict__, "_answers": {}, "forwards": 0}

    # --- words of a text ---

    def parts_of(self, texts: Sequence[str]) -> Iterator[tuple[list[Span], set[Span]]]:
        """What the tokenizer takes for words, and which stretches are one token (without spaces around), for each text, in characters."""
        for start in range(0, len(texts), 1000):
            batch = list(texts[start : start + 1000])
            for text, encoding in zip(batch, self._encoded(batch, None, special=False), strict=True):
                words: dict[int, Span] = {}
                for number, (first, last) in zip(encoding.word_ids, encoding.offsets, strict=True):
                    if number is not None:
                        words[number] = (min(first, words.get(number, (first, last))[0]), max(last, words.get(number, (first, last))[1]))
                yield list(words.values()), {trimmed(text, span) for span in encoding.offsets}

    # --- candidates ---

    def candidates(self, questions: Sequence[Question]) -> list[tuple[str, ...]]:
        """The K words for each question, fewer where there are not so many; sorted by their place in the vocabulary."""
        new = [question for question in dict.fromkeys(questions) if question not in self._answers]
        answers = dict(zip(new, self._ask(new), strict=True))
        found = [answers[question] if question in answers else self._answers[question] for question in questions]
        if len(self._answers) + len(answers) > _REMEMBERED:
            self._answers.clear()
        self._answers.update(answers)
        return [tuple(self.vocabulary.texts[entry] for entry in entries) for entries in found]

    def forget(self) -> None:
        """Forget all answers."""
        self._answers.clear()

    def _ask(self, questions: Sequence[Question]) -> list[tuple[int, ...]]:
        rows = self._rows(questions)
        answers: list[tuple[int, ...]] = [()] * len(rows)
        order = sorted(range(len(rows)), key=lambda number: -len(rows[number].inputs["input_ids"]))
        most = max(1, _LOGITS_BYTES // (4 * self._size))
        while order:
            count = max(1, min(most, self._batch_tokens // len(rows[order[0]].inputs["input_ids"])))
            batch, order = order[:count], order[count:]
            doubtful = []
            for number, (entries, sure) in zip(batch, self._answer([rows[number] for number in batch]), strict=True):
                answers[number] = entries
                if not sure and len(batch) > 1:
                    doubtful.append(number)
            for number in doubtful:
                ((answers[number], _),) = self._answer([rows[number]])
        return answers

    @torch.no_grad()
    def _answer(self, rows: Sequence[_Row]) -> list[tuple[tuple[int, ...], bool]]:
        """The chosen entries of each row of one batch, and whether no other batch could have given others."""
        logits = self._logits(rows).float()  # (rows, vocabulary)
        joins = torch.tensor([int(row.joins) for row in rows], device=logits.device)
        logits = logits.masked_fill(~self._allowed[joins], -torch.inf)
        best = logits.topk(min(self.num_candidates + _SPARE, logits.shape[1]), dim=1)
        found = zip(rows, best.indices.tolist(), best.values.tolist(), strict=True)
        return [self._chosen(row, entries, values) for row, entries, values in found]

    def _chosen(self, row: _Row, entries: list[int], values: list[float]) -> tuple[tuple[int, ...], bool]:
        chosen: list[int] = []
        last, sure = 0.0, True
        taken = {row.group: torch.inf}  # the best logit of a word in any spelling
        noise = _NOISE * max(1.0, abs(values[0]))
        for entry, value in zip(entries, values, strict=True):
            if value == -torch.inf:
                break
            group = self.vocabulary.groups[entry]
            if not self.as_released and group in taken:
                sure = sure and taken[group] - value > noise
                continue
            if len(chosen) == self.num_candidates:
                sure = sure and last - value > noise
                break
            taken[group] = last = value
            chosen.append(entry)
        if self.as_released:
            chosen = [entry for entry in chosen if self.vocabulary.joins[entry] == row.joins]
        return tuple(sorted(chosen)), sure

    def _logits(self, rows: Sequence[_Row]) -> Tensor:
        """(rows, vocabulary): the model's logits at the masked positions; the vocabulary projection sees no others."""
        device = self.model.device
        width = max(len(row.inputs["input_ids"]) for row in rows)
        padding = {"input_ids": self.tokenizer.pad_token_id or 0, "token_type_ids": 0, "attention_mask": 0}
        inputs = {
            name: torch.tensor([row.inputs[name] + [value] * (width - len(row.inputs[name])) for row in rows], device=device)
            for name, value in padding.items()
            if name in self._takes and name in rows[0].inputs
        }
        places = torch.tensor([row.position for row in rows], device=device)
        numbers = torch.arange(len(rows), device=device)
        with masked_positions_only(self._head, numbers, places):
            logits: Tensor = self.model(**inputs).logits
        self.forwards += 1
        # A head that is not called with hidden states (batch, time, width) has given logits of all positions.
        return logits if logits.dim() == 2 else logits[numbers, places]

    # --- a question as ids ---

    def _rows(self, questions: Sequence[Question]) -> list[_Row]:
        texts = list(dict.fromkeys((question.text, question.beside) for question in questions))
        encoded: dict[tuple[str, str | None], Any] = {}
        for paired in (False, True):
            chosen = [text for text in texts if (text[1] is not None) == paired]
            beside = [second or "" for _, second in chosen] if paired else None
            encoded.update(zip(chosen, self._encoded([first for first, _ in chosen], beside), strict=True))
        return [self._row(question, encoded[question.text, question.beside]) for question in questions]

    def _row(self, question: Question, encoding: Any) -> _Row:
        tokens = [
            number
            for number, (side, (start, end)) in enumerate(zip(encoding.sequence_ids, encoding.offsets, strict=True))
            if side == 0 and start < question.end and end > question.start
        ]
        assert tokens, f"no token holds {question.text[question.start : question.end]!r}"
        first, after = tokens[0], tokens[-1] + 1
        ids = encoding.ids
        if len(ids) - (after - first) + 1 > self._longest and question.beside is not None:
            alone = Question(question.text, question.start, question.end)
            return self._row(alone, self._encoded([question.text], None)[0])
        joins = self.vocabulary.joins[ids[first]] if ids[first] < self._size else False
        inputs = {"input_ids": [*ids[:first], self.tokenizer.mask_token_id, *ids[after:]]}
        if "token_type_ids" in self.tokenizer.model_input_names:
            inputs["token_type_ids"] = [*encoding.type_ids[: first + 1], *encoding.type_ids[after:]]
        special = [side is None for side in encoding.sequence_ids]
        kept = window(len(inputs["input_ids"]), first, self._longest, special.index(False), special[::-1].index(False))
        inputs = {name: [values[place] for place in kept] for name, values in inputs.items()}
        inputs["attention_mask"] = [1] * len(kept)
        group = self.vocabulary.group_of(question.text[question.start : question.end])
        return _Row(inputs, kept.index(first), joins, group)

    def _encoded(self, texts: list[str], beside: list[str] | None, *, special: bool = True) -> list[Any]:
        if not texts:
            return []
        encode: Any = self.tokenizer
        encodings: list[Any] = encode(texts, beside, add_special_tokens=special, truncation=False, padding=False, verbose=False).encodings
        return encodings


def words_in(text: str, spans: Sequence[Span], single: set[Span]) -> list[Word]:
    """The words at these places, each marked if it is a single token."""
    return [Word(start, end, text[start:end], (start, end) in single) for start, end in spans]


def check_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a tokenizer that cannot mask a word at its place in a text.

    Raises:
        ArgumentError: it is a slow one, or has no mask token.
    """
    name = getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
    if not tokenizer.is_fast:
        raise ArgumentError(
            f"The tokenizer of {name} ({type(tokenizer).__name__}) is a slow one, which does not tell where its tokens stand in the text. "
            "Give a masked LM with a fast tokenizer (a tokenizer.json in its folder)."
        )
    if tokenizer.mask_token_id is None:
        raise ArgumentError(f"The tokenizer of {name} has no mask token, so its model is no masked LM. Give one such as bert-base-uncased.")


def longest_input(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    """How many tokens the model reads at most."""
    config: Any = model.config.get_text_config()
    positions = getattr(config, "max_position_embeddings", None) or 512
    for module in model.modules():
        # RoBERTa counts positions from behind its padding's.
        if isinstance(module, nn.Embedding) and module.num_embeddings == positions and module.padding_idx is not None:
            return min(int(tokenizer.model_max_length), positions - module.padding_idx - 1)
    return min(int(tokenizer.model_max_length), positions)


def window(length: int, position: int, longest: int, leading: int, trailing: int) -> list[int]:
    """Which tokens of a long text are read: the special ones at both ends, and those around the masked one.

    Args:
        length: of the whole.
        position: of the mask.
        longest: how many tokens may stay.
        leading, trailing: special tokens at the ends.
    """
    if length <= longest:
        return list(range(length))
    room = longest - leading - trailing
    start = min(max(leading, position - room // 2), length - trailing - room)
    return [*range(leading), *range(start, start + room), *range(length - trailing, length)]


def trimmed(text: str, span: Span) -> Span:
    """The stretch without the spaces at its ends."""
    start, end = span
    while start < end and text[start].isspace():
        start += 1
    while end > start and text[end - 1].isspace():
        end -= 1
    return start, end


@contextmanager
def masked_positions_only(head: nn.Module, rows: Tensor, positions: Tensor) -> Iterator[None]:
    """Let the vocabulary projection see one position a row: (batch, time, width) becomes (batch, width) on the way in."""

    def gather(module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...] | None:
        hidden = arguments[0] if arguments else None
        return (hidden[rows, positions], *arguments[1:]) if isinstance(hidden, Tensor) and hidden.dim() == 3 else None

    handle = head.register_forward_pre_hook(gather)
    try:
        yield
    finally:
        handle.remove()
