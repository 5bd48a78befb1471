"""The relation losses against a hand-computed case, a plain loop, padding, causality, and numerical gradients."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MiniCPM3Config

from hf_compress.errors import LossError
from hf_compress.layers.layer_map import LayerMap
from hf_compress.losses.reduction import Batch
from hf_compress.losses.relations import KeyRelationsLoss, QueryRelationsLoss, RelationsLoss, ValueRelationsLoss
from hf_compress.signals import AttentionVectors, Signals
from hf_compress.task import ModelShape, Stack

KINDS = [QueryRelationsLoss, KeyRelationsLoss, ValueRelationsLoss]


def shape(layers: int, hidden: int, heads: int, **more: int) -> ModelShape:
    return ModelShape("Model", "sequence_classification", {"layers": Stack(layers, hidden, heads, **more)})


def resolved(loss: RelationsLoss, student: ModelShape, teacher: ModelShape) -> RelationsLoss:
    (found,) = loss.resolve(student, teacher)
    assert isinstance(found, RelationsLoss)
    return found


def one_layer(relation_heads: int | str = 2, kind: type[RelationsLoss] = ValueRelationsLoss) -> RelationsLoss:
    return resolved(kind(LayerMap(((1, 2),)), relation_heads=relation_heads), shape(1, 8, 2), shape(2, 12, 3))  # type: ignore[arg-type]


def batch_of(mask: torch.Tensor, *, causal: bool = False) -> Batch:
    causal_stacks = frozenset({"layers"} if causal else ())
    return Batch("sequence_classification", len(mask), {"layers": mask}, causal_stacks=causal_stacks)


def shown(layer: int, vectors: torch.Tensor, kind: str = "values") -> Signals:
    return Signals(attention_vectors={AttentionVectors("layers", layer, kind): vectors})  # type: ignore[arg-type]


def loop(student: torch.Tensor, teacher: torch.Tensor, mask: torch.Tensor, heads: int, causal: bool) -> float:
    """(batch, heads, tokens, width) each: one token, one relation head, one related token after another."""

    def relation(vectors: torch.Tensor, example: int, head: int, token: int) -> list[float]:
        # All heads' numbers of a token in a row, and of those the relation head's.
        rows = [torch.cat([vectors[example, own, at] for own in range(vectors.shape[1])]).tolist() for at in range(vectors.shape[2])]
        width = len(rows[0]) // heads
        cut = [row[head * width : (head + 1) * width] for row in rows]
        seen = [at for at in range(len(cut)) if mask[example, at] and (at <= token or not causal)]
        powers = [math.exp(sum(a * b for a, b in zip(cut[token], cut[at], strict=True)) / math.sqrt(width)) for at in seen]
        return [power / sum(powers) for power in powers]

    total = 0.0
    for example, row in enumerate(mask.tolist()):
        for token in (at for at, real in enumerate(row) if real):
            for head in range(heads):
                p, q = relation(teacher, example, head, token), relation(student, example, head, token)
                total += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)) / heads
    return total


def test_by_hand() -> None:
    # Two tokens, one relation head, one dimension. The teacher's vectors are 1 and 0, the student's 0 and 0: of the first token
    # the teacher's relations are softmax(1, 0), of the second softmax(0, 0), and the student's are all one half.
    loss = resolved(ValueRelationsLoss(LayerMap(((1, 2),)), relation_heads=1), shape(1, 1, 1), shape(2, 1, 1))
    p = math.e / (math.e + 1)
    got = loss(shown(1, torch.zeros(1, 1, 2, 1)), shown(2, torch.tensor([[[[1.0], [0.0]]]])), batch_of(torch.ones(1, 2).bool()))
    assert got.item() == pytest.approx(p * math.log(p / 0.5) + (1 - p) * math.log((1 - p) / 0.5), rel=1e-6)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("heads", [1, 2, 4])
def test_plain_loop_and_blind_to_padding(heads: int, causal: bool) -> None:
    student, teacher = torch.randn(2, 2, 4, 4), torch.randn(2, 3, 4, 4)
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]]).bool()
    loss, batch = one_layer(heads), batch_of(mask, causal=causal)
    expected = loop(student, teacher, mask, heads, causal)
    assert expected > 0.1
    assert loss(shown(1, student), shown(2, teacher), batch).item() == pytest.approx(expected, rel=1e-5)
    student[1, :, 3], teacher[1, :, 3] = float("nan"), float("nan")
    student.requires_grad_()
    again = loss(shown(1, student), shown(2, teacher), batch)
    assert again.item() == pytest.approx(expected, rel=1e-5)
    again.backward()
    assert student.grad is not None and bool(student.grad.isfinite().all()) and student.grad[1, :, 3].abs().sum() == 0


@pytest.mark.parametrize("kind", KINDS)
def test_zero_where_student_equals_teacher(kind: type[RelationsLoss]) -> None:
    loss = resolved(kind(LayerMap(((1, 2),)), "own"), shape(1, 8, 2), shape(2, 8, 2))
    vectors = torch.randn(2, 2, 4, 4)
    got = loss(shown(1, vectors, kind.kind), shown(2, vectors.clone(), kind.kind), batch_of(torch.ones(2, 4).bool()))
    assert abs(got.item()) < 1e-6


def test_gradients_are_the_numerical_ones() -> None:
    teacher, batch = torch.randn(2, 3, 3, 4, dtype=torch.float64), batch_of(torch.tensor([[1, 1, 1], [1, 1, 0]]).bool())
    assert torch.autograd.gradcheck(
        lambda student: one_layer()(shown(1, student), shown(2, teacher), batch),
        (torch.randn(2, 2, 3, 4, dtype=torch.float64, requires_grad=True),),
    )


def test_the_last_layers_are_compared_unless_a_map_says_which() -> None:
    student, teacher = shape(3, 8, 2), shape(12, 16, 4)
    assert str(resolved(ValueRelationsLoss(), student, teacher).layer_map) == "3:12"
    assert str(resolved(ValueRelationsLoss("3:10"), student, teacher).layer_map) == "3:10"
    assert str(resolved(ValueRelationsLoss(pairs="all"), student, teacher).layer_map) == "1:4,2:8,3:12"


@pytest.mark.parametrize(
    ("student", "teacher", "heads"),
    [
        ((768, 12), (768, 12), 48),  # the paper's, of BERT-base
        ((384, 12), (768, 12), 48),
        ((384, 12), (1024, 16), 64),  # and of BERT-large
        ((312, 12), (768, 12), 24),
        ((8, 2), (16, 2), 1),
    ],
)
def test_the_number_of_relation_heads_is_the_papers_or_divides_both(student: tuple[int, int], teacher: tuple[int, int], heads: int) -> None:
    assert resolved(ValueRelationsLoss(), shape(1, *student), shape(2, *teacher)).relation_heads == heads


def test_grouped_keys_have_a_width_of_their_own() -> None:
    grouped = shape(2, 16, 4, num_key_value_heads=2, head_size=8)
    assert resolved(QueryRelationsLoss(relation_heads=32), grouped, grouped).relation_heads == 32  # 4 heads of 8
    with pytest.raises(
        LossError, match=r"32 relation heads do not divide the keys.*student's are 16 wide and the teacher's 16.*divides 16"
    ):
        KeyRelationsLoss(relation_heads=32).resolve(grouped, grouped)
    with pytest.raises(LossError, match="student has 2 heads of values and the teacher 4"):
        ValueRelationsLoss(relation_heads="own").resolve(grouped, shape(2, 16, 4))


def test_heads_that_do_not_divide_are_refused_with_both_widths() -> None:
    with pytest.raises(
        LossError, match="5 relation heads do not divide the values of both models: the student's are 8 wide and the teacher's 12"
    ):
        one_layer(5)


@pytest.mark.parametrize("bad", [{"relation_heads": 0}, {"relation_heads": "all"}, {"layer_map": LayerMap(((0, 0),))}])
def test_bad_settings_are_refused(bad: dict[str, object]) -> None:
    with pytest.raises(LossError):
        ValueRelationsLoss(**bad)  # type: ignore[arg-type]


def test_models_that_hide_their_attention_are_refused() -> None:
    hidden = ModelShape("XLNet", "sequence_classification", {"layers": Stack(2, 8, 2)}, shows_attention_vectors=False)
    with pytest.raises(LossError, match=r"its keys cannot be seen.*key_relations=0"):
        KeyRelationsLoss().resolve(shape(2, 8, 2), hidden)


def test_heads_of_other_widths_for_values_are_refused() -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
    latent = {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8}
    model = AutoModelForCausalLM.from_config(MiniCPM3Config(vocab_size=50, **sizes, **latent))
    usual = ModelShape.of(AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=50, **sizes, head_dim=12)))
    assert usual.shows_attention_vectors
    for student, teacher in ((ModelShape.of(model), usual), (usual, ModelShape.of(model))):
        with pytest.raises(LossError, match=r"MiniCPM3ForCausalLM computes its attention in a way of its own .* other widths"):
            ValueRelationsLoss().resolve(student, teacher)
