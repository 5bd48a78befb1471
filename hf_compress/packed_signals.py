"""All tensors of a batch's `Signals` in one piece of memory, for the way from a worker to the device.

    worker:    signals --pack--> one tensor of bytes          (one file of shared memory, not one a tensor)
    trainer:   one pinned copy, one copy to the device        (and none of them keeps the training process from its step)
    device:    one tensor of bytes --unpack--> views of it

A training step of a small student takes a GPU a few milliseconds, and a dozen tensors that come one by one through shared memory, pinning
and copying take as long.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor

from hf_compress.signals import Signals
from hf_compress.worker_memory import new_bytes

_ALIGNED = 64


@dataclass(frozen=True)
class PackedSignals:
    """Signals whose tensors lie side by side.

    Attributes:
        memory: (bytes,) uint8.
        outline: the signals, of tensors without memory ("meta"), which say what lies there: dtypes and shapes, in the order of `moved`.
    """

    memory: Tensor
    outline: Signals

    @classmethod
    def pack(cls, signals: Signals) -> PackedSignals:
        """Copy every tensor of the signals, which are on the CPU, into one piece; in a worker of a DataLoader, of shared memory."""
        tensors: list[Tensor] = []

        def outlined(tensor: Tensor) -> Tensor:
            tensors.append(tensor)
            return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")

        outline = signals.moved(outlined)
        *starts, size = _starts(tensors)
        memory = new_bytes(size)
        for tensor, start in zip(tensors, starts, strict=True):
            _view(memory, start, tensor).copy_(tensor)
        return cls(memory, outline)

    def unpack(self) -> Signals:
        """The signals, as views of the memory where it is now, in the numbers that a loss compares."""
        outlines: list[Tensor] = []

        def noted(outline: Tensor) -> Tensor:
            outlines.append(outline)
            return outline

        self.outline.moved(noted)
        places: Iterator[int] = iter(_starts(outlines))
        return self.outline.moved(lambda outline: _view(self.memory, next(places), outline)).decoded()

    def moved(self, move: Callable[[Tensor], Tensor]) -> PackedSignals:
        """The same through `move`: to a device, into pinned memory."""
        return replace(self, memory=move(self.memory))


def _starts(tensors: list[Tensor]) -> list[int]:
    """Where each begins, and where the last one ends; aligned for every dtype."""
    sizes = (-(-math.prod(tensor.shape) * tensor.dtype.itemsize // _ALIGNED) * _ALIGNED for tensor in tensors)
    return list(accumulate(sizes, initial=0))


def _view(memory: Tensor, start: int, like: Tensor) -> Tensor:
    size = math.prod(like.shape) * like.dtype.itemsize
    return memory[start : start + size].view(like.dtype).view(like.shape)
