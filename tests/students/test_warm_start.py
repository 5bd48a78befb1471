"""Narrow students fitted to their teacher: nothing is lost where nothing need be, and less the wider they are."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_compress.errors import ArgumentError, CompressionError, DataError, TeacherError
from hf_compress.losses.loss import Projection
from hf_compress.projection_file import read_projections
from hf_compress.projections import ATTRIBUTE, Projections
from hf_compress.students.from_teacher import load_teacher, student_from_teacher
from hf_compress.students.save import save_student
from hf_compress.students.warm_record import describe_warm_start, recorded_warm_start
from hf_compress.students.warm_start import warm_start
from tests.tiny_models import tiny_batch, tiny_model

LENGTHS = (9, 7, 12, 5)


def examples(model: PreTrainedModel, *, batches: int = 8, first: int = 0) -> Iterator[dict[str, Tensor]]:
    for seed in range(first, first + batches):
        yield tiny_batch(model, batch_size=20, lengths=LENGTHS, seed=seed, labels=True)


@cache
def teacher_of(architecture: str, num_layers: int = 2) -> PreTrainedModel:
    """Its states lie near a subspace, as those of trained models do: what tables and layers write is mixed out of few directions."""
    teacher = tiny_model(architecture, num_layers=num_layers)
    generator = torch.Generator().manual_seed(0)
    width = next(module for module in teacher.modules() if isinstance(module, nn.LayerNorm)).weight.shape[0]
    turn, _ = torch.linalg.qr(torch.randn(width, width, generator=generator))
    mix = turn * torch.logspace(0, -2, width) @ turn.T
    with torch.no_grad():
        for name, module in teacher.base_model.named_modules():
            if isinstance(module, nn.Embedding):
                module.weight.copy_(torch.randn(module.weight.shape, generator=generator) @ mix)
            elif name.endswith(("output.dense", "out_lin", "lin2")) and isinstance(module, nn.Linear):
                module.weight.copy_(mix @ module.weight * 3)
            elif isinstance(module, nn.LayerNorm):
                module.weight.copy_(1 + 0.05 * torch.randn(width, generator=generator))
                module.bias.copy_(0.05 * torch.randn(width, generator=generator))
    return teacher.eval()


def errors_of(student: PreTrainedModel) -> tuple[float, ...]:
    record = recorded_warm_start(student.config)
    assert record is not None
    return record.errors


def missed(student: PreTrainedModel, teacher: PreTrainedModel) -> list[float]:
    """Of states of examples that the student was not fitted on, after the best projection that it may have: the part that is missed."""
    seen: list[list[Tensor]] = [[], []]
    with torch.no_grad():
        for batch in examples(teacher, batches=8, first=100):
            mask = batch["attention_mask"].bool()
            inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
            for side, model in enumerate((student, teacher)):
                states = model.base_model(**inputs, output_hidden_states=True).hidden_states
                seen[side].append(torch.stack([states[0][mask], states[-1][mask]]))
    ours, theirs = (torch.cat(states, 1) for states in seen)
    with_bias = torch.cat([ours, torch.ones_like(ours[..., :1])], -1)
    best = torch.linalg.lstsq(with_bias, theirs).solution
    difference = (with_bias @ best - theirs).square().sum((1, 2))
    return (difference / (theirs - theirs.mean(1, keepdim=True)).square().sum((1, 2))).tolist()


def test_at_full_width_and_depth_the_student_is_the_teacher() -> None:
    """Where all gains are 1, a rotated LayerNorm is a LayerNorm, and nothing is cut off."""
    teacher = copy.deepcopy(teacher_of("bert"))
    for module in teacher.modules():
        if isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
    student = type(teacher)(copy.deepcopy(teacher.config)).eval()
    record = warm_start(student, teacher, examples(teacher, batches=16))
    assert max(record.errors) < 1e-4
    batch = tiny_batch(teacher, batch_size=8, lengths=LENGTHS, seed=77)
    with torch.no_grad():
        torch.testing.assert_close(student(**batch).logits, teacher(**batch).logits, atol=1e-2, rtol=0)
        ours = student.base_model(**batch).last_hidden_state[batch["attention_mask"].bool()]
        theirs = teacher.base_model(**batch).last_hidden_state[batch["attention_mask"].bool()]
        projected = getattr(student, ATTRIBUTE).project("layers_shared", ours)
    assert not torch.allclose(ours, theirs, atol=0.1)  # it is the teacher in another basis
    assert float((projected - theirs).square().mean() / theirs.var()) < 1e-4


def test_the_error_falls_with_the_width() -> None:
    teacher = teacher_of("bert")
    errors = [
        errors_of(student_from_teacher(teacher, hidden_size=width, init="pca", examples=examples(teacher), seed=0)) for width in (4, 8, 12)
    ]
    for narrower, wider in pairwise(errors):
        assert all(wide < narrow for narrow, wide in zip(narrower, wider, strict=True))
    assert max(errors[-1]) < 0.3


@pytest.mark.parametrize("architecture", ["bert", "roberta", "distilbert"])
def test_it_beats_random_weights_with_the_best_projection(architecture: str) -> None:
    teacher = teacher_of(architecture, 4)
    warm = student_from_teacher(teacher, num_hidden_layers=2, hidden_size=8, init="pca", examples=examples(teacher), seed=0).eval()
    cold = student_from_teacher(teacher, num_hidden_layers=2, hidden_size=8, seed=0).eval()
    assert all(better < 0.6 * worse for better, worse in zip(missed(warm, teacher), missed(cold, teacher), strict=True))
    record = recorded_warm_start(warm.config)
    assert record is not None
    assert (record.layer_map, record.head, len(record.errors)) == ("1:2,2:4", True, 3)
    assert "1:2,2:4" in describe_warm_start(record)
    assert recorded_warm_start(cold.config) is None


def test_the_teacher_stays_and_the_student_can_be_trained() -> None:
    teacher = copy.deepcopy(teacher_of("bert")).requires_grad_(False).train()
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    student = student_from_teacher(teacher, hidden_size=8, init="pca", examples=examples(teacher))
    assert teacher.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.state_dict().items())
    student.train()(**tiny_batch(teacher, labels=True)).loss.backward()
    gradients = {name: parameter.grad for name, parameter in student.named_parameters() if not name.startswith(ATTRIBUTE)}
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients.values())


def test_the_same_examples_and_seed_make_the_same_student() -> None:
    teacher = teacher_of("bert")
    first, second = (student_from_teacher(teacher, hidden_size=8, init="pca", examples=examples(teacher), seed=3) for _ in range(2))
    assert all(torch.equal(tensor, second.state_dict()[name]) for name, tensor in first.state_dict().items())


def test_padding_changes_nothing() -> None:
    teacher = teacher_of("bert")

    def padded() -> Iterator[dict[str, Tensor]]:
        for batch in examples(teacher):
            yield {name: tensor if name == "labels" else nn.functional.pad(tensor, (0, 4)) for name, tensor in batch.items()}

    plain = student_from_teacher(teacher, hidden_size=8, init="pca", examples=examples(teacher), seed=0)
    wider = student_from_teacher(teacher, hidden_size=8, init="pca", examples=padded(), seed=0)
    assert errors_of(plain) == pytest.approx(errors_of(wider), abs=2e-3)


def test_a_saved_student_has_its_projection_beside_it(tmp_path: Path) -> None:
    teacher = teacher_of("bert")
    student = student_from_teacher(teacher, hidden_size=8, init="pca", examples=examples(teacher)).eval()
    save_student(student, tmp_path, None)
    stored = read_projections(tmp_path)
    assert {name: tuple(tensor.shape) for name, tensor in stored.items()} == {"layers_shared.weight": (16, 8), "layers_shared.bias": (16,)}
    reloaded = load_teacher(str(tmp_path)).eval()
    batch = tiny_batch(teacher)
    with torch.no_grad():
        assert torch.equal(reloaded(**batch).logits, student(**batch).logits)
    kept: Projections = getattr(student, ATTRIBUTE)
    attached = Projections.attach(reloaded, {"layers_shared": next(_sizes(kept))})
    assert all(torch.equal(tensor, kept.state_dict()[name]) for name, tensor in attached.state_dict().items())
    assert errors_of(reloaded) == errors_of(student)
    # Another student in the same folder does not inherit it.
    save_student(student_from_teacher(teacher, hidden_size=8, seed=0), tmp_path, None)
    assert read_projections(tmp_path) == {}


def _sizes(projections: Projections) -> Iterator[Projection]:
    for layer in projections.values():
        assert isinstance(layer, nn.Linear)
        yield Projection(layer.in_features, layer.out_features)


@pytest.mark.parametrize("head", ["token_classification", "question_answering", "masked_lm"])
def test_other_heads(head: str) -> None:
    teacher = tiny_model("bert", num_layers=2, head=head)
    student = student_from_teacher(teacher, hidden_size=8, init="pca", examples=examples(teacher_of("bert")), seed=0)
    record = recorded_warm_start(student.config)
    assert record is not None
    assert record.head == (head != "masked_lm")
    assert ("at random" in describe_warm_start(record)) == (head == "masked_lm")


@pytest.mark.parametrize(
    ("given", "kind", "words"),
    [
        ({"hidden_size": 16}, ArgumentError, "narrower students"),
        ({"hidden_size": 18}, ArgumentError, "narrower students"),
        ({"hidden_size": 9}, ArgumentError, "cannot be divided"),
        ({"hidden_size": 8, "num_attention_heads": 4}, ArgumentError, "each head starts as one"),
        ({"num_hidden_layers": 1}, ArgumentError, "another width"),
        ({"layers_to_keep": (1,)}, ArgumentError, "another width"),
        ({"hidden_size": 8, "examples": None}, ArgumentError, "give examples"),
        ({"hidden_size": 8, "init": "random"}, ArgumentError, "init='pca' alone"),
        ({"hidden_size": 8, "init": "svd"}, ArgumentError, "expected 'random' or 'pca'"),
        ({"hidden_size": 8, "examples": [{"input_ids": [3, 4]}]}, DataError, "batches"),
        ({"hidden_size": 8, "examples": [{"input_ids": torch.full((6, 3), 4)}]}, DataError, "18 tokens in 6 examples"),
    ],
)
def test_what_cannot_start_warm_is_refused(given: dict[str, Any], kind: type[CompressionError], words: str) -> None:
    teacher = teacher_of("bert")
    with pytest.raises(kind, match=words):
        student_from_teacher(teacher, **{"init": "pca", "examples": examples(teacher), **given})


def test_a_teacher_in_half_precision_makes_a_student_in_full() -> None:
    teacher = copy.deepcopy(teacher_of("bert")).to(torch.bfloat16)
    student = student_from_teacher(teacher, hidden_size=8, init="pca", examples=examples(teacher), seed=0)
    assert {parameter.dtype for parameter in student.parameters()} == {torch.float32}
    full = student_from_teacher(teacher_of("bert"), hidden_size=8, init="pca", examples=examples(teacher), seed=0)
    assert errors_of(student) == pytest.approx(errors_of(full), abs=0.05)


def test_a_teacher_that_gives_nan_is_refused() -> None:
    teacher = copy.deepcopy(teacher_of("bert"))
    torch.nn.init.constant_(teacher.bert.encoder.layer[1].output.dense.bias, float("nan"))
    with pytest.raises(TeacherError, match="not finite after layer 2"):
        student_from_teacher(teacher, hidden_size=8, init="pca", examples=examples(teacher))


def test_other_architectures_are_refused() -> None:
    teacher = tiny_model("albert")
    with pytest.raises(TeacherError, match="albert"):
        student_from_teacher(teacher, hidden_size=8, init="pca", examples=examples(teacher))
