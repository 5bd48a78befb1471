"""`TrainingArguments` with the flags of hf_compress: one's own script parses these in place of transformers' own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from transformers import Seq2SeqTrainingArguments, TrainingArguments

from hf_compress.arguments import CompressionArguments


@dataclass
class DistillTrainingArguments(CompressionArguments, TrainingArguments):
    """All fields of `transformers.TrainingArguments`, and one for each flag of hf_compress.

    Example:
        >>> parser = HfArgumentParser((ModelArguments, DataArguments, DistillTrainingArguments))

    Raises:
        ArgumentError: a flag of hf_compress is unknown, malformed or contradicts another.
    """

    def __post_init__(self) -> None:
        CompressionArguments.__post_init__(self)
        finish: Callable[[], None] = super(CompressionArguments, self).__post_init__
        finish()


@dataclass
class Seq2SeqDistillTrainingArguments(CompressionArguments, Seq2SeqTrainingArguments):
    """The same for `transformers.Seq2SeqTrainingArguments`, which add generation to evaluation.

    Raises:
        ArgumentError: a flag of hf_compress is unknown, malformed or contradicts another.
    """

    def __post_init__(self) -> None:
        CompressionArguments.__post_init__(self)
        finish: Callable[[], None] = super(CompressionArguments, self).__post_init__
        finish()
