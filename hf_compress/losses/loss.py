"""What every loss is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal, Self

from torch import Tensor

from hf_compress.errors import LossError
from hf_compress.losses.reduction import Batch
from hf_compress.signals import Signals, SignalSpec
from hf_compress.task import ModelShape

Phase = Literal["intermediate", "prediction"]


@dataclass(frozen=True)
class Projection:
    """A learnt linear map from the student's width to the teacher's, trained with the student and left out of the saved model.

    Attributes:
        bias: whether it adds one.
    """

    in_features: int
    out_features: int
    bias: bool = True


@dataclass(frozen=True)
class Loss(ABC):
    """A sum over units, to be divided by the units of the whole step.

    A loss is a value: two losses with the same settings are equal, and nothing in it changes while training. Whatever depends on the
    models (which layers, whether a projection is needed) is filled in once, by `resolve`.

    Attributes:
        weight: its factor in the total. A loss of weight 0 is not computed.
        final_weight: what the weight becomes, in a straight line from the first step of the training (or of its phase) to the last; None
            leaves it as it is.
        teacher: of several teachers the one that it learns from, counted from 1; None is each of them, or the only one.
    """

    weight: float = field(default=1.0, kw_only=True)
    final_weight: float | None = field(default=None, kw_only=True)
    teacher: int | None = field(default=None, kw_only=True)

    # As flags and logs call it; the phase of a two-phase run in which it takes part; whether it reads the teacher; whether it chooses the
    # teacher's layers itself and needs their states whole, so that no selection of hidden states goes with it; whether it reads attention.
    name: ClassVar[str]
    phase: ClassVar[Phase]
    needs_teacher: ClassVar[bool] = True
    whole_states: ClassVar[bool] = False
    sees_attention: ClassVar[bool] = False

    @abstractmethod
    def resolve(self, student: ModelShape, teacher: ModelShape) -> tuple[Loss, ...]:
        """Fill in what depends on the two models, or say why the loss does not fit them.

        Returns:
            One loss, or one for each stack of layers (encoder and decoder).

        Raises:
            LossError, LayerMapError: in the user's words.
        """

    def __str__(self) -> str:
        falling = "" if self.final_weight is None else f" to {self.final_weight:g}"
        return f"{self.weight:g}{falling} x {self.name}{'' if self.teacher is None else f' of teacher {self.teacher}'}"

    def weight_at(self, progress: float) -> float:
        """The weight in one step: `progress` is 0 in the first of the training, 1 in the last."""
        return self.weight if self.final_weight is None else self.weight + (self.final_weight - self.weight) * progress

    def times(self, factor: float) -> Self:
        """The same loss with another weight, from first to last."""
        final = None if self.final_weight is None else self.final_weight * factor
        return replace(self, weight=self.weight * factor, final_weight=final)

    def check_weight(self) -> None:
        """Refuse weights that are none.

        Raises:
            LossError: a weight that ends below 0, or begins at 0.
        """
        if self.final_weight is None:
            return
        if not 0 <= self.final_weight < float("inf"):
            raise LossError(f"{self.name} has the final weight {self.final_weight:g}; a weight is 0 or more.")
        if self.weight == 0:
            raise LossError(
                f"{self.name} has the weight 0, which leaves it out, and the final weight {self.final_weight:g}. Begin with 0.01."
            )

    @property
    @abstractmethod
    def unit(self) -> str:
        """What it sums over; see `reduction`."""

    @property
    def projections(self) -> dict[str, Projection]:
        """The learnt maps it needs, by name; equal names are shared."""
        return {}

    @abstractmethod
    def student_spec(self) -> SignalSpec:
        """What it asks the student to show."""

    @abstractmethod
    def teacher_spec(self) -> SignalSpec:
        """What it asks the teacher to show."""

    @abstractmethod
    def __call__(self, student: Signals, teacher: Signals, batch: Batch) -> Tensor:
        """The sum over the units of this batch, a scalar in float32."""
