"""Which tokens: by hand, against a plain loop, and what the paper's released code got wrong."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from hf_compress.cache.tokens import choose_tokens, token_importance
from hf_compress.errors import ArgumentError, CacheError

# One example of five real tokens ([CLS] a b [SEP] c) and two of padding.
MASK = torch.tensor([[1, 1, 1, 1, 1, 0, 0]]).bool()
SPECIAL = torch.tensor([[1, 0, 0, 1, 0, 1, 1]]).bool()
IMPORTANCE = torch.tensor([[0.1, 0.2, 0.3, 0.9, 0.25, 5.0, 6.0]])


def chosen_of(positions: torch.Tensor, chosen: torch.Tensor) -> list[list[int]]:
    return [row[real].tolist() for row, real in zip(positions, chosen, strict=True)]


@pytest.mark.parametrize(
    ("scheme", "k", "expected"),
    [
        ("all", None, [0, 1, 2, 3, 4]),
        ("left_first", 2, [0, 1]),
        ("left_first", 99, [0, 1, 2, 3, 4]),
        ("attention", 3, [3, 2, 4]),
        ("attention", 6, [3, 2, 4, 1, 0]),
        ("attention_no_sep", 3, [2, 4, 1]),
        ("attention_no_sep", 6, [2, 4, 1, 0]),  # [CLS] competes, [SEP] does not, and neither does padding
    ],
)
def test_by_hand(scheme: Any, k: int | None, expected: list[int]) -> None:
    positions, chosen = choose_tokens(scheme, k, MASK, SPECIAL, IMPORTANCE)
    assert chosen_of(positions, chosen) == [expected]
    assert positions.shape == chosen.shape == (1, min(k or 7, 7))
    assert positions.dtype == torch.int64
    assert positions[~chosen].eq(0).all()


def plain_choice(
    scheme: str, k: int | None, mask: torch.Tensor, special: torch.Tensor, importance: torch.Tensor, summary: torch.Tensor | None
) -> list[list[int]]:
    rows = []
    for row in range(len(mask)):
        real = [token for token in range(mask.shape[1]) if mask[row, token]]
        if scheme == "attention_no_sep":
            first = (real[0] if real else None) if summary is None else int(summary[row])
            real = [token for token in real if token == first or not special[row, token]]
        if scheme.startswith("attention"):
            real = sorted(real, key=lambda token: (-float(importance[row, token]), token))
        rows.append(real[:k])
    return rows


@pytest.mark.parametrize("given", [False, True], ids=["first", "summary_index"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("scheme", ["all", "left_first", "attention", "attention_no_sep"])
def test_plain_loop(scheme: Any, dtype: torch.dtype, given: bool) -> None:
    for _ in range(60):
        batch, tokens = int(torch.randint(1, 6, ())), int(torch.randint(1, 12, ()))
        mask = torch.rand(batch, tokens) < 0.6  # rows without a real token, and padding on either side, among them
        special = torch.rand(batch, tokens) < 0.3
        importance = torch.randint(-2, 3, (batch, tokens)).to(dtype)  # many ties
        summary = torch.randint(0, tokens, (batch,)) if given else None
        k = None if scheme == "all" else int(torch.randint(1, tokens + 3, ()))
        positions, chosen = choose_tokens(scheme, k, mask, special, importance, summary)
        assert chosen_of(positions, chosen) == plain_choice(scheme, k, mask, special, importance, summary)
        assert (chosen.sum(1) == chosen.cummin(1).values.sum(1)).all()  # chosen ones first


def test_padding_is_never_chosen() -> None:
    mask = torch.tensor([[0, 0, 1, 1], [1, 0, 0, 0], [0, 0, 0, 0]]).bool()
    importance = torch.tensor([[9.0, 9.0, -float("inf"), -1.0], [-1e9, 9.0, 9.0, 9.0], [1.0, 2.0, 3.0, 4.0]])
    for scheme, expected in {
        "left_first": [[2, 3], [0], []],
        "attention": [[3, 2], [0], []],
        "attention_no_sep": [[3, 2], [0], []],
    }.items():
        got: Any = choose_tokens(scheme, 3, mask, torch.zeros_like(mask), importance)
        assert chosen_of(*got) == expected, scheme


def test_an_example_does_not_depend_on_its_batch() -> None:
    mask, special = torch.rand(8, 10) < 0.7, torch.rand(8, 10) < 0.2
    importance = torch.randn(8, 10)
    together = chosen_of(*choose_tokens("attention_no_sep", 4, mask, special, importance))
    alone = [
        chosen_of(*choose_tokens("attention_no_sep", 4, mask[i : i + 1], special[i : i + 1], importance[i : i + 1]))[0] for i in range(8)
    ]
    assert together == alone


def test_a_smaller_choice_is_the_start_of_a_larger() -> None:
    importance = torch.randint(0, 3, (4, 9)).float()
    mask = torch.ones(4, 9).bool()
    large, _ = choose_tokens("attention", 9, mask, None, importance)
    for k in range(1, 9):
        assert torch.equal(choose_tokens("attention", k, mask, None, importance)[0], large[:, :k])


def test_the_last_token_may_be_the_summary() -> None:
    # XLNet: a b [SEP] [CLS]
    mask, special = torch.ones(1, 4).bool(), torch.tensor([[0, 0, 1, 1]]).bool()
    importance = torch.tensor([[0.1, 0.2, 0.9, 0.8]])
    assert chosen_of(*choose_tokens("attention_no_sep", 4, mask, special, importance, torch.tensor([3]))) == [[3, 1, 0]]


@pytest.mark.parametrize(
    ("scheme", "k", "special", "importance", "error", "words"),
    [
        ("attention", 3, None, None, CacheError, "none to rank by"),
        ("attention_no_sep", 3, None, IMPORTANCE, CacheError, "which tokens are special"),
        ("attention", None, None, IMPORTANCE, ArgumentError, "number of tokens None"),
        ("left_first", 0, None, None, ArgumentError, "number of tokens 0"),
        ("all", 3, None, None, ArgumentError, "None with 'all'"),
        ("attention", 3, None, torch.full((1, 7), float("nan")), CacheError, "to 5 tokens is NaN, first in row 0"),
    ],
)
def test_what_is_missing_is_named(scheme: Any, k: Any, special: Any, importance: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        choose_tokens(scheme, k, MASK, special, importance)


def test_nan_at_padding_does_not_matter() -> None:
    importance = IMPORTANCE.masked_fill(~MASK, float("nan"))
    assert chosen_of(*choose_tokens("attention", 2, MASK, None, importance)) == [[3, 2]]


def test_importance_by_hand() -> None:
    # Two heads; the summary token is token 0; its row of scores is (0, ln 3) and (0, 0), and a token of padding follows.
    scores = torch.full((1, 2, 3, 3), 50.0)
    scores[0, 0, 0], scores[0, 1, 0] = torch.tensor([0.0, math.log(3), 9.0]), torch.tensor([0.0, 0.0, 9.0])
    mask, summary = torch.tensor([[1, 1, 0]]).bool(), torch.tensor([0])
    by_probabilities = token_importance(scores, mask, summary, "probabilities")
    assert torch.allclose(by_probabilities, torch.tensor([[(0.25 + 0.5) / 2, (0.75 + 0.5) / 2, 0.0]]))
    assert torch.allclose(token_importance(scores, mask, summary, "scores"), torch.tensor([[0.0, math.log(3) / 2, 0.0]]))


def test_the_two_rankings_may_differ() -> None:
    # Token 1 has the higher mean score; token 2 the higher mean probability.
    scores = torch.zeros(1, 2, 3, 3)
    scores[0, 0, 0], scores[0, 1, 0] = torch.tensor([20.0, 10.0, 0.0]), torch.tensor([0.0, 0.0, 5.0])
    mask, summary = torch.ones(1, 3).bool(), torch.tensor([0])
    assert token_importance(scores, mask, summary, "scores")[0, 1:].argmax() == 0
    assert token_importance(scores, mask, summary, "probabilities")[0, 1:].argmax() == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("rank_by", ["probabilities", "scores"])
def test_importance_is_the_plain_loops(rank_by: Any, dtype: torch.dtype) -> None:
    batch, heads, tokens = 4, 3, 6
    scores = (4 * torch.randn(batch, heads, tokens, tokens)).to(dtype)
    mask = torch.rand(batch, tokens) < 0.6
    mask[0] = False  # a row without a real token
    summary = torch.randint(0, tokens, (batch,))
    got = token_importance(scores, mask, summary, rank_by)
    assert got.dtype == torch.float32
    for row in range(batch):
        expected = [0.0] * tokens
        real = [token for token in range(tokens) if mask[row, token]]
        for head in range(heads):
            values = {token: float(scores[row, head, int(summary[row]), token]) for token in real}
            if rank_by == "probabilities":
                whole = sum(math.exp(value) for value in values.values())
                values = {token: math.exp(value) / whole for token, value in values.items()}
            for token, value in values.items():
                expected[token] += value / heads
        assert got[row].tolist() == pytest.approx(expected, abs=1e-5)
