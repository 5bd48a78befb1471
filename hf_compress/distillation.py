"""One distilling set-up: which losses, on which layers of which student, against which teacher. The trainer only runs it.

counts(batches)      units of the whole step, all micro-batches and processes
student's forward    (hooks add the signals to its output)
teacher.signals()
parts()              sum over this micro-batch / count of the step, loss by loss
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import chain, count
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from hf_compress.capture import Capture
from hf_compress.errors import LossError, TeacherError
from hf_compress.layers.layer_map import LayerMap
from hf_compress.layers.record import recorded_layers
from hf_compress.layers.schedule import stages
from hf_compress.layers.stack import find_stacks, pretrained_model
from hf_compress.losses.labels import LabelsLoss
from hf_compress.losses.loss import Loss, Phase, Projection
from hf_compress.losses.reduction import Batch, BatchReader
from hf_compress.projections import Projections
from hf_compress.signals import Signals, SignalSource, SignalSpec
from hf_compress.task import ModelShape

logger = logging.getLogger(__name__)


class Distillation:
    """Losses between one student and one teacher, for one run.

    Args:
        student: the plain model, on its device, with the layers it will keep.
        losses: as the user gave them; those of weight 0 are left out.
        teacher: who shows the teacher's side; None where no loss asks for it.
        teacher_shape: the teacher's sizes.
        tokenizer: for padding and separator tokens.
        label_name: the column that holds the labels.

    Raises:
        LossError, LayerMapError: where a loss does not fit the two models.
    """

    def __init__(
        self,
        student: nn.Module,
        losses: Sequence[Loss],
        teacher: SignalSource | None,
        teacher_shape: ModelShape | None,
        tokenizer: Any = None,
        label_name: str = "labels",
    ) -> None:
        shape = ModelShape.of(student)
        asked = [loss for loss in losses if loss.weight != 0]
        if not asked:
            raise LossError("Every loss has weight 0, so there is nothing to learn from. Give one a weight above 0.")
        if teacher is None and any(loss.needs_teacher for loss in asked):
            names = ", ".join(loss.name for loss in asked if loss.needs_teacher)
            raise TeacherError(
                f"The losses {names} compare with a teacher, but none was given: --teacher_model_name_or_path, or "
                "DistillTrainer(teacher=model)."
            )
        self._asked, self._teacher_shape = tuple(asked), teacher_shape or shape
        self.losses = self._resolved(shape)
        self.teacher = teacher
        self.teacher_spec = SignalSpec()
        self.student = student
        self.projections = Projections.attach(student, _projections(self.losses), teacher=self._teacher_shape.model_type)
        self.reader = _reader(student, shape, tokenizer, label_name, self.losses)
        self._student_capture: Capture | None = None
        self.active = self.losses

    def losses_in(self, phase: Phase) -> tuple[Loss, ...]:
        """The losses that act in a phase.

        Raises:
            LossError: if there are none.
        """
        found = tuple(loss for loss in self.losses if loss.phase == phase)
        if not found:
            have = ", ".join(sorted({loss.phase for loss in self.losses}))
            raise LossError(f"No loss takes part in the {phase} phase; the losses belong to: {have}. Choose another recipe, e.g. tinybert.")
        return found

    def start(self, phase: Phase | None = None) -> None:
        """Let the losses of one phase act, or all of them, and hook into the student for just what these need."""
        self.active = self.losses if phase is None else self.losses_in(phase)
        spec, self.teacher_spec = SignalSpec(), SignalSpec()
        for loss in self.active:
            spec, self.teacher_spec = spec | loss.student_spec(), self.teacher_spec | loss.teacher_spec()
        for name, projection in self.projections.items():  # one that no loss uses now must neither decay nor be waited for
            projection.requires_grad_(any(name in loss.projections for loss in self.active))
        self._student_capture = Capture(self.student, spec, project=self.projections.project)
        self.units = tuple(sorted({loss.unit for loss in self.active}))

    def student_changed(self) -> None:
        """The student has lost layers while it trains: let the losses choose their layers anew."""
        before, self.losses = self.losses, self._resolved(ModelShape.of(self.student))
        for loss in self.losses:
            if loss not in before:
                logger.info("from here on: %s", loss)
        if self.running:
            self.start()

    def check_stages(self, *, from_disk: bool) -> None:
        """See that the losses fit the student at every stage, if layers are to go while it trains.

        Args:
            from_disk: the teacher is read from disk, and so shows what it was asked for when the first batch was made.

        Raises:
            LossError, LayerMapError: with the way out.
        """
        record = {name: each for name, each in (recorded_layers(pretrained_model(self.student).config) or {}).items() if each.to_drop}
        for loss in self._asked if record else ():
            named = getattr(loss, "layer_map", None)
            if isinstance(named, LayerMap) or (isinstance(named, str) and ":" in named):
                raise LossError(
                    f"{loss.name} names pairs of layers ({named}), and layers go while the student trains, so that its numbers change. "
                    "Name a rule instead (kept, uniform, top, bottom), or drop the layers before training."
                )
        shape = ModelShape.of(self.student)
        for stage in stages(record) if record else ():
            now = {name: replace(shape.stacks[name], num_layers=len(each.kept), kept=each.kept) for name, each in stage.items()}
            losses = self._resolved(replace(shape, stacks=shape.stacks | now))
            if _projections(losses) != _projections(self.losses):
                raise LossError(
                    "The losses learn one projection for each student layer, and layers go while the student trains. Take losses with a "
                    "shared projection, or drop the layers before training."
                )
            if from_disk and _teacher_spec(losses) != self.whole_teacher_spec:
                raise LossError(
                    "A teacher on disk is read ahead, and what is compared with it changes when layers go while the student trains. Keep "
                    "the teacher in memory (leave --teacher_cache_dir out), compare predictions alone (--distill_recipe logits), or drop "
                    "the layers before training."
                )

    def _resolved(self, student: ModelShape) -> tuple[Loss, ...]:
        return tuple(resolved for loss in self._asked for resolved in loss.resolve(student, self._teacher_shape))

    def stop(self) -> None:
        """Take the hooks off both models: what was trained is a plain model again."""
        if self._student_capture is not None:
            self._student_capture.remove()
            self._student_capture = None
        if self.teacher is not None:
            self.teacher.close()

    @property
    def running(self) -> bool:
        """Between `start` and `stop`."""
        return self._student_capture is not None

    @property
    def whole_teacher_spec(self) -> SignalSpec:
        """What the losses of all phases ask the teacher for."""
        return _teacher_spec(self.losses)

    @property
    def needs_labels(self) -> bool:
        """Whether a loss of this phase reads labels; others never reach the student."""
        return any(isinstance(loss, LabelsLoss) for loss in self.active)

    @property
    def needs_teacher(self) -> bool:
        """Whether a loss of this phase reads the teacher."""
        return any(loss.needs_teacher for loss in self.active)

    def counts(self, batches: Sequence[Mapping[str, Any]], device: torch.device) -> Tensor:
        """How many units these batches have, (units,) float; to be summed over processes."""
        total = torch.zeros(len(self.units), device=device)
        for batch in batches:
            read = self._read(batch, self.teacher_signals(batch) if self._counts_selected else None)
            total = total + torch.stack([read.count(unit) for unit in self.units]).to(device)
        return total

    def teacher_signals(self, inputs: Mapping[str, Tensor]) -> Signals:
        """What the teacher shows of this batch, for the losses of this phase."""
        if self.teacher is None or not self.needs_teacher:
            return Signals()
        return self.teacher.signals(inputs, self.teacher_spec)

    def show(self, teacher: Signals) -> None:
        """Tell the student's hooks at which tokens the teacher has states; before its forward."""
        assert self._student_capture is not None
        self._student_capture.positions = {(key.stack, key.layer): state.positions for key, state in teacher.selected_states.items()}

    @property
    def _counts_selected(self) -> bool:
        """Only a teacher on disk selects; a live one is not asked twice for one batch."""
        return any(unit.startswith("selected.") for unit in self.units)

    def _read(self, inputs: Mapping[str, Any], teacher: Signals | None) -> Batch:
        # Every layer of a stack has as many tokens of an example: the count is one.
        selected = {} if teacher is None else {key.stack: state.chosen for key, state in teacher.selected_states.items()}
        return self.reader.read(inputs, selected)

    def parts(
        self,
        outputs: Mapping[str, Any],
        teacher: Signals,
        inputs: Mapping[str, Any],
        counts: Tensor,
        labels_mean: Callable[[Mapping[str, Any], Tensor], Tensor],
    ) -> dict[str, tuple[Tensor, float]]:
        """Each loss of this micro-batch as its share of the step's mean.

        Args:
            outputs: the student's, with the signals that its hooks added.
            teacher: see `teacher_signals`.
            inputs: the batch, labels included.
            counts: (units,), of the whole step.
            labels_mean: the task's own loss from the student's output and the number of labels in this micro-batch.

        Returns:
            By name: the value, to be summed over the step's micro-batches and processes, and its weight.
        """
        assert self._student_capture is not None
        batch = self._read(inputs, teacher)
        student = self._student_capture.signals(outputs)
        parts: dict[str, tuple[Tensor, float]] = {}
        for loss in self.active:
            if isinstance(loss, LabelsLoss):
                total = loss.of_mean(labels_mean(outputs, batch.count(loss.unit)), batch)
            else:
                total = loss(student, teacher, batch)
            value = total / counts[self.units.index(loss.unit)].clamp(min=1)
            names = chain((loss.name, f"{loss.name}_{getattr(loss, 'stack', 1)}"), (f"{loss.name}_{number}" for number in count(2)))
            parts[next(name for name in names if name not in parts)] = (value, loss.weight)
        return parts


