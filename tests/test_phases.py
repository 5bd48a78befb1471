"""The result of a run in phases: of all of them, not of the last."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers.trainer_utils import TrainOutput

from hf_compress.arguments import CompressionArguments
from hf_compress.losses.hidden_states import HiddenStatesLoss
from hf_compress.losses.logits import LogitsLoss
from hf_compress.phases import of_all_phases
from hf_compress.trainer import DistillTrainer
from tests.tiny_runs import arguments, rows, student, teacher


def test_sums_and_rates_by_hand() -> None:
    def output(steps: int, loss: float, seconds: float, rate: float, epochs: float) -> TrainOutput:
        metrics = {"train_runtime": seconds, "train_samples_per_second": rate, "train_steps_per_second": steps / seconds}
        return TrainOutput(steps, loss, {**metrics, "train_loss": loss, "epoch": epochs, "total_flos": 5.0})

    whole = of_all_phases([output(30, 2.0, 10.0, 100.0, 2.0), output(10, 1.0, 40.0, 50.0, 1.0)])
    assert (whole.global_step, whole.training_loss) == (40, 1.75)
    assert whole.metrics == {
        "train_runtime": 50.0,
        "train_samples_per_second": 60.0,
        "train_steps_per_second": 0.8,
        "train_loss": 1.75,
        "epoch": 3.0,
        "total_flos": 10.0,
    }


def test_a_run_reports_all_its_phases(tmp_path: Path) -> None:
    flags = CompressionArguments(distill_phases="intermediate=2,prediction=1")
    args = arguments(tmp_path, max_steps=-1, per_device_train_batch_size=8)
    losses = [HiddenStatesLoss(), LogitsLoss()]
    trainer = DistillTrainer(student(), args, teacher=teacher(), losses=losses, compression=flags, train_dataset=rows())
    result = trainer.train()
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert result.global_step == len(logged) == 6
    assert result.metrics["epoch"] == 3.0
    assert result.metrics["train_loss"] == result.training_loss == pytest.approx(sum(logged) / 6, rel=1e-3)
    samples = result.metrics["train_samples_per_second"] * result.metrics["train_runtime"]
    assert samples == pytest.approx(48, rel=0.05)
