"""AttentionScoresLoss against a hand-computed case, a plain loop, padding, causality, skipped heads and numerical gradients."""

from __future__ import annotations

import pytest
import torch

from hf_compress.errors import LossError
from hf_compress.layers.layer_map import LayerMap
from hf_compress.losses.attention_scores import AttentionScoresLoss
from hf_compress.losses.reduction import Batch
from hf_compress.signals import AttentionScores, Signals
from hf_compress.task import ModelShape, Stack


def shape(layers: int, heads: int) -> ModelShape:
    return ModelShape("Model", "sequence_classification", {"layers": Stack(layers, 12, heads)})


def resolved(skip_heads: float | None = None) -> AttentionScoresLoss:
    (loss,) = AttentionScoresLoss(LayerMap(((1, 2),)), skip_heads=skip_heads).resolve(shape(1, 2), shape(2, 2))
    assert isinstance(loss, AttentionScoresLoss)
    return loss


def batch_of(mask: torch.Tensor, *, causal: bool = False, separators: torch.Tensor | None = None) -> Batch:
    return Batch(
        kind="sequence_classification",
        num_examples=len(mask),
        token_masks={"layers": mask},
        separators=separators,
        causal_stacks=frozenset({"layers"} if causal else ()),
    )


def student(scores: torch.Tensor) -> Signals:
    return Signals(attention_scores={AttentionScores("layers", 1): scores})


def teacher(scores: torch.Tensor) -> Signals:
    return Signals(attention_scores={AttentionScores("layers", 2): scores})


def test_by_hand() -> None:
    # One example, two heads, two tokens. Head 1 differs by 2 in one of two keys of query 1; head 2 by 1 in both keys of query 2.
    ours = torch.zeros(1, 2, 2, 2)
    theirs = torch.tensor([[[[2.0, 0.0], [0.0, 0.0]], [[0.0, 0.0], [1.0, 1.0]]]])
    got = resolved()(student(ours), teacher(theirs), batch_of(torch.ones(1, 2).bool()))
    assert got.item() == pytest.approx(4 / 2 / 2 + 1 / 2)


@pytest.mark.parametrize("causal", [False, True])
def test_plain_loop_and_blind_to_padding(causal: bool) -> None:
    ours, theirs = torch.randn(2, 2, 4, 4), torch.randn(2, 2, 4, 4)
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]]).bool()
    expected = 0.0
    for example in range(2):
        for query in range(4):
            if not mask[example, query]:
                continue
            keys = [key for key in range(4) if mask[example, key] and (key <= query or not causal)]
            for head in range(2):
                squares = [(ours[example, head, query, key] - theirs[example, head, query, key]).item() ** 2 for key in keys]
                expected += sum(squares) / len(keys) / 2
    batch = batch_of(mask, causal=causal)
    assert resolved()(student(ours), teacher(theirs), batch).item() == pytest.approx(expected, rel=1e-5)
    ours[1, :, 3], ours[1, :, :, 3], theirs[1, :, 3], theirs[1, :, :, 3] = 1e4, 1e4, float("nan"), float("nan")
    assert resolved()(student(ours), teacher(theirs), batch).item() == pytest.approx(expected, rel=1e-5)


def test_zero_where_student_equals_teacher() -> None:
    scores = torch.randn(2, 2, 4, 4)
    assert resolved()(student(scores), teacher(scores.clone()), batch_of(torch.ones(2, 4).bool())).item() == 0.0


def test_heads_that_look_at_separators_are_skipped() -> None:
    # Token 3 is a separator. Head 1 of the teacher looks at it alone; head 2 looks everywhere alike.
    theirs = torch.zeros(1, 2, 3, 3)
    theirs[0, 0, :, 2] = 50.0
    ours = torch.zeros(1, 2, 3, 3)
    ours[0, 1] = 1.0  # off by one in head 2: mean square 1 a query
    batch = batch_of(torch.ones(1, 3).bool(), separators=torch.tensor([[False, False, True]]))
    assert resolved(skip_heads=0.9)(student(ours), teacher(theirs), batch).item() == pytest.approx(3.0)
    assert resolved()(student(ours), teacher(theirs), batch).item() > 100
    with pytest.raises(LossError, match="separator"):
        resolved(skip_heads=0.9)(student(ours), teacher(theirs), batch_of(torch.ones(1, 3).bool()))


def test_gradients_are_the_numerical_ones() -> None:
    theirs = torch.randn(1, 2, 3, 3, dtype=torch.float64)
    batch = batch_of(torch.tensor([[1, 1, 0]]).bool())
    assert torch.autograd.gradcheck(
        lambda ours: resolved()(student(ours), teacher(theirs), batch), (torch.randn(1, 2, 3, 3, dtype=torch.float64, requires_grad=True),)
    )


def test_other_numbers_of_heads_are_refused_with_layers_and_a_way_out() -> None:
    with pytest.raises(LossError, match=r"student has 12 heads and the teacher 16 \(layers 1:1, 2:2\).*distilbert or pkd"):
        AttentionScoresLoss().resolve(shape(2, 12), shape(2, 16))


@pytest.mark.parametrize("bad", [{"skip_heads": 1.5}, {"layer_map": LayerMap(((0, 0),))}])
def test_bad_settings_are_refused(bad: dict[str, object]) -> None:
    with pytest.raises(LossError):
        AttentionScoresLoss(**bad)
