"""The losses that few recipes have, in whole runs: batching, padding, checkpointing of activations, resuming, other architectures."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hf_compress.arguments import CompressionArguments
from hf_compress.errors import LossError
from hf_compress.layers.layer_map import LayerMap
from hf_compress.losses.combined_layers import CombinedLayersLoss
from hf_compress.losses.loss import Loss
from hf_compress.losses.relations import QueryRelationsLoss, ValueRelationsLoss
from hf_compress.trainer import DistillTrainer
from tests.tiny_models import tiny_batch, tiny_model
from tests.tiny_runs import (
    NARROW,
    arguments,
    every_loss,
    every_objective,
    largest_difference,
    rows,
    strongest_gradients,
    student,
    teacher,
    trained,
    weights,
)


def names(losses: list[Loss]) -> set[str]:
    return {f"loss_{loss.name}" for loss in losses}


def test_accumulated_micro_batches_give_the_gradient_of_one_batch(tmp_path: Path) -> None:
    whole = trained(tmp_path / "a", every_objective())
    parts = trained(tmp_path / "b", every_objective(), per_device_train_batch_size=4, gradient_accumulation_steps=4)
    log = whole.state.log_history[0]
    assert names(every_objective()) <= log.keys() and log["grad_norm"] > 0.01
    assert largest_difference(weights(whole), weights(parts)) < 2e-6
    for name in names(every_objective()):
        assert parts.state.log_history[0][name] == pytest.approx(log[name], rel=1e-4), name


def test_no_loss_is_dead(tmp_path: Path) -> None:
    """A sum of many moves the student even where one of them does nothing."""
    losses = [*every_objective(), *(loss for loss in every_loss() if loss.name != "logits")]
    trainer = DistillTrainer(student(**NARROW), arguments(tmp_path), teacher=teacher(), losses=losses, train_dataset=rows())
    inputs = trainer.data_collator(list(rows()))
    alone = strongest_gradients(trainer, inputs)
    assert alone.keys() == {loss.name for loss in losses}
    assert min(alone.values()) > 1e-5, alone


def test_padding_changes_nothing(tmp_path: Path) -> None:
    tight = trained(tmp_path / "a", every_objective())
    untrimmed = CompressionArguments(trim_padding=False)
    loose = trained(tmp_path / "b", every_objective(), data=rows(padded_to=40), compression=untrimmed)
    assert largest_difference(weights(tight), weights(loose)) < 2e-6


def test_checkpointed_activations_give_the_same_step(tmp_path: Path) -> None:
    plain = trained(tmp_path / "a", every_objective())
    less = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
    checkpointed = trained(tmp_path / "b", every_objective(), **less)
    assert largest_difference(weights(plain), weights(checkpointed)) < 2e-6


def test_a_resumed_run_ends_where_an_unbroken_one_does(tmp_path: Path) -> None:
    """With the maps that it has learnt."""
    settings = {"max_steps": 4, "per_device_train_batch_size": 4, "learning_rate": 0.01}
    unbroken = trained(tmp_path / "a", every_objective(), **settings)
    trained(tmp_path / "b", every_objective(), **settings, save_strategy="steps", save_steps=2)
    torch.manual_seed(99)
    resumed = DistillTrainer(
        student(**NARROW), arguments(tmp_path / "b", **settings), teacher=teacher(), losses=every_objective(), train_dataset=rows()
    )
    resumed.train(resume_from_checkpoint=str(tmp_path / "b" / "checkpoint-2"))
    assert largest_difference(weights(unbroken), weights(resumed)) < 1e-6


@pytest.mark.parametrize("architecture", ["albert", "modernbert", "gpt2", "qwen3", "bart", "t5"])
def test_other_architectures_learn(architecture: str, tmp_path: Path) -> None:
    pupil, guide = (tiny_model(architecture, num_layers=layers, seed=layers) for layers in (2, 4))
    batch = tiny_batch(pupil, 8, labels=True)
    data = [{name: column[row] for name, column in batch.items()} for row in range(8)]
    settings = arguments(tmp_path, per_device_train_batch_size=8, learning_rate=1e-3)
    trainer = DistillTrainer(pupil, settings, teacher=guide, losses=every_objective(), train_dataset=data)
    alone = strongest_gradients(trainer, batch)
    dead = {name for name, gradient in alone.items() if not gradient > 1e-5}
    assert not dead and len(alone) >= len(every_objective())
    before = weights(trainer)
    trainer.train()
    assert largest_difference(weights(trainer), before) > 1e-5
    for name, parameter in trainer.model.named_parameters():
        assert bool(parameter.isfinite().all()), name


def test_attention_that_cannot_be_seen_is_refused_before_a_step(tmp_path: Path) -> None:
    pupil, guide = (tiny_model("xlnet", num_layers=layers, seed=layers) for layers in (2, 4))
    for loss in (QueryRelationsLoss(), ValueRelationsLoss()):
        with pytest.raises(LossError, match=f"{loss.name}=0"):
            DistillTrainer(pupil, arguments(tmp_path), teacher=guide, losses=[loss], train_dataset=rows())


def test_losses_of_one_name_are_all_in_the_total(tmp_path: Path) -> None:
    losses = [ValueRelationsLoss(LayerMap(((2, layer),))) for layer in (1, 2, 3, 4)]
    trainer = trained(tmp_path, [*losses], max_steps=1, logging_steps=1)
    log = trainer.state.log_history[0]
    names = [name for name in log if name.startswith("loss_value_relations")]
    assert len(names) == 4
    assert log["loss"] == pytest.approx(sum(log[name] for name in names), rel=1e-4)


def test_one_name_for_projections_of_two_sizes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LossError, match="Two losses ask for the projection"):
        trained(tmp_path, [CombinedLayersLoss("regular"), CombinedLayersLoss("overlap")], max_steps=1)
