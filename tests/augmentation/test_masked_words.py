"""The masked LM's words: the same as one forward a word gives, in whatever batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import BertTokenizerLegacy, PreTrainedModel, PreTrainedTokenizerFast

from hf_compress.augmentation.masked_words import MaskedWords, Question, window
from hf_compress.augmentation.words import spans_of
from hf_compress.errors import ArgumentError
from tests.augmentation.small_masked_lms import ARCHITECTURES, TEXTS, masked_lm, word_pieces
from tests.tiny_models import tiny_model


def questions_about(asked: MaskedWords, texts: list[str], *, beside: bool = False) -> list[Question]:
    """One for each word of one piece."""
    found = []
    for text, (parts, single) in zip(texts, asked.parts_of(texts), strict=True):
        found += [Question(text, *span, text if beside else None) for span in spans_of(text, parts) if span in single]
    return found


def plain_words(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, question: Question, count: int, *, released: bool = False
) -> set[str]:
    """One forward, the logits of all tokens, and a loop over the whole vocabulary."""
    encoded = tokenizer(question.text, question.beside, return_offsets_mapping=True, return_tensors="pt")
    offsets, sides = encoded.pop("offset_mapping")[0].tolist(), encoded.sequence_ids(0)
    (place,) = [
        place
        for place, (start, end) in enumerate(offsets)
        if sides[place] == 0 and question.text[start:end].strip() and start < question.end and question.start < end
    ]
    replaced = tokenizer.convert_ids_to_tokens(encoded["input_ids"][0, place].item())
    encoded["input_ids"][0, place] = tokenizer.mask_token_id
    with torch.no_grad():
        logits = model(**encoded).logits[0, place]
    own = question.text[question.start : question.end].lower()
    chosen: list[str] = []
    raw = 0
    for entry in logits.argsort(descending=True).tolist():
        piece = tokenizer.convert_ids_to_tokens(entry) if entry < len(tokenizer) else None
        if piece is None:
            continue
        raw += 1
        if released and raw > count:
            break
        word = piece.lstrip("\u0120")
        fits = not piece.startswith("##") and piece.startswith("\u0120") == replaced.startswith("\u0120")
        if released:
            chosen += [piece] if fits else []
        elif fits and word.isalnum() and word.isascii() and word.lower() not in [own, *map(str.lower, chosen)]:
            chosen.append(word)
        if not released and len(chosen) == count:
            break
    return set(chosen)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_words_are_those_of_one_forward_a_word(architecture: str) -> None:
    model, tokenizer = masked_lm(architecture)
    asked = MaskedWords(model, tokenizer, num_candidates=5)
    questions = questions_about(asked, TEXTS)
    assert len(questions) > 15
    for question, found in zip(questions, asked.candidates(questions), strict=True):
        assert len(found) == 5
        assert set(found) == plain_words(model, tokenizer, question, 5), question


def test_the_released_code_asks_with_the_original_beside_and_filters_afterwards() -> None:
    model, tokenizer = masked_lm("bert")
    asked = MaskedWords(model, tokenizer, num_candidates=12, as_released=True)
    questions = questions_about(asked, TEXTS, beside=True)
    answers = [set(found) for found in asked.candidates(questions)]
    assert answers == [plain_words(model, tokenizer, question, 12, released=True) for question in questions]
    assert {len(found) for found in answers} - {12}  # some were pieces that continue a word
    alone = MaskedWords(model, tokenizer, num_candidates=12, as_released=True)
    assert [set(found) for found in alone.candidates(questions_about(alone, TEXTS))] != answers


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_company_changes_nothing(architecture: str) -> None:
    model, tokenizer = masked_lm(architecture)
    together = MaskedWords(model, tokenizer, num_candidates=4)
    questions = questions_about(together, TEXTS)
    answers = together.candidates(questions)
    assert together.forwards < len(questions) / 4
    small = MaskedWords(model, tokenizer, num_candidates=4, batch_tokens=30)
    assert small.candidates(questions) == answers
    backwards = MaskedWords(model, tokenizer, num_candidates=4, batch_tokens=50)
    assert backwards.candidates(questions[::-1])[::-1] == answers


def test_where_logits_are_nearly_equal_a_question_is_asked_alone() -> None:
    model: Any
    model, tokenizer = masked_lm("bert")
    with torch.no_grad():
        head = model.get_output_embeddings()
        head.weight.mul_(1e-7)  # what tells words apart is less than float noise
        head.bias.fill_(1.0)
    asked = MaskedWords(model, tokenizer, num_candidates=4)
    questions = questions_about(asked, TEXTS)[:6]
    answers = asked.candidates(questions)
    assert asked.forwards == 1 + len(questions)
    one_by_one = MaskedWords(model, tokenizer, num_candidates=4)
    assert [one_by_one.candidates([question])[0] for question in questions] == answers


def test_nothing_is_asked_twice() -> None:
    model, tokenizer = masked_lm("bert")
    asked = MaskedWords(model, tokenizer)
    questions = questions_about(asked, TEXTS)
    rows = []
    handle = model.register_forward_pre_hook(lambda module, args, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True)
    first = asked.candidates(questions * 3)
    assert sum(rows) == len(set(questions))
    assert asked.candidates(questions[::-1])[::-1] == first[: len(questions)] and sum(rows) == len(set(questions))
    asked.forget()
    asked.candidates(questions[:2])
    assert sum(rows) == len(set(questions)) + 2
    handle.remove()


def test_the_vocabulary_projection_sees_the_masked_positions_alone() -> None:
    model: Any
    model, tokenizer = masked_lm("bert")
    asked = MaskedWords(model, tokenizer)
    seen = []
    model.get_output_embeddings().register_forward_hook(lambda module, args, output: seen.append(tuple(args[0].shape)))
    questions = questions_about(asked, TEXTS)
    asked.candidates(questions)
    assert seen == [(len(questions), model.config.hidden_size)]
    model(torch.tensor([[5, 6, 7]]))
    assert seen[-1] == (1, 3, model.config.hidden_size)  # and all others in everybody else's forward


def test_a_long_text_is_read_around_the_word() -> None:
    model, tokenizer = masked_lm("bert", max_position_embeddings=12)
    text = " ".join(f"the cat sat on {colour} mat" for colour in ("red", "green", "old", "new", "big"))
    asked = MaskedWords(model, tokenizer, num_candidates=3)
    places = [text.index(word) for word in ("red", "old", "big")]
    answers = asked.candidates([Question(text, place, place + 3) for place in places])
    start, end = places[1] - len("cat sat on the "), 0
    words = text.split()
    middle = " ".join(words[words.index("old") - 5 : words.index("old") + 5])
    start = middle.index("old")
    end = start + 3
    assert asked.candidates([Question(middle, start, end)]) == answers[1:2]
    assert [len(found) for found in answers] == [3, 3, 3]


def test_the_window_holds_the_special_tokens_and_the_mask() -> None:
    assert window(8, 3, 10, 1, 1) == list(range(8))
    assert window(20, 1, 6, 1, 1) == [0, 1, 2, 3, 4, 19]
    assert window(20, 10, 6, 1, 1) == [0, 8, 9, 10, 11, 19]
    assert window(20, 18, 6, 1, 1) == [0, 15, 16, 17, 18, 19]


def test_a_tokenizer_without_a_mask_token_is_refused() -> None:
    model, _ = masked_lm("bert")
    with pytest.raises(ArgumentError, match="has no mask token, so its model is no masked LM"):
        MaskedWords(model, word_pieces(mask_token=None))


def test_a_slow_tokenizer_is_refused(tmp_path: Any) -> None:
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\nthe\n")
    slow = BertTokenizerLegacy(str(tmp_path / "vocab.txt"))
    with pytest.raises(ArgumentError, match="is a slow one, which does not tell where its tokens stand"):
        MaskedWords(masked_lm("bert")[0], slow)


def test_a_model_without_a_head_for_words_is_refused() -> None:
    with pytest.raises(ArgumentError, match="BertForSequenceClassification has no head that predicts words"):
        MaskedWords(tiny_model("bert"), word_pieces())
