"""Combined layers: each student layer against a whole group of teacher layers, so that none of these is skipped."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor

from hf_compress.layers.layer_groups import Grouping, Groups, check_groups, group_layers, words
from hf_compress.losses.hidden_states import refuse_part_of_states, refuse_without_tokens, stacks_in_both
from hf_compress.losses.loss import Loss, Phase, Projection
from hf_compress.losses.reduction import Batch, full_precision, squared_error, tokens_of
from hf_compress.signals import HiddenState, Signals, SignalSpec
from hf_compress.task import ModelShape


@dataclass(frozen=True)
class CombinedLayersLoss(Loss):
    """Compare each student layer with several teacher layers at once, side by side (CKD, "Why Skip If You Can Combine" 2010.03034).

        mean_d (W_i h_S,i + b_i - [h_T,a ; h_T,b ; ...])^2,  over real tokens; W_i widens the state to the group's joint width

    Each student layer has a learnt map of its own, as in the released code, whatever the widths; it is no part of the saved student.
    Take it where the student is much shallower than its teacher and a layer map would skip most of the layers; where hardly any is
    skipped, `HiddenStatesLoss` binds the student closer. The maps are as wide as their groups: 4 layers of 768 from a width of 384 are
    1.2 million weights a student layer while it trains.

    Attributes:
        groups: the teacher layers of each student layer, counted from 1, or their rule: "regular", "overlap", "skip_middle", "cross",
            "skip_comb"; see `hf_compress.layers.layer_groups`. The depths need not divide.
        stack: as in `HiddenStatesLoss`.
        weight: see `Loss`.

    Example:
        >>> CombinedLayersLoss(((1, 2, 3), (4, 5, 6))).groups[1]
        (4, 5, 6)
    """

    name: ClassVar[str] = "combined_layers"
    phase: ClassVar[Phase] = "intermediate"
    whole_states: ClassVar[bool] = True
    groups: Groups | Grouping = "regular"
    stack: str | None = field(default=None, kw_only=True)
    widths: tuple[int, int] = field(default=(0, 0), kw_only=True)  # filled in by resolve()

    def __str__(self) -> str:
        groups = self.groups if isinstance(self.groups, str) else words(self.groups)
        return f"{super().__str__()} (student:teacher {groups})"

    def resolve(self, student: ModelShape, teacher: ModelShape) -> tuple[Loss, ...]:
        """Choose stacks and make the groups."""
        refuse_without_tokens(self, student)
        resolved = []
        for name in stacks_in_both(self, student, teacher):
            ours, theirs = student.stacks[name], teacher.stacks[name]
            refuse_part_of_states(self, theirs)
            if isinstance(self.groups, str):
                groups = group_layers(self.groups, ours.num_layers, theirs.num_layers)
            else:
                groups = self.groups
                check_groups(groups, ours.num_layers, theirs.num_layers)
            resolved.append(replace(self, groups=groups, stack=name, widths=(ours.hidden_size, theirs.hidden_size)))
        return tuple(resolved)

    @property
    def unit(self) -> str:
        """Real tokens."""
        return tokens_of(self.stack or "")

    @property
    def projections(self) -> dict[str, Projection]:
        """One a student layer, to the joint width of its group."""
        ours, theirs = self.widths
        return {key.projection: Projection(ours, theirs * len(group)) for key, group in self._taught}

    def student_spec(self) -> SignalSpec:
        """All layers, widened."""
        return SignalSpec(hidden_states=frozenset(key for key, _ in self._taught))

    def teacher_spec(self) -> SignalSpec:
        """The layers of all groups."""
        return SignalSpec(hidden_states=frozenset(HiddenState(self.stack or "", layer) for _, group in self._taught for layer in group))

    def __call__(self, student: Signals, teacher: Signals, batch: Batch) -> Tensor:
        """Sum over layers and real tokens."""
        mask = batch.token_masks[self.stack or ""]
        total = torch.zeros((), device=mask.device)
        for key, group in self._taught:
            joint = full_precision(student.hidden_states[key])  # (batch, tokens, teacher's width * group)
            # Part by part: the teacher's states need not be copied side by side.
            for ours, layer in zip(joint.chunk(len(group), dim=-1), group, strict=True):
                theirs = full_precision(teacher.hidden_states[HiddenState(self.stack or "", layer)])
                total = total + squared_error(ours, theirs, mask) / joint.shape[-1]
        return total

    @property
    def _taught(self) -> list[tuple[HiddenState, tuple[int, ...]]]:
        """What the student shows, and the teacher layers that teach it."""
        assert not isinstance(self.groups, str), "resolve() comes first"
        stack = self.stack or ""
        return [(HiddenState(stack, layer, f"{stack}_combined_{layer}"), group) for layer, group in enumerate(self.groups, start=1)]
