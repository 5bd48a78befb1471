"""CombinedLayersLoss against a hand-computed case, a plain loop, padding and numerical gradients."""

from __future__ import annotations

import pytest
import torch

from hf_compress.errors import LayerMapError, LossError
from hf_compress.losses.combined_layers import CombinedLayersLoss
from hf_compress.losses.loss import Projection
from hf_compress.losses.reduction import Batch
from hf_compress.signals import HiddenState, Signals
from hf_compress.task import ModelShape, Stack


def shape(layers: int, hidden: int, **more: bool) -> ModelShape:
    return ModelShape("Model", "sequence_classification", {"layers": Stack(layers, hidden, 2, **more)})


def resolved(loss: CombinedLayersLoss, student: ModelShape, teacher: ModelShape) -> CombinedLayersLoss:
    (found,) = loss.resolve(student, teacher)
    assert isinstance(found, CombinedLayersLoss)
    return found


def batch_of(mask: torch.Tensor) -> Batch:
    return Batch("sequence_classification", len(mask), {"layers": mask})


def student(*states: torch.Tensor) -> Signals:
    """What the student shows: its layers, widened."""
    return Signals(hidden_states={HiddenState("layers", at, f"layers_combined_{at}"): state for at, state in enumerate(states, start=1)})


def teacher(*states: torch.Tensor) -> Signals:
    return Signals(hidden_states={HiddenState("layers", at): state for at, state in enumerate(states, start=1)})


def test_by_hand() -> None:
    # One token, one student layer, two teacher layers of width 1: (1, 5) against 3 and 4 is 4 and 1, of two numbers.
    loss = resolved(CombinedLayersLoss(), shape(1, 3), shape(2, 1))
    got = loss(
        student(torch.tensor([[[1.0, 5.0]]])), teacher(torch.tensor([[[3.0]]]), torch.tensor([[[4.0]]])), batch_of(torch.ones(1, 1).bool())
    )
    assert got.item() == pytest.approx((4 + 1) / 2)


def test_plain_loop_and_blind_to_padding() -> None:
    loss = resolved(CombinedLayersLoss(((1, 3), (2, 3, 5))), shape(2, 4), shape(5, 3))
    ours, theirs = [torch.randn(2, 4, 6), torch.randn(2, 4, 9)], [torch.randn(2, 4, 3) for _ in range(5)]
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]).bool()
    expected = 0.0
    for state, group in zip(ours, ((1, 3), (2, 3, 5)), strict=True):
        for example in range(2):
            for token in (at for at in range(4) if mask[example, at]):
                aim = [value for layer in group for value in theirs[layer - 1][example, token].tolist()]
                expected += sum((a - b) ** 2 for a, b in zip(state[example, token].tolist(), aim, strict=True)) / len(aim)
    assert loss(student(*ours), teacher(*theirs), batch_of(mask)).item() == pytest.approx(expected, rel=1e-5)
    for state in (*ours, *theirs):
        state[1, 2:] = float("nan")
    assert loss(student(*ours), teacher(*theirs), batch_of(mask)).item() == pytest.approx(expected, rel=1e-5)


def test_zero_where_the_widened_state_is_the_group() -> None:
    loss, states = resolved(CombinedLayersLoss(), shape(1, 4), shape(2, 3)), [torch.randn(2, 4, 3) for _ in range(2)]
    assert loss(student(torch.cat(states, -1)), teacher(*states), batch_of(torch.ones(2, 4).bool())).item() == 0.0


def test_gradients_are_the_numerical_ones() -> None:
    loss, theirs = resolved(CombinedLayersLoss(), shape(1, 4), shape(2, 3)), [torch.randn(2, 3, 3, dtype=torch.float64) for _ in range(2)]
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]]).bool()
    assert torch.autograd.gradcheck(
        lambda ours: loss(student(ours), teacher(*theirs), batch_of(mask)), (torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True),)
    )


def test_every_student_layer_has_a_map_to_the_joint_width_of_its_group() -> None:
    loss = resolved(CombinedLayersLoss(), shape(2, 4), shape(5, 3))
    assert str(loss) == "1 x combined_layers (student:teacher 1:1+2,2:3+4+5)"
    assert loss.projections == {"layers_combined_1": Projection(4, 6), "layers_combined_2": Projection(4, 9)}
    assert {key.layer for key in loss.teacher_spec().hidden_states} == {1, 2, 3, 4, 5}
    assert resolved(CombinedLayersLoss("overlap"), shape(2, 4), shape(5, 3)).projections["layers_combined_1"] == Projection(4, 9)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(LossError, match=r"part of its hidden states.*combined_layers needs them whole"):
        CombinedLayersLoss().resolve(shape(2, 4), shape(4, 4, selected=True))
    with pytest.raises(LayerMapError, match="names layer 9"):
        CombinedLayersLoss(((1,), (9,))).resolve(shape(2, 4), shape(4, 4))
