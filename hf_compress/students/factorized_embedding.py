"""Word embeddings as a product of two thin matrices: E (vocabulary x width) = A (vocabulary x rank) . B (rank x width)."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class FactorizedEmbedding(nn.Embedding):
    """A lookup in A, then B.

    Args:
        num_embeddings: the size of the vocabulary.
        rank: the width of A, which is this module's `weight` (vocabulary, rank).
        width: what comes out; B is `projection.weight`, transposed: (width, rank).
        padding_idx: as in `torch.nn.Embedding`.
    """

    def __init__(self, num_embeddings: int, rank: int, width: int, padding_idx: int | None) -> None:
        super().__init__(num_embeddings, rank, padding_idx=padding_idx)
        self.projection = nn.Linear(rank, width, bias=False)

    def forward(self, input: Tensor) -> Tensor:
        """(batch, tokens) -> (batch, tokens, width)."""
        embedded: Tensor = self.projection(super().forward(input))
        return embedded


class FactorizedDecoder(nn.Linear):
    """Scores every word: a hidden state times E transposed, which is B and then A, both tied to the embedding's.

    Args:
        width: of the hidden state; `projection.weight` is (width, rank), as in the embedding.
        rank: of the factors; `weight` is (vocabulary, rank).
        num_embeddings: the size of the vocabulary.
    """

    def __init__(self, width: int, rank: int, num_embeddings: int) -> None:
        super().__init__(rank, num_embeddings)
        self.projection = nn.Linear(rank, width, bias=False)

    def forward(self, input: Tensor) -> Tensor:
        """(batch, tokens, width) -> (batch, tokens, vocabulary)."""
        return super().forward(input @ self.projection.weight)


def embedding_matrix(module: nn.Module) -> Tensor:
    """E, (vocabulary, width), of an embedding or of a layer that scores words, factorised or not."""
    weight, projection = module.weight, getattr(module, "projection", None)
    assert isinstance(weight, Tensor)
    return weight if projection is None else weight @ projection.weight.T


@torch.no_grad()
def factorize(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """The nearest matrix of a rank, by singular value decomposition: E = U S V, cut to U_r S_r and V_r.

    Args:
        matrix: E, (vocabulary, width).
        rank: at most the width.

    Returns:
        A = U_r S_r (vocabulary, rank); B = V_r, transposed (width, rank), with orthonormal columns; and the share of E's sum of squares
        that the product keeps, 0 to 1.
    """
    exact = matrix.double()
    # V_r are the first eigenvectors of E^T E, which is small, and U_r S_r is E V_r^T.
    values, vectors = torch.linalg.eigh(exact.T @ exact)
    values, vectors = values.flip(0).clamp(min=0), vectors.flip(1)[:, :rank]
    # An eigenvector's sign is free; the largest entry is made positive, so that the result is the same everywhere.
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    vectors = vectors * largest.sign()
    left, total = float(values[:rank].sum()), float(values.sum())
    return (exact @ vectors).to(matrix.dtype), vectors.to(matrix.dtype), left / total if total else 1.0
