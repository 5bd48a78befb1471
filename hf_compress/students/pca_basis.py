"""The principal subspace of a teacher's hidden states: one basis for all layers, since what a layer adds stays in the residual stream.

A narrow student cannot rotate between its layers, so embeddings and all mapped layers share the basis (SliceGPT, Ashkboos et al.
2401.15024, has one a layer, and pays with a matrix on every residual connection).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class PcaBasis:
    """An affine map from the teacher's width to the student's.

    Attributes:
        mean: (teacher's width,), of all states.
        components: (teacher's width, student's width), orthonormal columns.
    """

    mean: Tensor
    components: Tensor

    def narrowed(self, states: Tensor) -> Tensor:
        """(..., teacher's width) -> (..., student's width)."""
        return (states - self.mean) @ self.components

    def directions(self, vectors: Tensor) -> Tensor:
        """As `narrowed`, for differences, which have no mean to take away."""
        return vectors @ self.components


def pca_basis(states: Iterable[Tensor], hidden_size: int) -> PcaBasis:
    """The directions in which hidden states vary most, turned so that LayerNorm takes away as little as it can.

    LayerNorm subtracts the mean over dimensions, so nothing that leaves one varies along (1, ..., 1). A Householder reflection lays the
    weakest direction there: at full width that is one which the teacher's own LayerNorm left empty, and nothing is lost.

    Args:
        states: each (tokens, teacher's width), of the embeddings and of layers.
        hidden_size: the student's width, at most the teacher's.
    """
    tensors = list(states)
    total = sum(len(state) for state in tensors)
    mean: Tensor = sum(state.double().sum(0) for state in tensors) / total  # type: ignore[assignment]
    covariance = torch.zeros(len(mean), len(mean), dtype=torch.float64, device=mean.device)
    for state in tensors:
        centred = state.double() - mean
        covariance += centred.T @ centred
    _, vectors = torch.linalg.eigh(covariance)  # weakest first
    principal = vectors[:, -hidden_size:].flip(1)
    # A sign is free in theory, and a matter of the library's version in practice.
    strongest = principal.abs().argmax(0)
    principal = principal * principal.gather(0, strongest[None]).sign()
    return PcaBasis(mean.to(tensors[0].dtype), (principal @ _last_to_ones(hidden_size).to(principal)).to(tensors[0].dtype))


def _last_to_ones(size: int) -> Tensor:
    """The reflection (size, size) that exchanges the last axis and the unit vector along (1, ..., 1)."""
    normal = torch.full((size,), -(size**-0.5), dtype=torch.float64)
    normal[-1] += 1
    length = normal.norm()
    if length < 1e-12:  # of size 1 both are the same axis
        return torch.eye(size, dtype=torch.float64)
    normal = normal / length
    return torch.eye(size, dtype=torch.float64) - 2 * torch.outer(normal, normal)
