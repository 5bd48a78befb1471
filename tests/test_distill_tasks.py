"""DistillTrainer on every kind of head, and on every architecture that a loss on layers can see."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import nn
from transformers import TrainingArguments

from hf_compress.losses.attention_scores import AttentionScoresLoss
from hf_compress.losses.hidden_states import EmbeddingsLoss, HiddenStatesLoss
from hf_compress.losses.labels import LabelsLoss
from hf_compress.losses.logits import LogitsLoss
from hf_compress.losses.loss import Loss
from hf_compress.losses.recipes import RECIPES, losses_of
from hf_compress.trainer import DistillTrainer
from tests.tiny_models import ARCHITECTURES, tiny_batch, tiny_model

WITHOUT_SCORES = {"xlnet", "deberta-v2", "deberta-v2-conv", "mpnet"}


def data_for(model: nn.Module, *, regression: bool = False, several_labels: bool = False) -> Dataset:
    batch = tiny_batch(model, batch_size=8, lengths=(7, 3, 5), labels=True)
    columns = {name: tensor.tolist() for name, tensor in batch.items()}
    if regression:
        columns["labels"] = [float(index) for index in range(8)]
    if several_labels:
        columns["labels"] = [[float(index % 2), 1.0, 0.0] for index in range(8)]
    return Dataset.from_dict(columns)


def distilled(
    folder: Path, student: nn.Module, teacher: nn.Module, losses: list[Loss], data: Dataset, batch_size: int = 8
) -> DistillTrainer:
    torch.manual_seed(5)
    args = TrainingArguments(
        str(folder), per_device_train_batch_size=batch_size, gradient_accumulation_steps=8 // batch_size, max_steps=1, learning_rate=0.1,
        optim="sgd", lr_scheduler_type="constant", max_grad_norm=1e9, logging_steps=1, save_strategy="no", report_to=[], use_cpu=True,
        disable_tqdm=True,
    )  # fmt: skip
    trainer = DistillTrainer(student, args, teacher=teacher, losses=losses, train_dataset=data)
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["loss"] > 0.01 and log["grad_norm"] > 0.01
    return trainer


CASES: dict[str, tuple[str, str, dict[str, Any], dict[str, Any]]] = {
    "single_label": ("bert", "sequence_classification", {"num_labels": 3}, {}),
    "several_labels": (
        "bert",
        "sequence_classification",
        {"num_labels": 3, "problem_type": "multi_label_classification"},
        {"several_labels": True},
    ),
    "regression": ("bert", "sequence_classification", {"num_labels": 1}, {"regression": True}),
    "tokens": ("bert", "token_classification", {"num_labels": 3}, {}),
    "questions": ("bert", "question_answering", {}, {}),
    "masked_lm": ("bert", "masked_lm", {}, {}),
    "causal_lm": ("llama", "causal_lm", {}, {}),
    "gpt2": ("gpt2", "causal_lm", {}, {}),
    "seq2seq_t5": ("t5", "seq2seq_lm", {}, {}),
    "seq2seq_bart": ("bart", "seq2seq_lm", {}, {}),
}


@pytest.mark.parametrize("case", CASES)
def test_every_head_accumulates_to_the_same_step(case: str, tmp_path: Path) -> None:
    architecture, head, config, kind_of_labels = CASES[case]
    students = [tiny_model(architecture, num_layers=2, head=head, seed=2, **config) for _ in range(2)]
    teacher = tiny_model(architecture, num_layers=4, head=head, seed=1, **config)
    data = data_for(students[0], **kind_of_labels)
    losses: list[Loss] = [LogitsLoss(), HiddenStatesLoss(), EmbeddingsLoss(), AttentionScoresLoss()]
    if head != "question_answering":  # transformers' own loss for it takes its softmax over padding too
        losses.append(LabelsLoss())
    whole, parts = (
        distilled(tmp_path / str(size), student, teacher, losses, data, batch_size=size)
        for student, size in zip(students, (8, 2), strict=True)
    )
    for (name, one), other in zip(whole.model.named_parameters(), parts.model.parameters(), strict=True):
        assert torch.allclose(one, other, atol=2e-6), name
    assert whole.state.log_history[0]["loss"] == pytest.approx(parts.state.log_history[0]["loss"], rel=1e-4)


@pytest.mark.parametrize("architecture", [name for name in ARCHITECTURES if name != "vit"])
def test_every_architecture_learns_from_a_deeper_one(architecture: str, tmp_path: Path) -> None:
    student = tiny_model(architecture, num_layers=2, seed=2)
    losses: list[Loss] = [LogitsLoss(), HiddenStatesLoss(), EmbeddingsLoss(), HiddenStatesLoss(kind="summary")]
    if architecture not in WITHOUT_SCORES:
        losses.append(AttentionScoresLoss())
    trainer = distilled(tmp_path, student, tiny_model(architecture, num_layers=4, seed=1), losses, data_for(student))
    assert trainer.evaluate(data_for(student))["eval_loss"] > 0
    trainer.save_model(str(tmp_path / "saved"))
    again = type(student).from_pretrained(tmp_path / "saved")
    assert not [name for name in again.state_dict() if "projection" in name and "hf_compress" in name]


def test_a_vision_model_learns_from_logits(tmp_path: Path) -> None:
    student = tiny_model("vit", num_layers=2, seed=2)
    distilled(tmp_path, student, tiny_model("vit", num_layers=4, seed=1), [LogitsLoss(), LabelsLoss()], data_for(student))


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_trains(recipe: str, tmp_path: Path) -> None:
    student = tiny_model("bert", num_layers=2, seed=2, hidden_size=8, intermediate_size=12)
    trainer = distilled(tmp_path, student, tiny_model("bert", num_layers=4, seed=1), losses_of(recipe), data_for(student))
    assert trainer.distillation is not None
    assert {f"loss_{loss.name}" for loss in losses_of(recipe)} <= trainer.state.log_history[0].keys()
