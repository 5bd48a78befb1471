"""Many layers to many: every student layer against every teacher layer, as far as moving knowledge between them is cheap."""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor

from hf_compress.losses.attention_scores import check_attention, check_heads
from hf_compress.losses.hidden_states import refuse_part_of_states, refuse_without_tokens, stacks_in_both
from hf_compress.losses.loss import Loss, Phase, Projection
from hf_compress.losses.reduction import Batch, full_precision, tokens_of, visible_keys
from hf_compress.losses.transport import cheaper_first, transport_plan
from hf_compress.signals import AttentionScores, HiddenState, Signals, SignalSpec
from hf_compress.task import ModelShape, Stack


@dataclass(frozen=True)
class TransportLoss(Loss):
    """Compare all layers with all, by the earth mover's distance (BERT-EMD 2010.06133, eq. 4-9): `HiddenStatesTransportLoss`,
    `AttentionScoresTransportLoss`.

        sum_ij F_ij D_ij   over real tokens;  D_ij the mean squared error between student layer i and teacher layer j,
        F the cheapest flow from the student's layers, weighing w_i, to the teacher's, weighing w_j, without gradient

    No layer map is needed: the flow finds one, example by example. Take it where maps were tried and none is clearly right; it costs a
    comparison of every pair of layers, and a teacher on disk that holds all of them. Where the map is known, as after dropping layers,
    `HiddenStatesLoss` and `AttentionScoresLoss` say the same for less.

    Other than the paper and its code: the flow is an entropic approximation, worked out on the device (`transport`); it is of each
    example, not of each batch, so that a loss does not hang on how examples are batched; and a loss has no memory, so the layers'
    weights, which the paper carries from step to step, are found anew: from equal ones, by the costs of the first flow, once.

    Attributes:
        reweight: let layers that are cheap to move weigh more (the paper's cost attention); False keeps all weights equal.
        stack: as in `HiddenStatesLoss`.
        weight: see `Loss`.
    """

    phase: ClassVar[Phase] = "intermediate"
    reweight: bool = True
    stack: str | None = field(default=None, kw_only=True)
    # Filled in by resolve(): of student and teacher, how deep and how wide.
    depths: tuple[int, int] = field(default=(0, 0), kw_only=True)
    widths: tuple[int, int] = field(default=(0, 0), kw_only=True)

    def __str__(self) -> str:
        return f"{super().__str__()} ({self.depths[0]} student layers, {self.depths[1]} teacher layers)"

    def resolve(self, student: ModelShape, teacher: ModelShape) -> tuple[Loss, ...]:
        """Choose stacks and count layers."""
        self._check(student, teacher)
        resolved = []
        for name in stacks_in_both(self, student, teacher):
            ours, theirs = student.stacks[name], teacher.stacks[name]
            self._check_stacks(ours, theirs)
            depths, widths = (ours.num_layers, theirs.num_layers), (ours.hidden_size, theirs.hidden_size)
            resolved.append(replace(self, stack=name, depths=depths, widths=widths))
        return tuple(resolved)

    @abstractmethod
    def _check(self, student: ModelShape, teacher: ModelShape) -> None:
        """Raise LossError where the models cannot be compared."""

    @abstractmethod
    def _check_stacks(self, student: Stack, teacher: Stack) -> None:
        """Raise LossError where the stacks cannot be compared."""

    @property
    def unit(self) -> str:
        """Real tokens."""
        return tokens_of(self.stack or "")

    def __call__(self, student: Signals, teacher: Signals, batch: Batch) -> Tensor:
        """Sum over real tokens."""
        real = batch.token_masks[self.stack or ""]
        ours, theirs = (self._flat(shown, batch) for shown in (self._of_student(student), self._of_teacher(teacher)))
        # What all layers have in common would drown their differences in the squares below, and makes no difference to s - t.
        common = theirs.mean(1, keepdim=True).detach()
        ours, theirs = ours - common, theirs - common
        # |s - t|^2 = |s|^2 + |t|^2 - 2 s.t: one product of matrices, and not a pass over the largest tensors for each pair of layers.
        squares = ours.pow(2).sum(2)[:, :, None] + theirs.pow(2).sum(2)[:, None, :]
        errors = squares - 2 * ours @ theirs.transpose(1, 2)  # (batch, student layers, teacher layers), summed over tokens
        with torch.no_grad():
            costs = errors.clamp(min=0) / real.sum(1).clamp(min=1)[:, None, None]
            weights = [costs.new_full((len(costs), depth), 1 / depth) for depth in self.depths]
            flow = transport_plan(costs, *weights)
            if self.reweight:
                flow = transport_plan(costs, *cheaper_first(flow, costs))
        return (flow * errors).sum()

    @property
    def _student_layers(self) -> range:
        return range(1, self.depths[0] + 1)

    @property
    def _teacher_layers(self) -> range:
        return range(1, self.depths[1] + 1)

    @abstractmethod
    def _of_student(self, student: Signals) -> list[Tensor]:
        """What is compared, of each layer."""

    @abstractmethod
    def _of_teacher(self, teacher: Signals) -> list[Tensor]:
        """What is compared, of each layer."""

    @abstractmethod
    def _flat(self, shown: list[Tensor], batch: Batch) -> Tensor:
        """(batch, layers, numbers): zero at padding, scaled so that a token's mean is a sum."""


