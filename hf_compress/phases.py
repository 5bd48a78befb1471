"""Training in phases: first the layers, with the classifier frozen, then the predictions (TinyBERT 1909.10351, section 3.2).

    output_dir/phase-1-intermediate/checkpoint-N      the first phase's checkpoints; one folder a stage where it has several
    output_dir/checkpoint-N                           the last phase's, where scripts look for them

Each phase has an optimizer and a schedule of its own. In the intermediate phase the learning rate is constant, as in the papers, and
nothing is evaluated: a classifier that is not trained yet has no score worth reading.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.trainer_utils import TrainOutput, get_last_checkpoint

from hf_compress.arguments import CompressionArguments
from hf_compress.distillation import Distillation
from hf_compress.errors import ArgumentError
from hf_compress.layers.stack import unwrap
from hf_compress.progressive import Stage, parameters_of, slow_down, stages_of

logger = logging.getLogger(__name__)


def head_parameters(model: nn.Module) -> list[nn.Parameter]:
    """What the predictions alone need: all that lies outside the base model, and its pooler."""
    inner = unwrap(model)
    base = getattr(inner, getattr(inner, "base_model_prefix", ""), None)
    if not isinstance(base, nn.Module):
        return []
    pooler = getattr(base, "pooler", None)
    within_base = {id(parameter) for parameter in base.parameters()}
    of_pooler = {id(parameter) for parameter in pooler.parameters()} if isinstance(pooler, nn.Module) else set()
    return [parameter for parameter in inner.parameters() if id(parameter) not in within_base or id(parameter) in of_pooler]


def of_all_phases(outputs: Sequence[TrainOutput]) -> TrainOutput:
    """One result of several: sums of steps, seconds, epochs and operations, the loss as a mean over steps, rates over all seconds."""
    seconds = [output.metrics.get("train_runtime", 0.0) for output in outputs]
    steps = [output.global_step for output in outputs]
    metrics: dict[str, float] = dict(outputs[-1].metrics)
    metrics["train_runtime"] = sum(seconds)
    for rate in ("train_samples_per_second", "train_steps_per_second"):
        done = sum(output.metrics.get(rate, 0.0) * runtime for output, runtime in zip(outputs, seconds, strict=True))
        metrics[rate] = round(done / max(sum(seconds), 1e-9), 3)
    for total in ("total_flos", "epoch"):
        if total in metrics:
            metrics[total] = sum(output.metrics.get(total, 0.0) for output in outputs)
    loss = sum(output.training_loss * count for output, count in zip(outputs, steps, strict=True)) / max(1, sum(steps))
    metrics["train_loss"] = loss
    return TrainOutput(sum(steps), loss, metrics)


class PhasedRun:
    """The phases of one run.

    Args:
        args: the training arguments; changed while a phase runs, and put back.
        model: the student.
        distillation: whose losses take turns.
        flags: the phases in order, whether the intermediate one teaches one layer after another, and what the layers below learn at
            meanwhile.

    Raises:
        LossError: before the first step, if a phase has no loss, or layers cannot be taught one by one.
        ArgumentError: a rate where DeepSpeed or FSDP holds the optimizer.
    """

    def __init__(self, args: Any, model: nn.Module, distillation: Distillation, flags: CompressionArguments) -> None:
        self._args, self._model, self._distillation = args, model, distillation
        self._slow: list[nn.Parameter] = []
        self._slow_rate = flags.distill_progressive_rate
        if self._slow_rate is not None and (getattr(args, "deepspeed", None) or getattr(args, "fsdp", None)):
            raise ArgumentError(
                "--distill_progressive_rate gives layers learning rates of their own, and DeepSpeed or FSDP has one. Leave it out."
            )
        losses = {phase.name: distillation.losses_in(phase.name) for phase in flags.phases}
        self._phases = stages_of(flags.phases, model, losses.get("intermediate", ()), progressive=flags.distill_progressive)

    def run(self, resume: str | bool | None, train: Callable[[str | None], TrainOutput]) -> TrainOutput:
        """Train each phase; a resumed run begins in the phase that its checkpoint belongs to.

        Args:
            resume: a checkpoint, or True for the newest.
            train: trains one phase, from a checkpoint or from where the model stands.
        """
        first, checkpoint = self._resume_point(resume)
        outputs: list[TrainOutput] = []
        for number, phase in enumerate(self._phases[first:], start=first):
            logger.info("phase %d of %d: %s, %g epochs", number + 1, len(self._phases), phase.folder, phase.epochs)
            outputs.append(self._run_one(number, phase, checkpoint if number == first else None, train))
        return of_all_phases(outputs)

    def _run_one(self, number: int, phase: Stage, checkpoint: str | None, train: Callable[[str | None], TrainOutput]) -> TrainOutput:
        self._distillation.start(phase.name, phase.layers)
        changes: dict[str, Any] = {"num_train_epochs": phase.epochs, "output_dir": str(self._folder(number))}
        frozen: list[nn.Parameter] = []
        # Projections lie outside the base model too, and are what this phase trains.
        own = {id(parameter) for parameter in self._distillation.projections.parameters()}
        if phase.name == "intermediate":
            # HF's own types, so that the enum fields keep being enums.
            changes |= {
                "lr_scheduler_type": type(self._args.lr_scheduler_type)("constant"),
                "eval_strategy": type(self._args.eval_strategy)("no"),
                "load_best_model_at_end": False,
            }
            frozen = [p for p in self._still(phase, head_parameters(self._model)) if p.requires_grad and id(p) not in own]
        before = {name: getattr(self._args, name) for name in changes}
        try:
            for name, value in changes.items():
                setattr(self._args, name, value)
            for parameter in frozen:
                parameter.requires_grad_(False)
            return train(checkpoint)
        finally:
            for name, value in before.items():
                setattr(self._args, name, value)
            for parameter in frozen:
                parameter.requires_grad_(True)
            self._slow = []

    @property
    def slows(self) -> bool:
        """Whether layers learn at rates of their own in this phase."""
        return bool(self._slow)

    def slow_down(self, optimizer: torch.optim.Optimizer) -> None:
        """Let the layers that were taught learn more slowly than those that are being taught."""
        assert self._slow_rate is not None
        slow_down(optimizer, self._slow, self._slow_rate)

    def _still(self, phase: Stage, head: list[nn.Parameter]) -> list[nn.Parameter]:
        """What does not learn in an intermediate phase; notes what learns slowly."""
        if phase.layers is None:
            return head
        learning = parameters_of(phase.layers, self._model, head)
        if self._slow_rate is not None:
            self._slow = parameters_of((1, phase.layers[0] - 1), self._model, head)
        moving = {id(each) for each in (*learning, *self._slow)}
        return [each for each in self._model.parameters() if id(each) not in moving]

    def _folder(self, number: int) -> Path:
        top = Path(self._args.output_dir)
        return top if number == len(self._phases) - 1 else top / f"phase-{number + 1}-{self._phases[number].folder}"

    def _resume_point(self, resume: str | bool | None) -> tuple[int, str | None]:
        """The phase to begin with, and its checkpoint."""
        if not resume:
            return 0, None
        folders = [self._folder(number) for number in range(len(self._phases))]
        if resume is True:
            newest: Callable[[str], str | None] = get_last_checkpoint
            for number in reversed(range(len(folders))):
                found = newest(str(folders[number])) if folders[number].is_dir() else None
                if found is not None:
                    return number, found
            raise ArgumentError(f"No checkpoint was found in {folders[-1]} or in the folders of its phases. Train without resuming.")
        parent = Path(str(resume)).resolve().parent
        for number, folder in enumerate(folders):
            if folder.resolve() == parent:
                return number, str(resume)
        raise ArgumentError(f"The checkpoint {resume} lies in none of this run's folders: {', '.join(map(str, folders))}.")
