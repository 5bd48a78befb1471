"""A loss whose weight changes in the course of the training."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hf_compress.arguments import CompressionArguments
from hf_compress.errors import ArgumentError, LossError
from hf_compress.losses.hidden_states import HiddenStatesLoss
from hf_compress.losses.labels import LabelsLoss
from hf_compress.losses.logits import LogitsLoss
from hf_compress.losses.loss import Loss
from hf_compress.losses.recipes import losses_of
from hf_compress.trainer import DistillTrainer
from tests.tiny_runs import arguments, largest_difference, rows, student, teacher, trained, weights

FALLING = (4.0, 3.25, 2.5, 1.75, 1.0)


def falling() -> list[Loss]:
    return [LogitsLoss(weight=4.0, final_weight=1.0), LabelsLoss(weight=0.5)]


def found(log: list[dict[str, float]]) -> list[float]:
    """The weight of the logits in each step, from the log."""
    return [(entry["loss"] - 0.5 * entry["loss_labels"]) / entry["loss_logits"] for entry in log if "loss_logits" in entry]


@pytest.mark.parametrize("micro", [1, 2])
def test_it_goes_in_a_straight_line_and_a_resumed_run_goes_on(tmp_path: Path, micro: int) -> None:
    settings = {"max_steps": 5, "gradient_accumulation_steps": micro, "per_device_train_batch_size": 16 // micro, "learning_rate": 0.01}
    unbroken = trained(tmp_path / "a", falling(), model=student(), **settings)
    assert found(unbroken.state.log_history) == pytest.approx(FALLING, rel=1e-4)
    trained(tmp_path / "b", falling(), model=student(), **settings, save_strategy="steps", save_steps=3)
    resumed = DistillTrainer(student(), arguments(tmp_path / "b", **settings), teacher=teacher(), losses=falling(), train_dataset=rows())
    resumed.train(resume_from_checkpoint=str(tmp_path / "b" / "checkpoint-3"))
    assert found(resumed.state.log_history) == pytest.approx(FALLING, rel=1e-4)
    assert largest_difference(weights(unbroken), weights(resumed)) < 1e-6
    constant = trained(tmp_path / "c", [LogitsLoss(weight=4.0), LabelsLoss(weight=0.5)], model=student(), **settings)
    assert largest_difference(weights(unbroken), weights(constant)) > 1e-4


def test_the_steps_are_those_of_a_plain_loop(tmp_path: Path) -> None:
    run = trained(tmp_path, falling(), model=student(), max_steps=5, learning_rate=0.05)
    model, guide = student(), teacher()
    batch = {name: torch.tensor(rows()[name]) for name in ("input_ids", "attention_mask")}
    for weight in FALLING:
        outputs = model(**batch, labels=torch.tensor(rows()["label"]))
        p, q = (guide(**batch).logits / 2).softmax(-1).detach(), (outputs.logits / 2).softmax(-1)
        loss = weight * 4 * (p * (p / q).log()).sum() / 16 + 0.5 * outputs.loss
        model.zero_grad()
        loss.backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 0.05 * parameter.grad if parameter.grad is not None else 0
    assert largest_difference(weights(run), dict(model.named_parameters())) < 1e-5


def test_a_phase_has_its_own_course(tmp_path: Path) -> None:
    flags = CompressionArguments(distill_phases="intermediate=3,prediction=5")
    losses = [HiddenStatesLoss(), *falling()]
    run = trained(tmp_path, losses, model=student(), compression=flags, max_steps=-1)
    assert found(run.state.log_history) == pytest.approx(FALLING, rel=1e-4)


def test_by_flag_and_in_recipes() -> None:
    flags = CompressionArguments(distill_recipe="logits", distill_weights="logits=4", distill_final_weights="logits=1,labels=2")
    chosen = {loss.name: loss for loss in losses_of("logits", weights=flags.weights, final_weights=flags.final_weights)}
    assert [chosen[name].weight_at(0.5) for name in ("logits", "labels")] == [2.5, 1.25]
    assert str(chosen["logits"]).startswith("4 to 1 x logits")
    of_paper = {loss.name: loss for loss in losses_of("fitnets")}["logits"]
    assert (of_paper.weight_at(0), of_paper.weight_at(1)) == (4, 1)
    said = {loss.name: loss for loss in losses_of("fitnets", weights={"logits": 2.0})}["logits"]
    assert said.weight_at(1) == 2, "a weight by flag is a constant"


def test_refused(tmp_path: Path) -> None:
    for loss, match in ((LogitsLoss(weight=0, final_weight=1.0), "Begin with 0.01"), (LogitsLoss(final_weight=-1.0), "0 or more")):
        with pytest.raises(LossError, match=match):
            trained(tmp_path, [loss, LabelsLoss()])
    with pytest.raises(ArgumentError, match="--distill_final_weights hint, but the losses are"):
        losses_of("logits", final_weights={"hint": 1.0})
    with pytest.raises(ArgumentError, match="--distill_final_weights: logits=-1"):
        CompressionArguments(distill_final_weights="logits=-1")