@dataclass(frozen=True)
class HiddenStatesTransportLoss(TransportLoss):
    """Many to many, between hidden states; see `TransportLoss`.

    Where the widths differ, the student's states go through one learnt map, shared with `HiddenStatesLoss` and `EmbeddingsLoss`.

    Example:
        >>> HiddenStatesTransportLoss(weight=0.5).reweight
        True
    """

    name: ClassVar[str] = "hidden_states_transport"
    whole_states: ClassVar[bool] = True

    @property
    def projections(self) -> dict[str, Projection]:
        """None where the widths agree."""
        return {self._projection: Projection(*self.widths)} if self._projection else {}

    def student_spec(self) -> SignalSpec:
        """All layers, projected."""
        return SignalSpec(hidden_states=frozenset(self._student_key(layer) for layer in self._student_layers))

    def teacher_spec(self) -> SignalSpec:
        """All layers."""
        return SignalSpec(hidden_states=frozenset(HiddenState(self.stack or "", layer) for layer in self._teacher_layers))

    def _check(self, student: ModelShape, teacher: ModelShape) -> None:
        refuse_without_tokens(self, student)

    def _check_stacks(self, student: Stack, teacher: Stack) -> None:
        refuse_part_of_states(self, teacher)

    @property
    def _projection(self) -> str:
        return "" if self.widths[0] == self.widths[1] else f"{self.stack}_shared"

    def _student_key(self, layer: int) -> HiddenState:
        return HiddenState(self.stack or "", layer, self._projection)

    def _of_student(self, student: Signals) -> list[Tensor]:
        return [student.hidden_states[self._student_key(layer)] for layer in self._student_layers]

    def _of_teacher(self, teacher: Signals) -> list[Tensor]:
        return [teacher.hidden_states[HiddenState(self.stack or "", layer)] for layer in self._teacher_layers]

    def _flat(self, shown: list[Tensor], batch: Batch) -> Tensor:
        padding = ~batch.token_masks[self.stack or ""][..., None]
        states = torch.stack([full_precision(state).masked_fill(padding, 0.0).flatten(1) for state in shown], dim=1)
        return states / math.sqrt(self.widths[1])


@dataclass(frozen=True)
class AttentionScoresTransportLoss(TransportLoss):
    """Many to many, between attention scores; see `TransportLoss`, and `AttentionScoresLoss` for what is compared of two layers.

    Example:
        >>> AttentionScoresTransportLoss(reweight=False).name
        'attention_scores_transport'
    """

    name: ClassVar[str] = "attention_scores_transport"
    sees_attention: ClassVar[bool] = True

    def student_spec(self) -> SignalSpec:
        """All layers' scores."""
        return SignalSpec(attention_scores=frozenset(AttentionScores(self.stack or "", layer) for layer in self._student_layers))

    def teacher_spec(self) -> SignalSpec:
        """All layers' scores."""
        return SignalSpec(attention_scores=frozenset(AttentionScores(self.stack or "", layer) for layer in self._teacher_layers))

    def _check(self, student: ModelShape, teacher: ModelShape) -> None:
        check_attention(self, student, teacher)

    def _check_stacks(self, student: Stack, teacher: Stack) -> None:
        check_heads(self, student, teacher, "all layers")

    def _of_student(self, student: Signals) -> list[Tensor]:
        return [student.attention_scores[AttentionScores(self.stack or "", layer)] for layer in self._student_layers]

    def _of_teacher(self, teacher: Signals) -> list[Tensor]:
        return [teacher.attention_scores[AttentionScores(self.stack or "", layer)] for layer in self._teacher_layers]

    def _flat(self, shown: list[Tensor], batch: Batch) -> Tensor:
        keys = visible_keys(batch.token_masks[self.stack or ""], causal=self.stack in batch.causal_stacks)  # (batch, 1, queries, keys)
        scores = [full_precision(score) for score in shown]
        # A query's mean over its keys, and over the heads.
        each = (keys.sum(-1, keepdim=True).clamp(min=1) * scores[0].shape[1]).to(scores[0].dtype).rsqrt()
        return torch.stack([(score.masked_fill(~keys, 0.0) * each).flatten(1) for score in scores], dim=1)
