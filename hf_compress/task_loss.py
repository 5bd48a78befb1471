"""The task's own loss, the one on labels, as a Trainer has it: the model's, a `compute_loss_func`, or label smoothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from hf_compress.errors import LossError
from hf_compress.layers.stack import unwrap
from hf_compress.task import kind_of


def labels_mean(trainer: Any, student: nn.Module, outputs: Mapping[str, Any], inputs: Mapping[str, Any], count: Tensor) -> Tensor:
    """The task's own loss, a mean over this micro-batch's `count` labels.

    Args:
        trainer: whose `compute_loss_func` or `label_smoother` takes the model's place, where it has one.
        student: the model.
        outputs: of the student.
        inputs: the batch.
        count: labels in this micro-batch, a scalar.

    Raises:
        LossError: the model returned no loss.
    """
    if trainer.compute_loss_func is not None:
        mean: Tensor = trainer.compute_loss_func(outputs, inputs.get("labels"), num_items_in_batch=count)
        return mean
    if trainer.label_smoother is not None and "labels" in inputs:
        smoothed: Tensor = trainer.label_smoother(outputs, inputs["labels"], shift_labels=kind_of(student) == "causal_lm")
        return smoothed
    if outputs.get("loss") is None:
        raise LossError(
            f"The model returned no loss of its own from the columns {', '.join(inputs)}, but the labels have a weight. "
            "Give the data labels, or leave them out: --distill_weights labels=0."
        )
    own: Tensor = outputs["loss"]
    return own


def with_decoder_inputs(student: nn.Module, inputs: dict[str, Any]) -> dict[str, Any]:
    """Encoder-decoder models make decoder inputs from labels; without labels somebody else must."""
    prepare = getattr(unwrap(student), "prepare_decoder_input_ids_from_labels", None)
    if prepare is None or "decoder_input_ids" in inputs or "labels" not in inputs:
        return inputs
    return {**inputs, "decoder_input_ids": prepare(labels=inputs["labels"])}


def refuse_foreign_loss(trainer_class: str) -> None:
    """Raise LossError: a script's own compute_loss or training_step has taken the place of the distillation's."""
    raise LossError(
        f"{trainer_class} computes a loss of its own and never calls DistillTrainer.compute_loss, so nothing would be "
        "distilled. Take its compute_loss or training_step out, or let it call super().compute_loss(...) and add to that."
    )
