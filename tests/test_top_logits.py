"""The k largest logits and the others as one: k + 1 events whose probabilities are those of the whole softmax."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from hf_compress.errors import LossError
from hf_compress.losses.logits import LogitsKind, LogitsLoss
from hf_compress.losses.reduction import Batch
from hf_compress.signals import Signals
from hf_compress.top_logits import TopLogits

MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]).bool()
BATCH = Batch("causal_lm", 2, {"layers": MASK})


def logits(seed: int, words: int = 9) -> Tensor:
    return 2 * torch.randn(2, 4, words, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def loss(temperature: float = 2.0, kind: LogitsKind = "kl") -> LogitsLoss:
    return LogitsLoss(temperature, kind, task="causal_lm", stack="layers")


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_against_a_plain_loop(temperature: float) -> None:
    ours, theirs = logits(1), logits(2)
    expected = 0.0
    for row, place in MASK.nonzero().tolist():
        p, q = ((each[row, place] / temperature).softmax(-1).tolist() for each in (theirs, ours))
        top = sorted(range(9), key=lambda word: -p[word])[:3]
        events = [(p[word], q[word]) for word in top]
        events.append((1 - sum(a for a, _ in events), 1 - sum(b for _, b in events)))
        expected += temperature**2 * sum(a * math.log(a / b) for a, b in events)
    top_logits = TopLogits.of(theirs, 3, (1.0, temperature))
    got = loss(temperature)(Signals(logits={"logits": ours}), Signals(top_logits=top_logits), BATCH)
    assert got.item() == pytest.approx(expected, rel=1e-9)
    # Fewer events tell less apart, so the divergence is smaller; it is none between equals.
    whole = loss(temperature)(Signals(logits={"logits": ours}), Signals(logits={"logits": theirs}), BATCH)
    assert 0 < got.item() < whole.item()
    same = loss(temperature)(Signals(logits={"logits": theirs}), Signals(top_logits=top_logits), BATCH)
    assert same.item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("kind", ["kl", "soft_cross_entropy"])
@pytest.mark.parametrize("k", [9, 20])
def test_all_words_are_the_whole_loss(kind: LogitsKind, k: int) -> None:
    ours, theirs = logits(1), logits(2)
    top = TopLogits.of(theirs, k, (2.0,))
    whole = loss(kind=kind)(Signals(logits={"logits": ours}), Signals(logits={"logits": theirs}), BATCH)
    got = loss(kind=kind)(Signals(logits={"logits": ours}), Signals(top_logits=top), BATCH)
    assert got.item() == pytest.approx(whole.item(), rel=1e-12)


@pytest.mark.parametrize("kind", ["kl", "soft_cross_entropy"])
def test_gradient_against_numerical_differences(kind: LogitsKind) -> None:
    top = TopLogits.of(logits(2), 3, (2.0,))

    def value(ours: Tensor) -> Tensor:
        return loss(kind=kind)(Signals(logits={"logits": ours}), Signals(top_logits=top), BATCH)

    assert torch.autograd.gradcheck(value, (logits(1).requires_grad_(),))


def test_narrowed_is_what_fewer_would_have_been() -> None:
    few, narrowed = TopLogits.of(logits(2), 2, (1.0, 3.0)), TopLogits.of(logits(2), 5, (1.0, 3.0)).narrowed(2)
    assert torch.equal(few.ids, narrowed.ids) and torch.equal(few.values, narrowed.values)
    for temperature in (1.0, 3.0):
        assert torch.allclose(few.rest[temperature], narrowed.rest[temperature])
    assert few.narrowed(5) is few


def test_other_vocabularies_are_refused() -> None:
    top = TopLogits.of(logits(2), 3, (2.0,))
    with pytest.raises(LossError, match="of 8 words and the teacher's of 9"):
        loss()(Signals(logits={"logits": logits(1, words=8)}), Signals(top_logits=top), BATCH)
