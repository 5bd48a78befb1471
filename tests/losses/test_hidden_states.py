"""HiddenStatesLoss and EmbeddingsLoss against a hand-computed case, a plain loop, padding and numerical gradients."""

from __future__ import annotations

import math

import pytest
import torch

from hf_compress.errors import LayerMapError, LossError
from hf_compress.layers.layer_map import LayerMap
from hf_compress.losses.attention_scores import AttentionsLoss
from hf_compress.losses.hidden_states import EmbeddingsLoss, HiddenStatesLoss, Pairs, summary_index
from hf_compress.losses.loss import Projection
from hf_compress.losses.reduction import Batch
from hf_compress.losses.relations import ValueRelationsLoss
from hf_compress.signals import HiddenState, Signals
from hf_compress.task import ModelShape, Stack


def shape(layers: int, hidden: int, heads: int = 2) -> ModelShape:
    return ModelShape("Model", "sequence_classification", {"layers": Stack(layers, hidden, heads)})


def batch_of(mask: torch.Tensor, last: bool = False) -> Batch:
    return Batch(
        kind="sequence_classification",
        num_examples=len(mask),
        token_masks={"layers": mask},
        summary_last=frozenset({"layers"} if last else ()),
    )


def signals(**layers: torch.Tensor) -> Signals:
    return Signals(hidden_states={HiddenState("layers", int(name[1:])): tensor for name, tensor in layers.items()})


def one_layer(kind: str) -> HiddenStatesLoss:
    (loss,) = HiddenStatesLoss(LayerMap(((1, 2),)), kind=kind).resolve(shape(1, 3), shape(2, 3))
    assert isinstance(loss, HiddenStatesLoss)
    return loss


def test_mse_by_hand() -> None:
    # One example of two tokens, three dimensions: squared differences 1, 4, 0 and 0, 0, 9.
    student = torch.tensor([[[1.0, 2.0, 3.0], [0.0, 0.0, 0.0]]])
    teacher = torch.tensor([[[2.0, 0.0, 3.0], [0.0, 0.0, 3.0]]])
    got = one_layer("mse")(signals(l1=student), signals(l2=teacher), batch_of(torch.ones(1, 2).bool()))
    assert got.item() == pytest.approx(5 / 3 + 9 / 3)


@pytest.mark.parametrize("kind", ["mse", "cosine", "summary"])
def test_plain_loop_and_blind_to_padding(kind: str) -> None:
    student, teacher = torch.randn(2, 4, 3), torch.randn(2, 4, 3)
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]).bool()
    expected = 0.0
    for example in range(2):
        for token in range(4):
            s, t = student[example, token].tolist(), teacher[example, token].tolist()
            norm_s, norm_t = math.sqrt(sum(v * v for v in s)), math.sqrt(sum(v * v for v in t))
            if not mask[example, token] or (kind == "summary" and token > 0):
                continue
            if kind == "mse":
                expected += sum((a - b) ** 2 for a, b in zip(s, t, strict=True)) / 3
            elif kind == "cosine":
                expected += 1 - sum(a * b for a, b in zip(s, t, strict=True)) / norm_s / norm_t
            else:
                expected += sum((a / norm_s - b / norm_t) ** 2 for a, b in zip(s, t, strict=True))
    loss = one_layer(kind)
    assert loss(signals(l1=student), signals(l2=teacher), batch_of(mask)).item() == pytest.approx(expected, rel=1e-5)
    student[1, 2:], teacher[1, 2:] = 1e4, float("nan")
    assert loss(signals(l1=student), signals(l2=teacher), batch_of(mask)).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("kind", ["mse", "cosine", "summary"])
def test_zero_where_student_equals_teacher(kind: str) -> None:
    state = torch.randn(2, 4, 3)
    got = one_layer(kind)(signals(l1=state), signals(l2=state.clone()), batch_of(torch.ones(2, 4).bool()))
    assert abs(got.item()) < 1e-5


@pytest.mark.parametrize("kind", ["mse", "cosine", "summary"])
def test_gradients_are_the_numerical_ones(kind: str) -> None:
    teacher = torch.randn(2, 3, 3, dtype=torch.float64)
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]]).bool()
    assert torch.autograd.gradcheck(
        lambda student: one_layer(kind)(signals(l1=student), signals(l2=teacher), batch_of(mask)),
        (torch.randn(2, 3, 3, dtype=torch.float64, requires_grad=True),),
    )


