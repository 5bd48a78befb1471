"""MixedLayersLoss against a hand-computed case, a plain loop, padding and numerical gradients."""

from __future__ import annotations

import math

import pytest
import torch

from hf_compress.errors import LossError
from hf_compress.losses.loss import Projection
from hf_compress.losses.mixed_layers import MixedLayersLoss
from hf_compress.losses.reduction import Batch
from hf_compress.signals import HiddenState, Signals
from hf_compress.task import ModelShape, Stack


def shape(layers: int, hidden: int, **more: bool) -> ModelShape:
    return ModelShape("Model", "sequence_classification", {"layers": Stack(layers, hidden, 2, **more)})


def resolved(loss: MixedLayersLoss, student: ModelShape, teacher: ModelShape) -> MixedLayersLoss:
    (found,) = loss.resolve(student, teacher)
    assert isinstance(found, MixedLayersLoss)
    return found


def batch_of(mask: torch.Tensor, last: bool = False) -> Batch:
    return Batch("sequence_classification", len(mask), {"layers": mask}, summary_last=frozenset({"layers"} if last else ()))


def student(*layers: tuple[torch.Tensor, torch.Tensor], fitted: str = "") -> Signals:
    """Of each layer: as it asks, and as it is compared."""
    states = {}
    for layer, (asking, compared) in enumerate(layers, start=1):
        states[HiddenState("layers", layer, "layers_asking")] = asking
        states[HiddenState("layers", layer, fitted)] = compared
    return Signals(hidden_states=states)


def teacher(*states: torch.Tensor) -> Signals:
    return Signals(hidden_states={HiddenState("layers", at): state for at, state in enumerate(states, start=1)})


def test_by_hand() -> None:
    # One example of one token, width 1. The teacher's layers are 0 and ln 3, the student asks with 1: weights 1/4 and 3/4.
    loss = resolved(MixedLayersLoss(), shape(1, 1), shape(2, 1))
    one = torch.ones(1, 1, 1)
    got = loss(student((one, 2 * one)), teacher(0 * one, math.log(3) * one), batch_of(torch.ones(1, 1).bool()))
    assert got.item() == pytest.approx((2 - 0.75 * math.log(3)) ** 2, rel=1e-6)


@pytest.mark.parametrize("last", [False, True])
def test_plain_loop_and_blind_to_everything_but_the_summary_token(last: bool) -> None:
    loss = resolved(MixedLayersLoss(((1, 2), (2, 3, 4))), shape(2, 3), shape(4, 3))
    ours = [(torch.randn(2, 4, 3), torch.randn(2, 4, 3)) for _ in range(2)]
    theirs = [torch.randn(2, 4, 3) for _ in range(4)]
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]).bool()
    tokens = (3, 1) if last else (0, 0)
    expected = 0.0
    for (asking, compared), bucket in zip(ours, ((1, 2), (2, 3, 4)), strict=True):
        for row, token in enumerate(tokens):
            products = [sum((asking[row, token] * theirs[k - 1][row, token]).tolist()) for k in bucket]
            weights = [math.exp(product) / sum(map(math.exp, products)) for product in products]
            for d in range(3):
                mixed = sum(weight * theirs[k - 1][row, token, d].item() for weight, k in zip(weights, bucket, strict=True))
                expected += (compared[row, token, d].item() - mixed) ** 2 / 3
    assert loss(student(*ours), teacher(*theirs), batch_of(mask, last)).item() == pytest.approx(expected, rel=1e-5)
    for state in (*theirs, *(state for pair in ours for state in pair)):
        for row, token in enumerate(tokens):
            kept = state[row, token].clone()
            state[row] = float("nan")
            state[row, token] = kept
    assert loss(student(*ours), teacher(*theirs), batch_of(mask, last)).item() == pytest.approx(expected, rel=1e-5)


def test_zero_where_the_student_is_the_only_layer_of_its_bucket() -> None:
    loss, states = resolved(MixedLayersLoss("regular"), shape(2, 3), shape(2, 3)), [torch.randn(2, 4, 3) for _ in range(2)]
    shown = student(*((torch.randn(2, 4, 3), state) for state in states))
    assert abs(loss(shown, teacher(*states), batch_of(torch.ones(2, 4).bool())).item()) < 1e-10


def test_gradients_are_the_numerical_ones() -> None:
    loss, theirs = resolved(MixedLayersLoss(), shape(1, 3), shape(2, 3)), [torch.randn(2, 2, 3, dtype=torch.float64) for _ in range(2)]
    inputs = tuple(torch.randn(2, 2, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    mask = torch.tensor([[1, 1], [1, 0]]).bool()
    assert torch.autograd.gradcheck(lambda asking, ours: loss(student((asking, ours)), teacher(*theirs), batch_of(mask)), inputs)


def test_buckets_and_maps() -> None:
    assert str(resolved(MixedLayersLoss(), shape(2, 4), shape(3, 4))).endswith("(student:teacher 1:1+2+3,2:1+2+3)")
    assert str(resolved(MixedLayersLoss("overlap"), shape(2, 4), shape(6, 4))).endswith("(student:teacher 1:1+2+3+4,2:3+4+5+6)")
    assert resolved(MixedLayersLoss(), shape(2, 4), shape(3, 4)).projections == {"layers_asking": Projection(4, 4, bias=False)}
    wider = resolved(MixedLayersLoss(), shape(2, 4), shape(3, 6))
    assert wider.projections == {"layers_asking": Projection(4, 6, bias=False), "layers_shared": Projection(4, 6)}
    assert wider.unit == "rows.layers"
    with pytest.raises(LossError, match="mixed_layers needs them whole"):
        MixedLayersLoss().resolve(shape(2, 4), shape(4, 4, selected=True))
