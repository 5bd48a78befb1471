"""The small table of `hf-compress student` and `hf-compress drop`: how large before, how large after."""

from __future__ import annotations

from torch import nn


def size_table(before: nn.Module, after: nn.Module, *, names: tuple[str, str]) -> str:
    """Two rows and the share that is left: millions of parameters, and megabytes (10^6 bytes) of parameters and buffers in memory."""
    sizes = [_size(before), _size(after)]
    width = max(len(name) for name in (*names, "share"))
    lines = [f"{'':<{width}}  {'parameters':>12}  {'megabytes':>10}"]
    for name, (parameters, size) in zip(names, sizes, strict=True):
        lines.append(f"{name:<{width}}  {parameters / 1e6:>11.2f}M  {size / 1e6:>10.1f}")
    parameters_left, size_left = (after_ / before_ for before_, after_ in zip(*sizes, strict=True))
    lines.append(f"{'share':<{width}}  {parameters_left:>12.1%}  {size_left:>10.1%}")
    return "\n".join(lines)


def _size(model: nn.Module) -> tuple[int, int]:
    """Number of parameters, each counted once, and bytes."""
    parameters = list(model.parameters())
    tensors = [*parameters, *model.buffers()]
    return sum(each.numel() for each in parameters), sum(each.numel() * each.element_size() for each in tensors)
