"""HintLoss: the middle layers, through a regressor that is always there."""

from __future__ import annotations

import pytest
import torch

from hf_compress.errors import LossError
from hf_compress.losses.hidden_states import HiddenStatesLoss, HintLoss
from hf_compress.losses.loss import Projection
from hf_compress.losses.reduction import Batch
from hf_compress.signals import HiddenState, Signals
from hf_compress.task import ModelShape, Stack


def shape(layers: int, hidden: int) -> ModelShape:
    return ModelShape("Model", "sequence_classification", {"layers": Stack(layers, hidden, 2)})


def resolved(student: ModelShape, teacher: ModelShape, layer_map: str | None = None) -> HintLoss:
    (loss,) = HintLoss(layer_map).resolve(student, teacher)
    assert isinstance(loss, HintLoss)
    return loss


@pytest.mark.parametrize(
    ("layers", "layer_map", "pair"), [((4, 12), None, "2:6"), ((3, 12), None, "2:8"), ((2, 4), None, "1:2"), ((4, 12), "3:7", "3:7")]
)
def test_the_middle_pair_of_the_map(layers: tuple[int, int], layer_map: str | None, pair: str) -> None:
    assert str(resolved(shape(layers[0], 4), shape(layers[1], 4), layer_map).layer_map) == pair


def test_a_regressor_at_equal_widths_too() -> None:
    assert resolved(shape(2, 4), shape(4, 4)).projections == {"layers_hint_1": Projection(4, 4)}
    assert resolved(shape(2, 4), shape(4, 6)).projections == {"layers_hint_1": Projection(4, 6)}
    assert HiddenStatesLoss().resolve(shape(2, 4), shape(4, 4))[0].projections == {}
    for choice in ("none", "shared"):
        with pytest.raises(LossError, match="has a regressor for each layer"):
            HintLoss(projection=choice)


def test_plain_loop_zero_at_equality_padding_and_gradients() -> None:
    loss, mask = resolved(shape(2, 4), shape(4, 3)), torch.tensor([[1, 1, 1], [1, 0, 0]]).bool()
    batch, key = Batch("sequence_classification", 2, {"layers": mask}), HiddenState("layers", 1, "layers_hint_1")
    assert loss.student_spec().hidden_states == {key} and loss.teacher_spec().hidden_states == {HiddenState("layers", 2)}
    ours, theirs = torch.randn(2, 3, 3, dtype=torch.float64), torch.randn(2, 3, 3, dtype=torch.float64)  # ours is regressed

    def value(student: torch.Tensor) -> torch.Tensor:
        return loss(Signals(hidden_states={key: student}), Signals(hidden_states={HiddenState("layers", 2): theirs}), batch)

    expected = sum(
        sum((a - b) ** 2 for a, b in zip(ours[row, token].tolist(), theirs[row, token].tolist(), strict=True)) / 3
        for row, token in ((0, 0), (0, 1), (0, 2), (1, 0))
    )
    assert value(ours).item() == pytest.approx(expected)
    theirs[1, 1:] = float("nan")
    assert value(ours).item() == pytest.approx(expected)
    assert value(theirs.nan_to_num()).item() == 0.0
    assert torch.autograd.gradcheck(value, (ours.requires_grad_(),))
