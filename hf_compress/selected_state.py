"""Part of a hidden state: some tokens of it, some of its dimensions.

    teacher's state (batch, tokens, hidden)  --some tokens-->  (batch, selected, hidden)  --some dimensions-->  (batch, selected, kept)

A loss takes the student's state at the same tokens, and lets `space` say which numbers of the two are compared.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol

import torch
from torch import Tensor


class Space(Protocol):
    """Which numbers of a token are compared."""

    def compared(self, student: Tensor, values: Tensor) -> tuple[Tensor, Tensor, float]:
        """Bring both sides together.

        Args:
            student: (batch, selected, hidden), of the teacher's width.
            values: (batch, selected, kept), the teacher's stored numbers.

        Returns:
            Both sides, equal in shape, and by how many numbers a token's squared error is divided.
        """
        ...

    def moved(self, move: Callable[[Tensor], Tensor]) -> Space:
        """The same on another device."""
        ...


@dataclass(frozen=True)
class AllDimensions:
    """Every dimension: the plain mean over the hidden size."""

    def compared(self, student: Tensor, values: Tensor) -> tuple[Tensor, Tensor, float]:
        """See `Space`."""
        return student, values, float(values.shape[-1])

    def moved(self, move: Callable[[Tensor], Tensor]) -> AllDimensions:
        """See `Space`."""
        return self


@dataclass(frozen=True)
class SharedDimensions:
    """The same dimensions of every token.

    Attributes:
        indices: (kept,) int64.
        zero_target: the others count as targets of zero (the released code of 2106.05691); else they are not compared at all.
    """

    indices: Tensor
    zero_target: bool

    def compared(self, student: Tensor, values: Tensor) -> tuple[Tensor, Tensor, float]:
        """See `Space`."""
        if not self.zero_target:
            return student.index_select(-1, self.indices), values, float(values.shape[-1])
        theirs = torch.zeros_like(student, dtype=values.dtype).index_copy_(-1, self.indices, values)
        return student, theirs, float(student.shape[-1])

    def moved(self, move: Callable[[Tensor], Tensor]) -> SharedDimensions:
        """See `Space`."""
        return replace(self, indices=move(self.indices))


@dataclass(frozen=True)
class KeptEntries:
    """Each token's own dimensions, as a mask; the values come with zeros elsewhere.

    Attributes:
        mask: (batch, selected, hidden) bool.
        share: how much of an example is kept, 0 to 1: by hidden times this a token's error is divided where the others are left out.
        zero_target: as in `SharedDimensions`.
    """

    mask: Tensor
    share: float
    zero_target: bool

    def compared(self, student: Tensor, values: Tensor) -> tuple[Tensor, Tensor, float]:
        """See `Space`; here values are (batch, selected, hidden)."""
        if self.zero_target:
            return student, values, float(student.shape[-1])
        return student.masked_fill(~self.mask, 0.0), values, self.share * student.shape[-1]

    def moved(self, move: Callable[[Tensor], Tensor]) -> KeptEntries:
        """See `Space`."""
        return replace(self, mask=move(self.mask))


@dataclass(frozen=True)
class Subspace:
    """The leading directions of the teacher's states: both sides are compared inside them.

    The error is divided by the whole hidden size: it is the part of the full mean squared error that lies in the subspace.

    Attributes:
        mean: (hidden,).
        components: (hidden, kept), orthonormal columns.
    """

    mean: Tensor
    components: Tensor

    def compared(self, student: Tensor, values: Tensor) -> tuple[Tensor, Tensor, float]:
        """See `Space`."""
        inside = (student - self.mean.to(student.dtype)) @ self.components.to(student.dtype)
        return inside, values, float(self.components.shape[0])

    def moved(self, move: Callable[[Tensor], Tensor]) -> Subspace:
        """See `Space`."""
        return Subspace(move(self.mean), move(self.components))


@dataclass(frozen=True)
class SelectedState:
    """What was kept of one layer's hidden states for one batch.

    Attributes:
        values: (batch, selected, kept), the teacher's.
        positions: (batch, selected) int64, where in the batch's rows these tokens stand; 0 where fewer were chosen.
        chosen: (batch, selected) bool, False where an example has fewer tokens to choose from.
        space: which numbers of a token these are.
    """

    values: Tensor
    positions: Tensor
    chosen: Tensor
    space: Space

    def moved(self, move: Callable[[Tensor], Tensor]) -> SelectedState:
        """Every tensor through `move`: to a device, into pinned memory."""
        moved: dict[str, Any] = {
            field.name: value.moved(move) if not isinstance(value := getattr(self, field.name), Tensor) else move(value)
            for field in fields(self)
        }
        return SelectedState(**moved)


def at_positions(state: Tensor, positions: Tensor) -> Tensor:
    """(batch, tokens, hidden), (batch, selected) -> (batch, selected, hidden)."""
    return state.gather(1, positions[..., None].expand(-1, -1, state.shape[-1]))
