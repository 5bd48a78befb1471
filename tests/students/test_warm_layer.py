"""The steps of a warm start, each on its own: least squares, and narrower heads."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_compress.students.least_squares import Ridge, fit_norm, fit_residual
from hf_compress.students.pca_basis import pca_basis
from hf_compress.students.warm_layer import _narrow_heads

TOKENS = 400


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def fitted() -> Tensor:
    return torch.arange(TOKENS) % 5 != 4


def test_ridge_finds_a_linear_map() -> None:
    features, weight, bias = random(TOKENS, 6), random(3, 6, seed=1), random(3, seed=2)
    fit = Ridge(features, fitted()).fit(F.linear(features, weight, bias))
    torch.testing.assert_close(fit.weight, weight, atol=1e-4, rtol=0)
    torch.testing.assert_close(fit.bias, bias, atol=1e-4, rtol=0)


def test_the_penalty_grows_where_the_held_out_tokens_want_it() -> None:
    """60 features, 48 tokens to fit on, and nothing to find: the best map of the others is none."""
    features, noise = random(60, 60), random(60, 4, seed=1)
    held = torch.arange(60) % 5 != 4
    fit = Ridge(features, held).fit(noise)
    unpenalised = torch.linalg.lstsq(features[held] - features[held].mean(0), noise[held] - noise[held].mean(0)).solution
    assert fit.weight.norm() < 0.6 * unpenalised.norm()


def test_a_norm_gets_back_its_gain_and_bias() -> None:
    norm, other = nn.LayerNorm(5), nn.LayerNorm(5)
    nn.init.normal_(norm.weight, 1.0, 0.3)
    nn.init.normal_(norm.bias)
    inputs = 3 * random(TOKENS, 5) + 1
    fit_norm(other, inputs, norm(inputs).detach(), fitted())
    torch.testing.assert_close(other.weight, norm.weight)
    torch.testing.assert_close(other.bias, norm.bias)


def test_what_a_layer_with_a_norm_gives_is_given_again() -> None:
    layer, norm, other = nn.Linear(12, 6), nn.LayerNorm(6), nn.LayerNorm(6)
    nn.init.uniform_(norm.weight, 0.5, 1.5)
    features, residual = random(TOKENS, 12), random(TOKENS, 6, seed=1)
    inputs = (residual + layer(features)).detach()
    targets = norm(inputs).detach()
    fit = fit_residual(Ridge(features, fitted()), other, residual, inputs * norm.weight.detach(), targets, fitted())
    given = other(residual + fit(features)).detach()
    assert float((given - targets).square().mean() / targets.var()) < 0.02


@pytest.mark.parametrize("size", [8, 4])
def test_narrow_heads_keep_the_scores_and_what_is_written(size: int) -> None:
    """Queries, keys and what values write have rank 4 in each head of 8, so nothing need be lost with heads of 4."""
    heads, width = 2, 10

    def low_rank(seed: int) -> Tensor:
        return torch.cat([random(TOKENS, 4, seed=seed + head) @ random(4, 8, seed=seed + 10 + head) for head in range(heads)], 1)

    shown = {name: low_rank(100 * number) + 0.3 for number, name in enumerate(("query", "key", "value"), start=1)}
    writes = torch.cat([random(8, 4, seed=7 + head) @ random(4, width, seed=9 + head) for head in range(heads)])
    # The constant 0.3 would give queries one more direction, and gives keys none.
    shown["query"] = shown["query"] - 0.3
    narrow = _narrow_heads(shown, writes, fitted(), heads, size)
    for head in range(heads):
        theirs, ours = slice(head * 8, head * 8 + 8), slice(head * size, head * size + size)
        wanted = shown["query"][:9, theirs] @ shown["key"][:9, theirs].T / 8**0.5
        given = narrow["query"][:9, ours] @ narrow["key"][:9, ours].T / size**0.5
        torch.testing.assert_close(given, wanted, atol=1e-2, rtol=0)
        written = shown["value"][:, theirs] @ writes[theirs]
        back = torch.linalg.lstsq(narrow["value"][:, ours], written, driver="gelsd").solution
        torch.testing.assert_close(narrow["value"][:, ours] @ back, written, atol=1e-2, rtol=0)


def test_the_basis_is_orthonormal_and_holds_a_subspace_of_its_size() -> None:
    states = random(TOKENS, 4) @ random(4, 12, seed=1) + random(12, seed=2)
    basis = pca_basis([states[:300], states[300:]], 5)
    torch.testing.assert_close(basis.components.T @ basis.components, torch.eye(5), atol=1e-5, rtol=0)
    torch.testing.assert_close(basis.narrowed(states) @ basis.components.T + basis.mean, states, atol=1e-3, rtol=0)
    # The fifth direction is empty, and lies where LayerNorm takes the mean away.
    torch.testing.assert_close(basis.narrowed(states).mean(-1), torch.zeros(TOKENS), atol=1e-4, rtol=0)
