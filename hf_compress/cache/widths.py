"""Width: which dimensions of a hidden state are kept (MUD, arXiv 2106.05691), and the bits and the basis that say so.

    random, uniform    the same dimensions for all layers, tokens and examples
    magnitude          each example's largest entries, over its chosen tokens together; a bit for each entry is stored
    pca                not in the paper: the directions in which the teacher's states vary most

Other than the paper's released code: the mask counts from the first step on, and an example's largest entries do not depend on which
others are in its batch.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from hf_compress.errors import ArgumentError, CacheError
from hf_compress.selected_state import Subspace

_ROWS_AT_ONCE = 8192  # of a sample in float64: 50 MB at 768 dimensions


def random_dimensions(hidden_size: int, count: int, seed: int) -> Tensor:
    """`count` dimensions drawn at random: (count,) int64, ascending.

    With the same seed a smaller number is part of a larger one. (The paper draws each dimension with probability `width`, so its number
    varies.) numpy promises that RandomState gives the same numbers in every version; a cache outlives versions.

    Raises:
        ArgumentError: `count` is not between 1 and `hidden_size`.
    """
    _check_count(count, hidden_size)
    drawn = np.random.RandomState(seed).permutation(hidden_size)[:count]
    return torch.from_numpy(np.sort(drawn).astype(np.int64))


def uniform_dimensions(hidden_size: int, width: float) -> Tensor:
    """The dimensions round(i / width), i = 0, 1, ...: (max(1, int(width * hidden_size)),) int64, ascending; halves to the even one.

    Raises:
        ArgumentError: `width` is not in (0, 1].
    """
    if not 0 < width <= 1:
        raise ArgumentError(f"The width is {width!r}: give the share of the dimensions to keep, above 0 and at most 1, such as 0.1.")
    return torch.tensor([round(i / width) for i in range(max(1, int(width * hidden_size)))])


def magnitude_mask(states: Tensor, chosen: Tensor, width: float) -> Tensor:
    """Each example's largest entries: int(width * its chosen tokens * hidden) of them, at least 1 where a token is chosen.

    Args:
        states: (batch, k, hidden), the teacher's, at the chosen tokens.
        chosen: (batch, k) bool, False where an example has no more tokens.
        width: share of the entries to keep.

    Returns:
        (batch, k, hidden) bool. Of equally large entries that of the earlier token in `states`, then of the lower dimension is kept.
        What is not finite counts as the largest, so that encoding it finds and refuses it.
    """
    batch, k, hidden = states.shape
    if k == 0:
        return torch.zeros_like(states, dtype=torch.bool)
    sizes = states.detach().float().abs().nan_to_num(nan=float("inf"), posinf=float("inf"))
    sizes = sizes.masked_fill(~chosen.bool()[..., None], -1.0).reshape(batch, k * hidden)
    entries = chosen.sum(-1, keepdim=True) * hidden  # (batch, 1)
    # Python's int(width * n): float64, cut off
    counts = (entries.double() * width).long().clamp(min=1).minimum(entries)
    # The smallest entry that is kept, of each example: its counts-th largest.
    largest = sizes.topk(max(1, int(width * (k * hidden))), dim=-1).values
    smallest = largest.gather(1, (counts - 1).clamp(min=0))
    above, equal = sizes > smallest, sizes == smallest
    room = counts - above.sum(-1, keepdim=True)
    return (above | (equal & (equal.cumsum(-1) <= room))).reshape(batch, k, hidden)


def pack_mask(mask: Tensor) -> Tensor:
    """(rows, hidden) bool -> (rows, ceil(hidden / 8)) uint8: dimension 0 is the lowest bit of byte 0; the last bits are 0."""
    rows, hidden = mask.shape
    bits = torch.nn.functional.pad(mask.to(torch.uint8), (0, -hidden % 8)).reshape(rows, -(-hidden // 8), 8)
    return (bits << torch.arange(8, dtype=torch.uint8, device=mask.device)).sum(-1, dtype=torch.uint8)


def unpack_mask(packed: Tensor, hidden_size: int) -> Tensor:
    """(rows, ceil(hidden / 8)) uint8 -> (rows, hidden) bool, the inverse of `pack_mask`.

    Raises:
        CacheError: the number of bytes is not that of `hidden_size` dimensions.
    """
    rows, width = packed.shape
    if width != -(-hidden_size // 8):
        raise CacheError(f"A mask has {width} bytes a token; {hidden_size} dimensions take {-(-hidden_size // 8)}.")
    bits = packed[..., None] >> torch.arange(8, dtype=torch.uint8, device=packed.device) & 1
    return bits.reshape(rows, width * 8)[:, :hidden_size].bool()


def pca_basis(states: Tensor, count: int) -> Subspace:
    """The directions in which a sample of the teacher's states varies most, the first most of all; worked out in float64.

    Args:
        states: (samples, hidden).
        count: how many directions.

    Returns:
        The sample's mean and the directions, float32, orthonormal; in each the entry of largest size is positive. A smaller number of
        directions are the first of a larger one.

    Raises:
        ArgumentError: `count` is not between 1 and the number of dimensions.
        CacheError: fewer samples than directions, or states that are not finite.
    """
    samples, hidden = states.shape
    _check_count(count, hidden)
    if samples < count:
        raise CacheError(
            f"A pca basis of {count} dimensions needs a sample of at least {count} tokens, and there are {samples}. "
            "Give more examples or a smaller share of dimensions, or choose dimensions by random or uniform."
        )
    mean = torch.zeros(hidden, dtype=torch.float64, device=states.device)
    for rows in torch.split(states.detach(), _ROWS_AT_ONCE):
        mean += rows.double().sum(0) / samples
    if not bool(mean.isfinite().all()):
        raise CacheError("The sample for a pca basis holds NaN or infinity: load the teacher in float32 (--teacher_dtype float32).")
    covariance = torch.zeros(hidden, hidden, dtype=torch.float64, device=states.device)
    for rows in torch.split(states.detach(), _ROWS_AT_ONCE):
        centred = rows.double() - mean
        covariance += centred.T @ centred / samples
    vectors = torch.linalg.eigh(covariance).eigenvectors.flip(1)[:, :count]  # the largest variance first
    largest = vectors.abs().argmax(0, keepdim=True)
    vectors = vectors * vectors.gather(0, largest).sign()  # else the sign is whatever the solver left
    return Subspace(mean.float(), vectors.float().contiguous())


def _check_count(count: int, hidden_size: int) -> None:
    if not 1 <= count <= hidden_size:
        raise ArgumentError(f"{count} dimensions of {hidden_size} were asked for: give 1 to {hidden_size}.")
