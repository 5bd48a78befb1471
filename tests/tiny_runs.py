"""Runs of DistillTrainer on tiny models, one step long unless said otherwise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from transformers import TrainingArguments

from hf_compress.losses.attention_scores import AttentionScoresLoss, AttentionsLoss
from hf_compress.losses.combined_layers import CombinedLayersLoss
from hf_compress.losses.hidden_states import EmbeddingsLoss, HiddenStatesLoss, HintLoss
from hf_compress.losses.labels import LabelsLoss
from hf_compress.losses.logits import LogitsLoss
from hf_compress.losses.loss import Loss
from hf_compress.losses.mixed_layers import MixedLayersLoss
from hf_compress.losses.relations import KeyRelationsLoss, QueryRelationsLoss, ValueRelationsLoss
from hf_compress.losses.transported_layers import AttentionScoresTransportLoss, HiddenStatesTransportLoss
from hf_compress.task_loss import with_decoder_inputs
from hf_compress.trainer import DistillTrainer
from tests.tiny_models import tiny_model

# Lengths that differ four times, so that a mean of means shows.
LENGTHS = (20, 5, 12, 6, 18, 5, 7, 20, 5, 5, 16, 9, 20, 6, 5, 11)


def rows(padded_to: int | None = None, count: int = 16) -> Dataset:
    generator = torch.Generator().manual_seed(3)
    examples = []
    for index in range(count):
        ids = torch.randint(3, 50, (LENGTHS[index % 16],), generator=generator).tolist()
        padding = (padded_to or 24) - len(ids)
        examples.append({"input_ids": ids + [0] * padding, "attention_mask": [1] * len(ids) + [0] * padding, "label": index % 2})
    return Dataset.from_list(examples)


def every_loss() -> list[Loss]:
    return [LogitsLoss(), HiddenStatesLoss(), EmbeddingsLoss(), AttentionScoresLoss(), LabelsLoss(weight=0.5)]


def every_objective() -> list[Loss]:
    """The losses that few recipes have, those with learnt maps of their own among them."""
    relations: list[Loss] = [QueryRelationsLoss(pairs="all"), KeyRelationsLoss(relation_heads=4), ValueRelationsLoss(relation_heads="own")]
    layers: list[Loss] = [HintLoss(), CombinedLayersLoss("overlap"), MixedLayersLoss(), HiddenStatesTransportLoss()]
    return [LogitsLoss(), AttentionsLoss(pairs="last"), *relations, *layers, AttentionScoresTransportLoss()]


def teacher() -> nn.Module:
    return tiny_model("bert", num_layers=4, seed=1)


def student(**config: Any) -> nn.Module:
    return tiny_model("bert", num_layers=2, seed=2, **config)


NARROW = {"hidden_size": 8, "intermediate_size": 12}


def arguments(folder: Path, **more: Any) -> TrainingArguments:
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 16,
        "max_steps": 1,
        "learning_rate": 0.1,
        "optim": "sgd",
        "lr_scheduler_type": "constant",
        "max_grad_norm": 1e9,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 7,
    }
    return TrainingArguments(**{**settings, **more})


def trained(
    folder: Path, losses: list[Loss], *, model: nn.Module | None = None, data: Dataset | None = None, **more: Any
) -> DistillTrainer:
    torch.manual_seed(5)  # projections are random
    flags = more.pop("compression", None)
    trainer = DistillTrainer(
        model or student(**NARROW),
        arguments(folder, **more),
        teacher=teacher(),
        losses=losses,
        compression=flags,
        train_dataset=rows() if data is None else data,
    )
    trainer.train()
    return trainer


def strongest_gradients(trainer: DistillTrainer, inputs: dict[str, torch.Tensor]) -> dict[str, float]:
    """The largest gradient that each loss by itself gives to any weight of the student, by the loss's name in the log."""
    distillation = trainer.distillation
    assert distillation is not None
    distillation.start()
    inputs = with_decoder_inputs(distillation.student, inputs)
    told = distillation.teacher_signals(inputs)
    outputs = distillation.student.train()(**inputs)
    counts = distillation.counts([inputs], torch.device("cpu"))
    parts = distillation.parts(outputs, told, inputs, counts, lambda out, count: out["loss"])
    parameters = [parameter for parameter in distillation.student.parameters() if parameter.requires_grad]
    found = {}
    for name, (value, _) in parts.items():
        gradients = torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True)
        found[name] = max(gradient.abs().max().item() for gradient in gradients if gradient is not None)
    distillation.stop()
    return found


def weights(trainer: DistillTrainer) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}


def largest_difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    assert one.keys() == other.keys()
    return max((one[name] - other[name]).abs().max().item() for name in one)
