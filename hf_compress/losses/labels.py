"""The task's own loss on the hard labels."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor

from hf_compress.errors import LossError
from hf_compress.losses.loss import Loss, Phase
from hf_compress.losses.reduction import EXAMPLES, LABELS, Batch, full_precision
from hf_compress.signals import Signals, SignalSpec
from hf_compress.task import ModelShape


@dataclass(frozen=True)
class LabelsLoss(Loss):
    """The loss that the model computes from its labels: cross-entropy, squared error, whatever its head does.

        sum over labels of the model's own loss

    The model returns a mean over this micro-batch's labels; the trainer multiplies by their number (`of_mean`). Use it beside
    `LogitsLoss` where labels are plenty and clean; TinyBERT goes without it.
    """

    name: ClassVar[str] = "labels"
    phase: ClassVar[Phase] = "prediction"
    needs_teacher: ClassVar[bool] = False
    counts_examples: bool = field(default=False, kw_only=True)  # filled in by resolve()

    def resolve(self, student: ModelShape, teacher: ModelShape) -> tuple[Loss, ...]:
        """A multiple-choice or unknown head averages over examples, the others over labels."""
        return (replace(self, counts_examples=student.kind in ("multiple_choice", "other")),)

    @property
    def unit(self) -> str:
        """Labels that are not ignored; examples where the head has no ignored ones."""
        return EXAMPLES if self.counts_examples else LABELS

    def student_spec(self) -> SignalSpec:
        """Nothing beside the model's own loss."""
        return SignalSpec()

    def teacher_spec(self) -> SignalSpec:
        """Nothing."""
        return SignalSpec()

    def __call__(self, student: Signals, teacher: Signals, batch: Batch) -> Tensor:
        """Not computed from signals.

        Raises:
            LossError: always; the trainer calls `of_mean`.
        """
        raise LossError("LabelsLoss is the model's own loss: give its mean to of_mean().")

    def of_mean(self, mean: Tensor, batch: Batch) -> Tensor:
        """The sum over labels, from their mean over this batch (a scalar)."""
        count = batch.count(self.unit)
        # The mean over no labels is NaN; a micro-batch without labels adds nothing.
        return torch.where(count > 0, full_precision(mean) * count, torch.zeros_like(count))
