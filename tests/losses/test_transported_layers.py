"""The many-to-many losses against a plain loop, padding, batching, and numerical gradients."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from hf_compress.errors import LossError
from hf_compress.losses.loss import Projection
from hf_compress.losses.reduction import Batch
from hf_compress.losses.transport import cheaper_first, transport_plan
from hf_compress.losses.transported_layers import AttentionScoresTransportLoss, HiddenStatesTransportLoss, TransportLoss
from hf_compress.signals import AttentionScores, HiddenState, Signals
from hf_compress.task import ModelShape, Stack

MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]).bool()
KINDS = [HiddenStatesTransportLoss, AttentionScoresTransportLoss]


def shape(layers: int, hidden: int = 3, **more: bool) -> ModelShape:
    return ModelShape("Model", "sequence_classification", {"layers": Stack(layers, hidden, 2, **more)})


def resolved(kind: type[TransportLoss], students: int, teachers: int, reweight: bool = True) -> TransportLoss:
    (loss,) = kind(reweight).resolve(shape(students), shape(teachers))  # type: ignore[abstract]
    assert isinstance(loss, TransportLoss)
    return loss


def shown(kind: type[TransportLoss], layers: list[torch.Tensor]) -> Signals:
    if kind is HiddenStatesTransportLoss:
        return Signals(hidden_states={HiddenState("layers", at): each for at, each in enumerate(layers, start=1)})
    return Signals(attention_scores={AttentionScores("layers", at): each for at, each in enumerate(layers, start=1)})


def random_layers(kind: type[TransportLoss], count: int, batch: int = 2, tokens: int = 4) -> list[torch.Tensor]:
    size = (batch, tokens, 3) if kind is HiddenStatesTransportLoss else (batch, 2, tokens, tokens)
    return [torch.randn(size, dtype=torch.float64) for _ in range(count)]


def batch_of(mask: torch.Tensor, *, causal: bool = False) -> Batch:
    return Batch("sequence_classification", len(mask), {"layers": mask}, causal_stacks=frozenset({"layers"} if causal else ()))


def error(kind: type[TransportLoss], ours: torch.Tensor, theirs: torch.Tensor, row: int, causal: bool) -> float:
    """Of one example and one pair of layers, summed over its real tokens."""
    real = [at for at in range(MASK.shape[1]) if MASK[row, at]]
    if kind is HiddenStatesTransportLoss:
        return sum(float((ours[row, at, d] - theirs[row, at, d]) ** 2) / 3 for at in real for d in range(3))
    total = 0.0
    for query in real:
        keys = [key for key in real if key <= query or not causal]
        total += sum(
            float((ours[row, head, query, key] - theirs[row, head, query, key]) ** 2) / len(keys) / 2 for key in keys for head in (0, 1)
        )
    return total


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("reweight", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_plain_loop_and_blind_to_padding(kind: type[TransportLoss], reweight: bool, causal: bool) -> None:
    loss, ours, theirs = resolved(kind, 2, 4, reweight), random_layers(kind, 2), random_layers(kind, 4)
    expected = 0.0
    for row in range(2):
        errors = torch.tensor([[[error(kind, one, other, row, causal) for other in theirs] for one in ours]], dtype=torch.float64)
        costs = errors / int(MASK[row].sum())
        flow = transport_plan(costs, torch.full((1, 2), 0.5, dtype=torch.float64), torch.full((1, 4), 0.25, dtype=torch.float64))
        if reweight:
            flow = transport_plan(costs, *cheaper_first(flow, costs))
        expected += float((flow * errors).sum())
    batch = batch_of(MASK, causal=causal)
    assert loss(shown(kind, ours), shown(kind, theirs), batch).item() == pytest.approx(expected, rel=1e-9)
    for layer in (*ours, *theirs):
        layer[1, ..., 2:, :] = float("nan")
        if kind is AttentionScoresTransportLoss:
            layer[1, ..., 2:] = float("nan")
    ours[0].requires_grad_()
    again = loss(shown(kind, ours), shown(kind, theirs), batch)
    assert again.item() == pytest.approx(expected, rel=1e-9)
    again.backward()
    assert ours[0].grad is not None and bool(ours[0].grad.isfinite().all())


@pytest.mark.parametrize("kind", KINDS)
def test_each_layer_finds_its_own(kind: type[TransportLoss]) -> None:
    """By hand: the student's layers are the teacher's in another order, so all is moved for nothing."""
    loss, theirs = resolved(kind, 3, 3, reweight=False), random_layers(kind, 3)
    got = loss(shown(kind, [theirs[2].clone(), theirs[0].clone(), theirs[1].clone()]), shown(kind, theirs), batch_of(MASK))
    assert abs(got.item()) < 1e-5
    assert loss(shown(kind, [theirs[0], theirs[0], theirs[1]]), shown(kind, theirs), batch_of(MASK)).item() > 0.1


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_is_the_sum_of_its_examples(kind: type[TransportLoss]) -> None:
    loss, ours, theirs = resolved(kind, 2, 4), random_layers(kind, 2), random_layers(kind, 4)
    whole = loss(shown(kind, ours), shown(kind, theirs), batch_of(MASK)).item()
    parts = [
        loss(
            shown(kind, [each[row : row + 1] for each in ours]),
            shown(kind, [each[row : row + 1] for each in theirs]),
            batch_of(MASK[row : row + 1]),
        )
        for row in range(2)
    ]
    assert whole == pytest.approx(sum(part.item() for part in parts), rel=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_the_numerical_ones_where_the_flow_is_settled(kind: type[TransportLoss]) -> None:
    """One student layer gives each teacher layer what that weighs."""
    loss, theirs = resolved(kind, 1, 3, reweight=False), random_layers(kind, 3)
    value: Callable[[torch.Tensor], torch.Tensor] = lambda ours: loss(shown(kind, [ours]), shown(kind, theirs), batch_of(MASK))  # noqa: E731
    assert torch.autograd.gradcheck(value, (random_layers(kind, 1)[0].requires_grad_(),))


def test_maps_and_refusals() -> None:
    (loss,) = HiddenStatesTransportLoss().resolve(shape(2), shape(4, 6))
    assert loss.projections == {"layers_shared": Projection(3, 6)}
    assert resolved(HiddenStatesTransportLoss, 2, 4).projections == {}
    assert str(loss) == "1 x hidden_states_transport (2 student layers, 4 teacher layers)"
    with pytest.raises(LossError, match="hidden_states_transport needs them whole"):
        HiddenStatesTransportLoss().resolve(shape(2), shape(4, selected=True))
    other = ModelShape("Model", "sequence_classification", {"layers": Stack(4, 3, 3)})
    with pytest.raises(LossError, match=r"student has 2 heads and the teacher 3 \(all layers\)"):
        AttentionScoresTransportLoss().resolve(shape(2), other)


@pytest.mark.parametrize("kind", KINDS)
def test_what_all_layers_have_in_common_does_not_drown_their_differences(kind: type[TransportLoss]) -> None:
    loss, (common,) = resolved(kind, 2, 4), random_layers(kind, 1)
    ours, theirs = ([(layer + 1e3 * common).float() for layer in random_layers(kind, count)] for count in (2, 4))
    exact = loss(shown(kind, [each.double() for each in ours]), shown(kind, [each.double() for each in theirs]), batch_of(MASK))
    ours[0].requires_grad_()
    found = loss(shown(kind, ours), shown(kind, theirs), batch_of(MASK))
    assert found.item() == pytest.approx(exact.item(), rel=1e-4)
    (gradient,) = torch.autograd.grad(found, ours[0])
    assert float(gradient.abs().max()) < 10  # of differences of about 1
