"""Number formats and recomputed activations: bfloat16 stays close to float32, checkpointing changes nothing, for BERT, Llama and LoRA."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from hf_compress.losses.loss import Loss
from hf_compress.trainer import DistillTrainer
from tests.tiny_models import tiny_batch, tiny_model
from tests.tiny_runs import NARROW, arguments, every_loss, every_objective, largest_difference, rows, student, teacher, weights


def llama(num_layers: int, **config: Any) -> nn.Module:
    return tiny_model("llama", num_layers=num_layers, head="causal_lm", seed=num_layers, **config)


def lora(model: nn.Module) -> Any:
    torch.manual_seed(1)
    return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "down_proj"], r=2))


def texts() -> Any:
    batch = tiny_batch(llama(2), 8, labels=True)
    return [{name: column[row] for name, column in batch.items()} for row in range(8)]


# Student, teacher, data.
RUNS: dict[str, Any] = {
    "bert": (lambda: student(**NARROW), teacher, rows),
    "llama": (lambda: llama(2), lambda: llama(4), texts),
    "lora": (lambda: lora(llama(2)), lambda: llama(4), texts),
}


def trained(folder: Path, which: str, losses: list[Loss], **more: Any) -> DistillTrainer:
    make, guide, data = RUNS[which]
    torch.manual_seed(5)
    args = arguments(folder, **{"max_steps": 2, "per_device_train_batch_size": 8, "learning_rate": 0.05, **more})
    trainer = DistillTrainer(make(), args, teacher=guide(), losses=losses, train_dataset=data())
    trainer.train()
    return trainer


def losses_of(trainer: DistillTrainer) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history for name in sorted(entry) if name.startswith("loss")]


@pytest.mark.parametrize("which", RUNS)
def test_bfloat16_stays_close_to_float32(which: str, tmp_path: Path) -> None:
    plain = trained(tmp_path / "a", which, every_objective())
    half = trained(tmp_path / "b", which, every_objective(), bf16=True)
    assert losses_of(half) == pytest.approx(losses_of(plain), rel=0.02) and losses_of(half) != losses_of(plain)
    start = dict(RUNS[which][0]().named_parameters())
    both = {name: parameter for name, parameter in weights(plain).items() if name in start}
    moved = largest_difference(both, {name: parameter.detach() for name, parameter in start.items()})
    assert 0 < largest_difference(weights(half), weights(plain)) < 0.03 * moved
    assert {parameter.dtype for parameter in half.model.parameters()} == {torch.float32}


@pytest.mark.parametrize("which", ["llama", "lora"])  # BERT's stands in test_objectives
def test_recomputed_activations_give_the_same_run(which: str, tmp_path: Path) -> None:
    plain = trained(tmp_path / "a", which, every_loss())
    less = trained(tmp_path / "b", which, every_loss(), gradient_checkpointing=True)
    assert less.model.is_gradient_checkpointing
    assert largest_difference(weights(plain), weights(less)) < 1e-6
    assert losses_of(less) == pytest.approx(losses_of(plain), rel=1e-5)


@pytest.mark.parametrize("mixed", [False, True])
def test_adapters_and_projections_are_float32_on_a_base_in_bfloat16(mixed: bool, tmp_path: Path) -> None:
    """As PEFT has it: a step of 0.001 times a gradient would be lost in bfloat16."""

    def run(name: str, dtype: torch.dtype) -> DistillTrainer:
        torch.manual_seed(5)
        guide, pupil = llama(4).to(dtype), lora(llama(2, hidden_size=8).to(dtype))
        args = arguments(tmp_path / name, max_steps=2, per_device_train_batch_size=8, learning_rate=1e-3, bf16=mixed)
        trainer = DistillTrainer(pupil, args, teacher=guide, losses=every_loss(), train_dataset=texts())
        trainer.train()
        return trainer

    half, whole = run("half", torch.bfloat16), run("whole", torch.float32)
    assert {parameter.dtype for parameter in half.model.parameters() if parameter.requires_grad} == {torch.float32}
    assert losses_of(half) == pytest.approx(losses_of(whole), rel=0.02)
    projections = {name: tensor for name, tensor in weights(half).items() if "projections" in name}
    expected = {name: tensor for name, tensor in weights(whole).items() if "projections" in name}
    assert projections and largest_difference(projections, expected) < 1e-4


@pytest.mark.gpu
@pytest.mark.parametrize("format_", ["fp16", "bf16"])
@pytest.mark.parametrize("which", RUNS)
def test_half_precision_on_a_gpu(which: str, format_: str, tmp_path: Path) -> None:
    # Without trimming to multiples of eight, which is for speed, the batches are the same.
    settings: dict[str, Any] = {"use_cpu": False, "max_steps": 4}
    plain = trained(tmp_path / "a", which, every_objective(), **settings)
    half = trained(tmp_path / "b", which, every_objective(), **settings, **{format_: True})
    assert next(half.model.parameters()).is_cuda
    # fp16 may skip its first steps while it finds its loss scale; the losses of the first step are computed with the same weights.
    first = len(losses_of(plain)) // 4
    assert losses_of(half)[:first] == pytest.approx(losses_of(plain)[:first], rel=0.02)
    assert all(bool(parameter.isfinite().all()) for parameter in half.model.parameters())
