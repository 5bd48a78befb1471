"""A word-piece tokenizer for the demo's corpus, trained on it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from hf_compress.report.corpus import Example

SPECIAL_TOKENS = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}


def train_tokenizer(examples: Sequence[Example], *, vocab_size: int = 1000, max_length: int = 64) -> PreTrainedTokenizerFast:
    """Train word pieces on both sentences, with BERT's format: [CLS] review [SEP] reply [SEP].

    Args:
        examples: the corpus.
        vocab_size: at most so many pieces, special tokens included.
        max_length: of a pair, in tokens.
    """
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix="##")
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size, special_tokens=list(SPECIAL_TOKENS.values()), continuing_subword_prefix="##", show_progress=False
    )
    texts = [text for example in examples for text in (example.review, example.reply)]
    tokenizer.train_from_iterator(texts, trainer)
    # The trainer breaks ties in an order that differs from run to run. The letters, and the pieces that the corpus ends up with, do not.
    used = {piece for encoding in tokenizer.encode_batch(texts) for piece in encoding.tokens}
    letters = {piece for piece in tokenizer.get_vocab() if len(piece.removeprefix("##")) == 1}
    pieces = [*SPECIAL_TOKENS.values(), *sorted((used | letters) - set(SPECIAL_TOKENS.values()))]
    tokenizer.model = models.WordPiece({piece: number for number, piece in enumerate(pieces)}, unk_token="[UNK]")
    special = [(token, tokenizer.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=special
    )
    wrap: Callable[..., PreTrainedTokenizerFast] = PreTrainedTokenizerFast
    return wrap(
        tokenizer_object=tokenizer,
        model_max_length=max_length,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
        **SPECIAL_TOKENS,
    )


def to_dataset(examples: Sequence[Example], tokenizer: PreTrainedTokenizerFast) -> Dataset:
    """What a Trainer reads: input_ids, token_type_ids, attention_mask (not padded) and label."""
    texts = [example.review for example in examples], [example.reply for example in examples]
    columns: dict[str, Any] = dict(tokenizer(*texts, truncation=True))
    return Dataset.from_dict({**columns, "label": [example.label for example in examples]})
