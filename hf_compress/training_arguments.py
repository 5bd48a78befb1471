"""`TrainingArguments` with the flags of hf_compress: one's own script parses these in place of transformers' own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import transformers.trainer
from transformers import Seq2SeqTrainingArguments, TrainingArguments

from hf_compress.arguments import CompressionArguments
from hf_compress.callbacks import UnusedFlagsCallback
from hf_compress.deepspeed_configs import named_config


def _watch_for_unused_flags(flags: CompressionArguments) -> None:
    """From the first flag on, every Trainer of this process looks whether its arguments hold flags that nobody takes."""
    callbacks: list[Any] = transformers.trainer.DEFAULT_CALLBACKS
    if flags.given and UnusedFlagsCallback not in callbacks:
        callbacks.append(UnusedFlagsCallback)


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
        self.deepspeed = named_config(self.deepspeed)
        finish: Callable[[], None] = super(CompressionArguments, self).__post_init__
        finish()
        _watch_for_unused_flags(self)


@dataclass
class Seq2SeqDistillTrainingArguments(CompressionArguments, Seq2SeqTrainingArguments):
    """The same for `transformers.Seq2SeqTrainingArguments`, which add generation to evaluation.

    Raises:
        ArgumentError: a flag of hf_compress is unknown, malformed or contradicts another.
    """

    def __post_init__(self) -> None:
        CompressionArguments.__post_init__(self)
        self.deepspeed = named_config(self.deepspeed)
        finish: Callable[[], None] = super(CompressionArguments, self).__post_init__
        finish()
        _watch_for_unused_flags(self)
