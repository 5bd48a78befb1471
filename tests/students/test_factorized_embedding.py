"""Word embeddings as a product of two thin matrices."""

from __future__ import annotations

import pytest
import torch

from hf_compress.students.factorized_embedding import FactorizedDecoder, FactorizedEmbedding, embedding_matrix, factorize


def matrix(rows: int = 30, columns: int = 8) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(4)) * torch.arange(1, columns + 1)


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_it_is_the_nearest_matrix_of_its_rank(rank: int) -> None:
    exact = matrix()
    factor, projection, share = factorize(exact, rank)
    u, s, v = torch.linalg.svd(exact.double(), full_matrices=False)
    assert (factor.shape, projection.shape) == ((30, rank), (8, rank))
    torch.testing.assert_close((factor @ projection.T).double(), u[:, :rank] * s[:rank] @ v[:rank], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(projection.T @ projection, torch.eye(rank), rtol=0, atol=1e-5)
    assert share == pytest.approx(float(s[:rank].square().sum() / s.square().sum()))
    assert share == pytest.approx(float((factor @ projection.T).square().sum() / exact.square().sum()), rel=1e-5)


def test_all_of_the_rank_is_the_matrix_itself() -> None:
    factor, projection, share = factorize(matrix(), 8)
    torch.testing.assert_close(factor @ projection.T, matrix(), rtol=1e-5, atol=1e-5)
    assert share == pytest.approx(1.0)


def test_signs_are_settled_and_nothing_is_reproduced_of_zeros() -> None:
    first, second = factorize(matrix(), 3), factorize(-matrix(), 3)
    assert torch.equal(first[1], second[1])
    assert torch.equal(first[0], -second[0])
    assert factorize(torch.zeros(5, 4), 2)[2] == 1.0


def test_embedding_and_decoder_multiply_by_the_same_matrix() -> None:
    embedding, decoder = FactorizedEmbedding(30, 3, 8, padding_idx=0), FactorizedDecoder(8, 3, 30)
    decoder.weight, decoder.projection.weight = embedding.weight, embedding.projection.weight
    exact = embedding_matrix(embedding)
    torch.testing.assert_close(embedding(torch.tensor([[2, 5]]))[0], exact[[2, 5]])
    hidden = torch.randn(2, 8)
    torch.testing.assert_close(decoder(hidden), hidden @ exact.T + decoder.bias)
    torch.testing.assert_close(embedding_matrix(decoder), exact)
