"""Tiny masked LMs with real fast tokenizers of their own, and word vectors on disk."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from tests.tiny_models import tiny_model

WORDS = re.findall(
    r"\w+",
    """the cat dog bird sat ran slept on under near a mat table red green old new house garden man woman saw heard big small he she it they
    quickly slowly and but with without is was 12 7 paris""",
)
TEXTS = [
    "The cat sat on the old mat , quickly .",
    "A small dog ran under the table .",
    "She heard 12 birds near the green garden ( the house ) .",
    "They saw it .",
]
ARCHITECTURES = ("bert", "roberta", "modernbert")


def masked_lm(architecture: str, *, seed: int = 0, **config: Any) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """A tiny model of random weights and its tokenizer: word pieces for BERT, byte-level pairs for RoBERTa and ModernBERT."""
    tokenizer = word_pieces() if architecture == "bert" else byte_pairs(architecture)
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos", "cls", "sep")}
    known = {name: value for name, value in ids.items() if value is not None and (architecture != "bert" or name == "pad_token_id")}
    model = tiny_model(architecture, num_layers=2, head="masked_lm", vocab_size=len(tokenizer) + 3, seed=seed, **{**known, **config})
    return model, tokenizer


def save_masked_lm(folder: Path, architecture: str = "bert") -> str:
    """Such a model on disk."""
    model, tokenizer = masked_lm(architecture)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def word_pieces(**special: str | None) -> PreTrainedTokenizerFast:
    """BERT's kind: lower case, [CLS] text [SEP]."""
    tokens = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]", **special}
    pieces = [*filter(None, tokens.values()), *"abcdefghijklmnopqrstuvwxyz.,()'-", *WORDS, "##s", "##ing", "##er", "##ly"]
    pieces += [f"##{letter}" for letter in "abcdefghijklmnopqrtuvwxyz"]
    tokenizer = Tokenizer(models.WordPiece({piece: number for number, piece in enumerate(dict.fromkeys(pieces))}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix="##")
    return _wrapped(tokenizer, tokens, "[CLS]", "[SEP]")


def byte_pairs(architecture: str) -> PreTrainedTokenizerFast:
    """RoBERTa's and ModernBERT's kind, with a space before a word as part of it."""
    names = ("<pad>", "<unk>", "<s>", "</s>", "<mask>") if architecture == "roberta" else ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
    tokens = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), names, strict=True))
    tokenizer = Tokenizer(models.BPE(unk_token=names[1]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(special_tokens=list(names), initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    sentences = [f"{first} {' '.join(WORDS)}" for first in ("The", "A", "She", "They", "the")]
    tokenizer.train_from_iterator(sentences * 5, trainer)
    if architecture == "roberta":
        tokens |= {"bos_token": names[2], "eos_token": names[3]}
    return _wrapped(tokenizer, tokens, names[2], names[3])


def write_vectors(path: Path, vectors: Mapping[str, Sequence[float]]) -> Path:
    """A text file of word vectors, as GloVe's."""
    path.write_text("".join(f"{word} {' '.join(map(str, vector))}\n" for word, vector in vectors.items()), encoding="utf-8")
    return path


def _wrapped(tokenizer: Tokenizer, tokens: Mapping[str, str | None], first: str, last: str) -> PreTrainedTokenizerFast:
    special = [(token, tokenizer.token_to_id(token)) for token in (first, last)]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{first} $A {last}", pair=f"{first} $A {last} $B:1 {last}:1", special_tokens=special
    )
    wrap: Callable[..., PreTrainedTokenizerFast] = PreTrainedTokenizerFast
    names = ["input_ids", "token_type_ids", "attention_mask"] if first == "[CLS]" and "[MASK]" in tokens.values() else None
    return wrap(tokenizer_object=tokenizer, **({"model_input_names": names} if names else {}), **tokens)
