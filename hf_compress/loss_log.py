"""The parts of the loss for the log, and a watch on the teacher, without reading anything from the device in between."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from hf_compress.errors import TeacherError
from hf_compress.signals import Signals


class LossLog:
    """Adds up each part of the loss on the device; `read` is called when the trainer logs."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._since = 0

    def add(self, parts: Mapping[str, tuple[Tensor, float]], step: int, *, finite: bool = False) -> None:
        """Add one micro-batch's share of each part, unweighted, in the step after `step` done ones.

        With `finite` the mean of the steps before takes the place of a value that is not, as the Trainer has it with the whole loss.
        """
        if not self._sums:
            self._since = step  # a resumed run begins in the middle
        for name, (value, _) in parts.items():
            value = value.detach()
            before = self._sums.get(name, torch.zeros_like(value))
            if finite:
                value = torch.where(torch.isfinite(value), value, before / (1 + step - self._since))
            self._sums[name] = before + value

    def read(self, step: int, sum_over_processes: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """The mean of each part over the optimizer steps since the last read, as `loss_logits` and so on.

        Args:
            step: the number of optimizer steps done.
            sum_over_processes: of a small tensor; called on all of them.
        """
        steps = step - self._since
        if not self._sums or steps < 1:
            return {}
        names = sorted(self._sums)
        means = (sum_over_processes(torch.stack([self._sums[name] for name in names])) / steps).tolist()
        self._sums = {}
        return {f"loss_{name}": mean for name, mean in zip(names, means, strict=True)}

    def restart(self) -> None:
        """Forget what was added."""
        self._sums = {}


class FiniteWatch:
    """Notices the first step at which a signal of the teacher is not finite; `check` reads, `watch` does not."""

    def __init__(self) -> None:
        self._first_bad: dict[str, Tensor] = {}

    def watch(self, signals: Signals, step: int) -> None:
        """Look at a batch's signals; a sum is finite only where all its terms are."""
        for number, each in signals.teachers.items():
            self._look(each, step, f"teacher {number}'s ")
        self._look(signals, step)

    def _look(self, signals: Signals, step: int, whose: str = "") -> None:
        # Attention scores are the largest tensors of a step, and what is wrong in them is wrong in all that follows.
        light = Signals(signals.logits, signals.hidden_states, top_logits=signals.top_logits, head_states=signals.head_states)
        deepest = max((key.layer for key in signals.hidden_states), default=0)
        shallow = {key.name.rstrip(".") for key in signals.hidden_states if key.layer < deepest}
        for name, tensor in (light.named_tensors() or signals.named_tensors()).items():
            # In all but the deepest state the first token is enough: attention carries a NaN on to every token of the next layer.
            looked_at = tensor[:, 0] if name in shallow else tensor
            bad = ~torch.isfinite(looked_at.sum(dtype=torch.float32))
            seen = self._first_bad.get(whose + name)
            seen = torch.full((), -1, device=tensor.device) if seen is None else seen
            self._first_bad[whose + name] = torch.where(bad & (seen < 0), step, seen)

    def check(self) -> None:
        """Read what was noticed.

        Raises:
            TeacherError: naming the step and the layer.
        """
        if not self._first_bad:
            return
        steps = torch.stack(list(self._first_bad.values())).tolist()
        bad = {name: step for name, step in zip(self._first_bad, steps, strict=True) if step >= 0}
        self._first_bad = {}
        if bad:
            first = min(bad.values())
            names = ", ".join(sorted(name for name, step in bad.items() if step == first))
            raise TeacherError(
                f"The teacher gave NaN or infinity at step {first + 1}, in {names}. A teacher in float16 overflows easily: try "
                "--teacher_dtype float32 or bfloat16; else its weights are damaged, so evaluate it alone first."
            )
