"""A masked language model by its name."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForMaskedLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from hf_compress.augmentation.masked_words import check_tokenizer
from hf_compress.errors import ArgumentError


def load_masked_lm(source: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A masked LM in float32, on the GPU if there is one, and its tokenizer.

    Args:
        source: a folder, or a name on the hub.

    Raises:
        ArgumentError: there is none, its tokenizer is slow or has no mask token, or its head that predicts words is not among its weights.
    """
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError) as error:
        raise ArgumentError(f"--mlm {source}: there is no masked LM with a tokenizer there: {_first_line(error)}") from error
    # Where there are no files, transformers 5 makes a tokenizer that knows its special tokens and no word.
    if tokenizer.vocab_size <= len(tokenizer.all_special_tokens):
        raise ArgumentError(f"--mlm {source}: there is no tokenizer in it. Copy the tokenizer's files there.")
    check_tokenizer(tokenizer)
    try:
        model, about = AutoModelForMaskedLM.from_pretrained(source, dtype=torch.float32, output_loading_info=True)
    except (OSError, ValueError, KeyError) as error:
        raise ArgumentError(f"--mlm {source} is no masked LM: {_first_line(error)}") from error
    missing = sorted(about["missing_keys"])
    if missing:
        raise ArgumentError(
            f"--mlm {source} has no weights for the head that predicts words ({missing[0]}), so its words would be random. Give a masked "
            "LM, such as bert-base-uncased, not an encoder or a classifier."
        )
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    return model, tokenizer


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
