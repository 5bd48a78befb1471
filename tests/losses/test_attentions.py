"""AttentionsLoss against a hand-computed case, a plain loop, padding, causality and numerical gradients."""

from __future__ import annotations

import math

import pytest
import torch

from hf_compress.errors import LossError
from hf_compress.layers.layer_map import LayerMap
from hf_compress.losses.attention_scores import AttentionsLoss
from hf_compress.losses.reduction import Batch
from hf_compress.signals import AttentionScores, Signals
from hf_compress.task import ModelShape, Stack


def shape(layers: int, heads: int) -> ModelShape:
    return ModelShape("Model", "sequence_classification", {"layers": Stack(layers, 12, heads)})


def resolved() -> AttentionsLoss:
    (loss,) = AttentionsLoss(LayerMap(((1, 2),))).resolve(shape(1, 2), shape(2, 2))
    assert isinstance(loss, AttentionsLoss)
    return loss


def batch_of(mask: torch.Tensor, *, causal: bool = False) -> Batch:
    return Batch("sequence_classification", len(mask), {"layers": mask}, causal_stacks=frozenset({"layers"} if causal else ()))


def shown(layer: int, scores: torch.Tensor) -> Signals:
    return Signals(attention_scores={AttentionScores("layers", layer): scores})


def test_by_hand() -> None:
    # Two heads, two tokens. The teacher's first head gives query 1 (3/4, 1/4); the student gives one half everywhere.
    theirs = torch.zeros(1, 2, 2, 2)
    theirs[0, 0, 0, 0] = math.log(3)
    got = resolved()(shown(1, torch.zeros(1, 2, 2, 2)), shown(2, theirs), batch_of(torch.ones(1, 2).bool()))
    assert got.item() == pytest.approx((0.75 * math.log(1.5) + 0.25 * math.log(0.5)) / 2, rel=1e-6)


@pytest.mark.parametrize("causal", [False, True])
def test_plain_loop_and_blind_to_padding(causal: bool) -> None:
    ours, theirs = torch.randn(2, 2, 4, 4), torch.randn(2, 2, 4, 4)
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]]).bool()
    expected = 0.0
    for example in range(2):
        for query in (at for at in range(4) if mask[example, at]):
            keys = [key for key in range(4) if mask[example, key] and (key <= query or not causal)]
            for head in range(2):
                p = [math.exp(theirs[example, head, query, key].item()) for key in keys]
                q = [math.exp(ours[example, head, query, key].item()) for key in keys]
                expected += sum(a / sum(p) * math.log(a / sum(p) / (b / sum(q))) for a, b in zip(p, q, strict=True)) / 2
    batch = batch_of(mask, causal=causal)
    assert resolved()(shown(1, ours), shown(2, theirs), batch).item() == pytest.approx(expected, rel=1e-5)
    ours[1, :, 3], ours[1, :, :, 3], theirs[1, :, 3], theirs[1, :, :, 3] = float("nan"), 1e4, float("nan"), float("nan")
    ours.requires_grad_()
    again = resolved()(shown(1, ours), shown(2, theirs), batch)
    assert again.item() == pytest.approx(expected, rel=1e-5)
    again.backward()
    assert ours.grad is not None and bool(ours.grad.isfinite().all()) and ours.grad[1, :, 3].abs().sum() == 0


def test_zero_where_student_equals_teacher_and_where_a_query_is_shifted() -> None:
    scores, batch = torch.randn(2, 2, 4, 4), batch_of(torch.ones(2, 4).bool())
    assert abs(resolved()(shown(1, scores), shown(2, scores.clone()), batch).item()) < 1e-6
    assert abs(resolved()(shown(1, scores + torch.randn(2, 2, 4, 1)), shown(2, scores), batch).item()) < 1e-5


@pytest.mark.parametrize("causal", [False, True])
def test_gradients_are_the_numerical_ones(causal: bool) -> None:
    theirs, batch = torch.randn(1, 2, 3, 3, dtype=torch.float64), batch_of(torch.tensor([[1, 1, 0]]).bool(), causal=causal)
    assert torch.autograd.gradcheck(
        lambda ours: resolved()(shown(1, ours), shown(2, theirs), batch),
        (torch.randn(1, 2, 3, 3, dtype=torch.float64, requires_grad=True),),
    )


def test_the_last_pair_alone_and_heads_that_differ() -> None:
    (loss,) = AttentionsLoss(pairs="last").resolve(shape(2, 2), shape(6, 2))
    assert str(loss) == "1 x attentions (student:teacher 2:6)"
    with pytest.raises(LossError, match=r"student has 3 heads and the teacher 2.*attentions=0"):
        AttentionsLoss().resolve(shape(2, 3), shape(6, 2))
