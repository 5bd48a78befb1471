"""A little English of few words, and tiny models on disk with a tokenizer that reads it."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from tests.tiny_models import tiny_model

NOUNS = ("room", "bed", "garden", "street", "kitchen", "window", "table", "river")
GOOD = ("clean", "quiet", "bright", "warm")
BAD = ("dirty", "loud", "dark", "cold")
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
WORDS = (*SPECIAL, "the", "was", "and", "very", "bad", "good", *NOUNS, *GOOD, *BAD)


def sentence(generator: random.Random, adjectives: tuple[str, ...]) -> str:
    """Four to eight words."""
    first = f"the {generator.choice(NOUNS)} was {generator.choice(adjectives)}"
    return first if generator.random() < 0.5 else f"{first} and very {generator.choice(adjectives)}"


def sentences(count: int, *, seed: int = 0) -> list[str]:
    """Raw text."""
    generator = random.Random(seed)
    return [sentence(generator, generator.choice((GOOD, BAD))) for _ in range(count)]


def labelled(count: int, *, seed: int = 0) -> list[tuple[str, str]]:
    """Sentences that are good or bad, all different."""
    generator = random.Random(seed)
    rows: dict[str, str] = {}
    while len(rows) < count:
        label = ("bad", "good")[len(rows) % 2]
        rows.setdefault(sentence(generator, GOOD if label == "good" else BAD), label)
    return list(rows.items())


def tokenizer() -> PreTrainedTokenizerFast:
    """Word by word, with [CLS] and [SEP] around."""
    inner = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
    return PreTrainedTokenizerFast(tokenizer_object=inner, model_max_length=40, **names)


def model_folder(folder: Path, *, num_layers: int = 4, head: str = "base", seed: int = 1, **config: Any) -> str:
    """A tiny BERT on disk, with its tokenizer."""
    tiny_model("bert", num_layers=num_layers, head=head, seed=seed, vocab_size=len(WORDS), **config).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return str(folder)