def test_summary_token_is_the_first_real_one_or_the_last() -> None:
    right_padded = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]]).bool()
    left_padded = right_padded.flip(1)
    assert summary_index(right_padded, last=False).tolist() == [0, 0]
    assert summary_index(right_padded, last=True).tolist() == [2, 0]
    assert summary_index(left_padded, last=False).tolist() == [1, 3]
    assert summary_index(left_padded, last=True).tolist() == [3, 3]


def test_the_last_real_token_is_compared_in_causal_stacks() -> None:
    student, teacher = torch.randn(1, 3, 3), torch.randn(1, 3, 3)
    teacher[0, 1] = student[0, 1]
    mask = torch.tensor([[1, 1, 0]]).bool()
    loss = one_layer("summary")
    assert abs(loss(signals(l1=student), signals(l2=teacher), batch_of(mask, last=True)).item()) < 1e-6
    assert loss(signals(l1=student), signals(l2=teacher), batch_of(mask)).item() > 0.01


def test_the_default_map_is_uniform_and_layers_add_up() -> None:
    (loss,) = HiddenStatesLoss().resolve(shape(2, 3), shape(4, 3))
    assert isinstance(loss, HiddenStatesLoss) and loss.layer_map is not None
    assert loss.layer_map.pairs == ((1, 2), (2, 4))
    zeros, ones = torch.zeros(1, 2, 3), torch.ones(1, 2, 3)
    got = loss(signals(l1=zeros, l2=zeros), signals(l2=ones, l4=2 * ones), batch_of(torch.ones(1, 2).bool()))
    assert got.item() == pytest.approx(2 * 1 + 2 * 4)


def test_projections_appear_only_where_widths_differ() -> None:
    shared, per_layer = HiddenStatesLoss(), HiddenStatesLoss(projection="per_layer")
    assert shared.resolve(shape(2, 3), shape(4, 3))[0].projections == {}
    assert shared.resolve(shape(2, 3), shape(4, 6))[0].projections == {"layers_shared": Projection(3, 6)}
    assert set(per_layer.resolve(shape(2, 3), shape(4, 6))[0].projections) == {"layers_layer_1", "layers_layer_2"}
    assert EmbeddingsLoss().resolve(shape(2, 3), shape(4, 6))[0].projections == {"layers_shared": Projection(3, 6)}
    with pytest.raises(LossError, match="hidden size is 3 and the teacher's 6"):
        HiddenStatesLoss(projection="none").resolve(shape(2, 3), shape(4, 6))


def test_embeddings_are_layer_zero_of_both() -> None:
    (loss,) = EmbeddingsLoss().resolve(shape(2, 3), shape(4, 3))
    assert {(key.stack, key.layer) for key in loss.teacher_spec().hidden_states} == {("layers", 0)}


def test_a_map_outside_the_models_is_refused() -> None:
    with pytest.raises(LayerMapError, match="the teacher has 4 layers"):
        HiddenStatesLoss(LayerMap(((1, 5),))).resolve(shape(2, 3), shape(4, 3))


@pytest.mark.parametrize("kind", [HiddenStatesLoss, AttentionsLoss, ValueRelationsLoss])
def test_the_last_pair_is_of_both_last_layers_whatever_was_dropped(kind: type[HiddenStatesLoss]) -> None:
    dropped = ModelShape("Student", "sequence_classification", {"layers": Stack(6, 4, 2, kept=(1, 2, 3, 4, 5, 6), full_depth=12)})
    deep = ModelShape("Teacher", "sequence_classification", {"layers": Stack(12, 4, 2)})
    (loss,) = kind(pairs="last").resolve(dropped, deep)
    assert str(loss.layer_map) == "6:12"
    (named,) = kind("3:7,2:5", pairs="last").resolve(dropped, deep)
    assert str(named.layer_map) == "3:7"


@pytest.mark.parametrize(("which", "found"), [("last", "6:12"), ("all_but_last", "1:2,3:6"), ("middle", "3:6"), ("all", "1:2,3:6,6:12")])
def test_pairs_are_chosen_from_the_bottom_to_the_top(which: Pairs, found: str) -> None:
    shapes = [ModelShape("Model", "sequence_classification", {"layers": Stack(depth, 4, 2)}) for depth in (6, 12)]
    (loss,) = HiddenStatesLoss("6:12,1:2,3:6", pairs=which).resolve(*shapes)
    assert isinstance(loss, HiddenStatesLoss) and str(loss.layer_map) == found
