"""`Seq2SeqDistillTrainer`: `DistillTrainer` with generation in its evaluation.

A file of its own: importing transformers' Seq2SeqTrainer binds its base class, which `hf-compress run` may yet replace.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedModel, Seq2SeqTrainer, Seq2SeqTrainingArguments

from hf_compress.errors import ArgumentError
from hf_compress.trainer import DistillTrainer


class Seq2SeqDistillTrainer(DistillTrainer, Seq2SeqTrainer):
    """A `transformers.Seq2SeqTrainer` that distils: training is `DistillTrainer`'s, evaluation may generate (`--predict_with_generate`).

    Args and errors as in `DistillTrainer`; losses on layers compare encoder and decoder alike, unless they name a stack.

    Raises:
        ArgumentError: `args` are no Seq2SeqTrainingArguments, so they do not say how to generate.
    """

    def __init__(self, model: PreTrainedModel | nn.Module | None = None, args: Any = None, *positional: Any, **kwargs: Any) -> None:
        if not isinstance(args, Seq2SeqTrainingArguments):
            raise ArgumentError(
                f"Seq2SeqDistillTrainer needs Seq2SeqTrainingArguments, and was given {type(args).__name__ if args else 'none'}. For a "
                "script or a task that generates nothing take DistillTrainer (--trainer_class DistillTrainer)."
            )
        super().__init__(model, args, *positional, **kwargs)
