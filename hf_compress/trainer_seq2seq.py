"""`Seq2SeqDistillTrainer`: `DistillTrainer` with generation in its evaluation.

A file of its own: importing transformers' Seq2SeqTrainer binds its base class, which `hf-compress run` may yet replace.
"""

from __future__ import annotations

from transformers import Seq2SeqTrainer

from hf_compress.trainer import DistillTrainer


class Seq2SeqDistillTrainer(DistillTrainer, Seq2SeqTrainer):
    """A `transformers.Seq2SeqTrainer` that distils: training is `DistillTrainer`'s, evaluation may generate (`--predict_with_generate`).

    Args and errors as in `DistillTrainer`; losses on layers compare encoder and decoder alike, unless they name a stack.
    """