def _teacher_spec(losses: Sequence[Loss]) -> SignalSpec:
    spec = SignalSpec()
    for loss in losses:
        spec = spec | loss.teacher_spec()
    return spec


def _projections(losses: Sequence[Loss]) -> dict[str, Projection]:
    """The learnt maps of all losses; those of one name are shared, and so must be of one size."""
    found: dict[str, Projection] = {}
    for loss in losses:
        for name, size in loss.projections.items():
            if found.setdefault(name, size) != size:
                other = found[name]
                raise LossError(
                    f"Two losses ask for the projection {name}, {other.in_features} -> {other.out_features} and {size.in_features} -> "
                    f"{size.out_features} (the second is {loss.name}). They cannot both be had; leave one of the losses out."
                )
    return found


def _reader(student: nn.Module, shape: ModelShape, tokenizer: Any, label_name: str, losses: Sequence[Loss]) -> BatchReader:
    stacks = find_stacks(student)
    separators = any(getattr(loss, "skip_heads", None) for loss in losses)
    known = tokenizer if isinstance(tokenizer, PreTrainedTokenizerBase) else None
    config = pretrained_model(student).config
    separator = getattr(known, "sep_token_id", None)
    return BatchReader(
        kind=shape.kind,
        stacks=tuple(stacks),
        pad_token_id=getattr(known, "pad_token_id", None) if known else getattr(config, "pad_token_id", None),
        eos_token_id=getattr(known, "eos_token_id", None) if known else getattr(config, "eos_token_id", None),
        separator_ids=(separator,) if separators and separator is not None else (),
        causal_stacks=frozenset(name for name, stack in stacks.items() if stack.causal),
        label_name=label_name,
        needs_tokens=any(loss.student_spec().stacks or loss.unit.startswith("tokens.") for loss in losses)
        or shape.kind == "question_answering",
        summary_last=frozenset(name for name, stack in stacks.items() if stack.summary_token == "last"),
    )
