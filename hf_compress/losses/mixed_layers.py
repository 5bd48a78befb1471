"""Mixed layers: each student layer against a mix of teacher layers, and it is learnt how much each of these weighs."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from hf_compress.layers.layer_groups import Grouping, Groups, check_groups, group_layers, words
from hf_compress.losses.hidden_states import refuse_part_of_states, refuse_without_tokens, stacks_in_both, summary_index
from hf_compress.losses.loss import Loss, Phase, Projection
from hf_compress.losses.reduction import Batch, full_precision, rows_of
from hf_compress.signals import HiddenState, Signals, SignalSpec
from hf_compress.task import ModelShape


@dataclass(frozen=True)
class MixedLayersLoss(Loss):
    """Compare each student layer with what it attends to among the teacher's layers (ALP-KD 2012.14022).

        e_k  =  softmax over the layers k of a bucket of  (A h_S) . h_T,k
        mean_d (h_S - sum_k e_k h_T,k)^2,  over examples, at the summary token only; layers are added up

    The paper maps the teacher's states, h_S . (P h_T); this is the same with A the transpose of P, and keeps all that is learnt inside the
    student. A bias of P would add one number to the scores of all layers, which the softmax takes out again; a bias here, a preference for
    layers whatever the student shows, is not the paper's, so A has none. A is one for all layers, and no part of the saved student. Where
    the widths differ, h_S goes through a second map, shared with `HiddenStatesLoss`.

    Take it where no layer map suggests itself and examples have a summary token (classification); `CombinedLayersLoss` compares all
    tokens, and `HiddenStatesLoss(kind="summary")`, PKD's, fixes one teacher layer for each.

    A teacher on disk stores the whole states of every layer in a bucket, though their summary tokens alone are read.

    Attributes:
        buckets: "all" lets each student layer choose among all teacher layers (ALP); "regular" among its own share (ALP-NO), "overlap"
            among that and one layer more on each side (ALP-PO); or the teacher layers of each student layer, counted from 1.
        stack: as in `HiddenStatesLoss`.
        weight: see `Loss`.

    Example:
        >>> MixedLayersLoss("overlap").buckets
        'overlap'
    """

    name: ClassVar[str] = "mixed_layers"
    phase: ClassVar[Phase] = "intermediate"
    whole_states: ClassVar[bool] = True
    buckets: Groups | Grouping | Literal["all"] = "all"
    stack: str | None = field(default=None, kw_only=True)
    widths: tuple[int, int] = field(default=(0, 0), kw_only=True)  # filled in by resolve()

    def __str__(self) -> str:
        buckets = self.buckets if isinstance(self.buckets, str) else words(self.buckets)
        return f"{super().__str__()} (student:teacher {buckets})"

    def resolve(self, student: ModelShape, teacher: ModelShape) -> tuple[Loss, ...]:
        """Choose stacks and make the buckets."""
        refuse_without_tokens(self, student)
        resolved = []
        for name in stacks_in_both(self, student, teacher):
            ours, theirs = student.stacks[name], teacher.stacks[name]
            refuse_part_of_states(self, theirs)
            if self.buckets == "all":
                buckets = (tuple(range(1, theirs.num_layers + 1)),) * ours.num_layers
            elif isinstance(self.buckets, str):
                buckets = group_layers(self.buckets, ours.num_layers, theirs.num_layers)
            else:
                buckets = self.buckets
                check_groups(buckets, ours.num_layers, theirs.num_layers)
            resolved.append(replace(self, buckets=buckets, stack=name, widths=(ours.hidden_size, theirs.hidden_size)))
        return tuple(resolved)

    @property
    def unit(self) -> str:
        """Rows: examples, or choices of examples."""
        return rows_of(self.stack or "")

    @property
    def projections(self) -> dict[str, Projection]:
        """What a state asks the teacher's layers with; and to their width, where that differs."""
        fitting = {} if self.widths[0] == self.widths[1] else {self._fitting: Projection(*self.widths)}
        return {self._asking: Projection(*self.widths, bias=False), **fitting}

    def student_spec(self) -> SignalSpec:
        """All layers, each as it asks and as it is compared."""
        keys = {HiddenState(self.stack or "", layer, name) for layer, _ in self._taught for name in (self._asking, self._fitting)}
        return SignalSpec(hidden_states=frozenset(keys))

    def teacher_spec(self) -> SignalSpec:
        """The layers of all buckets."""
        return SignalSpec(hidden_states=frozenset(HiddenState(self.stack or "", k) for _, bucket in self._taught for k in bucket))

    def __call__(self, student: Signals, teacher: Signals, batch: Batch) -> Tensor:
        """Sum over layers and rows."""
        stack = self.stack or ""
        mask = batch.token_masks[stack]
        token = summary_index(mask, last=self.stack in batch.summary_last)
        rows = torch.arange(len(token), device=token.device)
        told = {key: full_precision(teacher.hidden_states[key][rows, token]) for key in self.teacher_spec().hidden_states}
        total = torch.zeros((), device=mask.device)
        for layer, bucket in self._taught:
            asking, ours = (
                full_precision(student.hidden_states[HiddenState(stack, layer, name)][rows, token])
                for name in (self._asking, self._fitting)
            )  # (rows, teacher's width) each
            theirs = torch.stack([told[HiddenState(stack, k)] for k in bucket], dim=1)  # (rows, bucket, teacher's width)
            weights = (theirs @ asking[..., None]).softmax(1)  # (rows, bucket, 1)
            total = total + (ours - (weights * theirs).sum(1)).pow(2).mean(-1).sum()
        return total

    @property
    def _asking(self) -> str:
        return f"{self.stack}_asking"

    @property
    def _fitting(self) -> str:
        return "" if self.widths[0] == self.widths[1] else f"{self.stack}_shared"

    @property
    def _taught(self) -> list[tuple[int, tuple[int, ...]]]:
        """Student layers, and the teacher layers that teach them."""
        assert not isinstance(self.buckets, str), "resolve() comes first"
        return list(enumerate(self.buckets, start=1))
