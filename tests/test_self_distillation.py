"""Self-distillation: a student of its teacher's own shape, which begins at the teacher's weights or at others (born-again networks)."""

from __future__ import annotations

import copy
import logging
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from hf_compress.losses.labels import LabelsLoss
from hf_compress.losses.logits import LogitsLoss
from hf_compress.losses.loss import Loss
from hf_compress.trainer import DistillTrainer
from tests.tiny_models import tiny_model
from tests.tiny_runs import arguments, largest_difference, rows, teacher, weights

RATE = 0.1


def losses() -> list[Loss]:
    return [LogitsLoss(temperature=2.0), LabelsLoss()]


def test_a_copy_of_the_teacher_learns_from_labels_and_is_held_by_the_teacher(tmp_path: Path) -> None:
    guide = teacher()
    model = copy.deepcopy(guide)
    trainer = DistillTrainer(
        model, arguments(tmp_path, max_steps=4, learning_rate=RATE), teacher=guide, losses=losses(), train_dataset=rows()
    )
    trainer.train()
    parts = [entry["loss_logits"] for entry in trainer.state.log_history if "loss_logits" in entry]
    assert parts[0] == pytest.approx(0, abs=1e-6) and parts[-1] > 1e-4
    plain, theirs = copy.deepcopy(teacher()), teacher()
    batch = {name: torch.tensor(rows()[name]) for name in ("input_ids", "attention_mask")}
    labels = torch.tensor(rows()["label"])
    for _ in range(4):
        logits = plain(**batch).logits
        p, q = (theirs(**batch).logits / 2).softmax(-1).detach(), (logits / 2).softmax(-1)
        loss = 4 * (p * (p / q).log()).sum() / 16 + F.cross_entropy(logits, labels)
        plain.zero_grad()
        loss.backward()
        with torch.no_grad():
            for parameter in plain.parameters():
                parameter -= RATE * parameter.grad if parameter.grad is not None else 0
    assert largest_difference(weights(trainer), dict(plain.named_parameters())) < 1e-5
    assert largest_difference(weights(trainer), dict(guide.named_parameters())) > 1e-3
    assert largest_difference(dict(guide.named_parameters()), dict(teacher().named_parameters())) == 0.0


def test_generations_each_taught_by_the_one_before(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """From other weights each time, as the paper has it; the teacher is named by its folder."""
    teacher().save_pretrained(tmp_path / "generation-0")
    for number in (1, 2):
        model = tiny_model("bert", num_layers=4, seed=10 + number)
        before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        trainer = DistillTrainer(
            model,
            arguments(tmp_path / f"generation-{number}", max_steps=3),
            teacher=str(tmp_path / f"generation-{number - 1}"),
            losses=losses(),
            train_dataset=rows(),
        )
        with caplog.at_level(logging.WARNING):
            trainer.train()
        trainer.save_model()
        assert "begins as its own teacher" not in caplog.text
        assert largest_difference(weights(trainer), before) > 1e-3
