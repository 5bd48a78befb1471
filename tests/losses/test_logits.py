"""LogitsLoss against a hand-computed case, a plain loop, padding and numerical gradients."""

from __future__ import annotations

import math

import pytest
import torch

from hf_compress.errors import LossError
from hf_compress.losses.logits import LogitsLoss
from hf_compress.losses.reduction import Batch
from hf_compress.signals import Signals


def batch_of(mask: torch.Tensor, kind: str = "sequence_classification", **more: object) -> Batch:
    return Batch(kind=kind, num_examples=len(mask), token_masks={"layers": mask}, **more)


def signals(logits: torch.Tensor) -> Signals:
    return Signals(logits={"logits": logits})


ANY = torch.ones(2, 4, dtype=torch.bool)


def test_kl_by_hand() -> None:
    # Two examples, two classes, T = 2: the teacher says (0, 2 ln 3), that is p = (1/4, 3/4); the student says (0, 0).
    teacher = torch.tensor([[0.0, 2 * math.log(3)], [0.0, 0.0]])
    student = torch.zeros(2, 2)
    by_hand = 4 * (0.25 * math.log(0.25 / 0.5) + 0.75 * math.log(0.75 / 0.5))  # the second example adds nothing
    got = LogitsLoss(temperature=2.0)(signals(student), signals(teacher), batch_of(ANY))
    assert got.item() == pytest.approx(by_hand, rel=1e-6)


def test_soft_cross_entropy_by_hand() -> None:
    teacher, student = torch.tensor([[0.0, math.log(3)]]), torch.tensor([[0.0, math.log(4)]])
    by_hand = -(0.25 * math.log(0.2) + 0.75 * math.log(0.8))
    got = LogitsLoss(temperature=1.0, kind="soft_cross_entropy")(signals(student), signals(teacher), batch_of(ANY[:1]))
    assert got.item() == pytest.approx(by_hand, rel=1e-6)


@pytest.mark.parametrize("kind", ["kl", "mse"])
def test_zero_where_student_equals_teacher(kind: str) -> None:
    logits = torch.randn(5, 3)
    assert abs(LogitsLoss(kind=kind)(signals(logits), signals(logits.clone()), batch_of(torch.ones(5, 2).bool())).item()) < 1e-6


def test_tokens_against_a_plain_loop_and_blind_to_padding() -> None:
    loss = LogitsLoss(temperature=3.0, task="masked_lm", stack="layers")
    student, teacher = torch.randn(2, 4, 6), torch.randn(2, 4, 6)
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]).bool()
    expected = 0.0
    for example in range(2):
        for token in range(4):
            if mask[example, token]:
                p = [math.exp(v / 3) for v in teacher[example, token].tolist()]
                q = [math.exp(v / 3) for v in student[example, token].tolist()]
                p, q = [v / sum(p) for v in p], [v / sum(q) for v in q]
                expected += 9 * sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    got = loss(signals(student), signals(teacher), batch_of(mask, "masked_lm"))
    assert got.item() == pytest.approx(expected, rel=1e-5)
    student[1, 2:], teacher[1, 2:] = 1e4, float("nan")
    assert loss(signals(student), signals(teacher), batch_of(mask, "masked_lm")).item() == pytest.approx(expected, rel=1e-5)


def test_token_classification_looks_at_labelled_tokens() -> None:
    student, teacher = torch.randn(1, 3, 2), torch.randn(1, 3, 2)
    labelled = torch.tensor([[False, True, False]])
    loss = LogitsLoss(task="token_classification", stack="layers")
    got = loss(signals(student), signals(teacher), batch_of(torch.ones(1, 3).bool(), "token_classification", label_mask=labelled))
    alone = LogitsLoss()(signals(student[:, 1]), signals(teacher[:, 1]), batch_of(torch.ones(1, 1).bool()))
    assert loss.unit == "labels"
    assert got.item() == pytest.approx(alone.item(), rel=1e-6)


def test_several_labels_are_bernoulli() -> None:
    student, teacher = torch.randn(2, 3), torch.randn(2, 3)
    expected = 0.0
    for s, t in zip(student.flatten().tolist(), teacher.flatten().tolist(), strict=True):
        p, q = 1 / (1 + math.exp(-t / 2)), 1 / (1 + math.exp(-s / 2))
        expected += 4 * (p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))) / 3
    batch = batch_of(ANY, labels=torch.zeros(2, 3))
    assert LogitsLoss(temperature=2.0)(signals(student), signals(teacher), batch).item() == pytest.approx(expected, rel=1e-5)


def test_regression_is_squared_error() -> None:
    got = LogitsLoss(temperature=5.0)(signals(torch.tensor([[1.0], [2.0]])), signals(torch.tensor([[3.0], [2.5]])), batch_of(ANY))
    assert got.item() == pytest.approx(4.25)


def test_question_answering_ignores_padding() -> None:
    loss = LogitsLoss(task="question_answering", stack="layers")
    mask = torch.tensor([[1, 1, 1, 0, 0]]).bool()

    def spans(start: torch.Tensor, end: torch.Tensor) -> Signals:
        return Signals(logits={"start_logits": start, "end_logits": end})

    student, teacher = torch.randn(2, 1, 5), torch.randn(2, 1, 5)
    full = loss(spans(*student), spans(*teacher), batch_of(mask, "question_answering"))
    short = loss(spans(*student[..., :3]), spans(*teacher[..., :3]), batch_of(mask[:, :3], "question_answering"))
    assert full.item() > 0.01
    assert full.item() == pytest.approx(short.item(), rel=1e-5)


@pytest.mark.parametrize("kind", ["kl", "soft_cross_entropy", "mse"])
def test_gradients_are_the_numerical_ones(kind: str) -> None:
    teacher = torch.randn(3, 4, dtype=torch.float64)
    loss = LogitsLoss(temperature=2.0, kind=kind)
    assert torch.autograd.gradcheck(
        lambda student: loss(signals(student), signals(teacher), batch_of(torch.ones(3, 1).bool())),
        (torch.randn(3, 4, dtype=torch.float64, requires_grad=True),),
    )


def test_temperature_squared_keeps_the_gradients_size() -> None:
    def gradient(temperature: float) -> float:
        torch.manual_seed(0)
        student = torch.randn(8, 3, requires_grad=True)
        teacher = torch.randn(8, 3)
        LogitsLoss(temperature=temperature)(signals(student), signals(teacher), batch_of(torch.ones(8, 1).bool())).backward()
        return student.grad.norm().item()

    assert gradient(50.0) == pytest.approx(gradient(100.0), rel=0.05)


@pytest.mark.parametrize("bad", [{"temperature": 0.0}, {"kind": "hard"}])
def test_bad_settings_are_refused(bad: dict[str, object]) -> None:
    with pytest.raises(LossError):
        LogitsLoss(**bad)
