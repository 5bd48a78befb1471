"""The same training on one process or several: what its first gradient and its last weights are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from hf_compress.arguments import CompressionArguments
from hf_compress.trainer import DistillTrainer
from tests.cached_runs import tokenizer
from tests.tiny_runs import NARROW, arguments, every_loss, largest_difference, student, weights

STEPS = 20


def uneven(count: int = 48) -> Dataset:
    """Examples of 3 to 6 tokens, and one in seven of 36."""
    generator = torch.Generator().manual_seed(4)
    examples = []
    for number in range(count):
        length = 36 if number % 7 == 0 else 3 + number % 4
        ids = torch.randint(4, 50, (length,), generator=generator).tolist()
        columns = {"token_type_ids": [int(place > length // 2) for place in range(length)], "attention_mask": [1] * length}
        examples.append({"input_ids": [1, *ids[1:-1], 2], **columns, "label": number % 2})
    return Dataset.from_list(examples)


class FirstGradient(TrainerCallback):
    """Keeps the gradient of the first step, as the optimizer gets it."""

    def __init__(self) -> None:
        self.found: dict[str, Tensor] = {}

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step == 0:
            self.found = {name: p.grad.detach().clone() for name, p in model.named_parameters() if p.grad is not None}


def gradient_and_weights(
    folder: Path,
    guide: nn.Module | str | None,
    *,
    model: nn.Module | None = None,
    flags: dict[str, Any] | None = None,
    trainer_class: type[DistillTrainer] = DistillTrainer,
    resume: Path | None = None,
    batch_size: int,
    accumulation: int = 1,
    cache: Path | None = None,
    data: Dataset | None = None,
    seed: int = 7,
    **more: Any,
) -> dict[str, Tensor]:
    """Train for 20 steps of SGD, through projections, on every kind of loss.

    Args:
        folder: for the run.
        guide: the teacher; None where `cache` is finished.
        model: the student.
        flags: of the compression.
        trainer_class: what trains.
        resume: a checkpoint.
        batch_size: of one process.
        accumulation: micro-batches a step.
        cache: where the teacher on disk is, or goes.
        data: other than `uneven()`.
        seed: of the data's order.
        more: training arguments.
    """
    first = FirstGradient()
    torch.manual_seed(5)  # projections are random
    chosen = {**(flags or {}), **({} if cache is None else {"teacher_cache_dir": str(cache), "teacher_cache_dtype": "float32"})}
    settings = {"max_steps": STEPS, "learning_rate": 0.02, "data_seed": seed, **more}
    trainer = trainer_class(
        model or student(**NARROW),
        arguments(folder, per_device_train_batch_size=batch_size, gradient_accumulation_steps=accumulation, **settings),
        teacher=guide,
        losses=every_loss(),
        compression=CompressionArguments(**chosen),
        train_dataset=uneven() if data is None else data,
        processing_class=tokenizer(),
        callbacks=[first],
    )
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    trainer.save_model(str(folder / "saved"))
    found = {**{f"gradient.{name}": value for name, value in first.found.items()}, **weights(trainer)}
    return {name: value.full_tensor() if isinstance(value, DTensor) else value for name, value in found.items()}


def agree(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    """Gradient and weights to 1e-5; and the weights moved by much more than that."""
    assert largest_difference(one, other) < 1e-5
    start = {name: parameter for name, parameter in student(**NARROW).named_parameters()}
    assert max((one[name] - start[name]).abs().max().item() for name in start) > 1e-2
    assert max(value.abs().max().item() for name, value in one.items() if name.startswith("gradient.")) > 1e-2
    assert sum("projection" in name for name in one if name.startswith("gradient.")) > 1
