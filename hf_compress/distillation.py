"""One distilling set-up: which losses, on which layers of which student, against which teacher. The trainer only runs it.

counts(batches)      units of the whole step, all micro-batches and processes
student's forward    (hooks add the signals to its output)
teacher.signals()
parts()              sum over this micro-batch / count of the step, loss by loss
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import chain, count
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from hf_compress.capture import Capture
from hf_compress.chunked_logits import ChunkedLogits, ChunkSettings
from hf_compress.errors import LossError, TeacherError
from hf_compress.layers.layer_map import LayerMap
from hf_compress.layers.record import recorded_layers
from hf_compress.layers.schedule import stages
from hf_compress.layers.stack import find_stacks, pretrained_model
from hf_compress.losses.labels import LabelsLoss
from hf_compress.losses.logits import LogitsLoss
from hf_compress.losses.loss import Loss, Phase, Projection
from hf_compress.losses.reduction import Batch, BatchReader
from hf_compress.prediction_head import HeadTap
from hf_compress.progressive import losses_within
from hf_compress.projections import Projections
from hf_compress.several_teachers import (
    asked_of_student,
    asked_of_teacher,
    before_the_head,
    chosen_tokens,
    members_of,
    positions_in,
    projections_of,
    shown_to,
    unit_of,
)
from hf_compress.signals import Signals, SignalSource, SignalSpec
from hf_compress.task import ModelShape
from hf_compress.teacher import LiveTeacher

logger = logging.getLogger(__name__)


class Distillation:
    """Losses between one student and one teacher, for one run.

    Args:
        student: the plain model, on its device, with the layers it will keep.
        losses: as the user gave them; those of weight 0 are left out.
        teacher: who shows the teacher's side; None where no loss asks for it.
        teacher_shapes: the teacher's sizes; those of several by their numbers, None standing for the only one.
        tokenizer: for padding and separator tokens.
        label_name: the column that holds the labels.
        chunks: how language models' predictions are compared.

    Attributes:
        progress: how much of the training, or of its phase, is done: 0 in the first step, 1 in the last. The trainer sets it.

    Raises:
        LossError, LayerMapError: where a loss does not fit the two models.
    """

    def __init__(
        self,
        student: nn.Module,
        losses: Sequence[Loss],
        teacher: SignalSource | None,
        teacher_shapes: Mapping[int | None, ModelShape],
        tokenizer: Any = None,
        label_name: str = "labels",
        chunks: ChunkSettings | None = None,
    ) -> None:
        shape = ModelShape.of(student)
        for loss in losses:
            loss.check_weight()
        asked = [loss for loss in losses if loss.weight != 0]
        if not asked:
            raise LossError("Every loss has weight 0, so there is nothing to learn from. Give one a weight above 0.")
        if teacher is None and any(loss.needs_teacher for loss in asked):
            names = ", ".join(loss.name for loss in asked if loss.needs_teacher)
            raise TeacherError(
                f"The losses {names} compare with a teacher, but none was given: --teacher_model_name_or_path, or "
                "DistillTrainer(teacher=model)."
            )
        self._asked, self._shapes = tuple(asked), dict(teacher_shapes)
        self.losses = self._resolved(shape)
        self.teacher = teacher
        self.teacher_spec = SignalSpec()
        self.progress = 0.0
        self.student = student
        self.projections = Projections.attach(student, _projections(self.losses), teacher=_kinds(self._shapes.values()))
        self.reader = _reader(student, shape, tokenizer, label_name, self.losses)
        self._student_capture: Capture | None = None
        self._chunks = chunks or ChunkSettings()
        self._chunk_size = self._chunks.tokens(student)
        self._chunked: ChunkedLogits | None = None
        self._unread: HeadTap | None = None
        self._shown = False  # between `show` and `parts`: the student's next forward is this step's
        self.active = self.losses

    def losses_in(self, phase: Phase, layers: tuple[int, int] | None = None) -> tuple[Loss, ...]:
        """The losses that act in a phase, or what of them teaches the student's layers from the first to the last of `layers`.

        Raises:
            LossError: if there are none.
        """
        found = tuple(loss for loss in self.losses if loss.phase == phase)
        if not found:
            have = ", ".join(sorted({loss.phase for loss in self.losses}))
            raise LossError(f"No loss takes part in the {phase} phase; the losses belong to: {have}. Choose another recipe, e.g. tinybert.")
        return found if layers is None else losses_within(found, layers)

    def start(self, phase: Phase | None = None, layers: tuple[int, int] | None = None) -> None:
        """Let the losses of one phase act (on some layers, as in `losses_in`), or all, and hook into the student for what these need."""
        self.active = self.losses if phase is None else self.losses_in(phase, layers)
        spec, self.teacher_spec = SignalSpec(), SignalSpec()
        for loss in self.active:
            spec, self.teacher_spec = spec | asked_of_student(loss), self.teacher_spec | asked_of_teacher(loss)
        for name, projection in self.projections.items():  # one that no loss uses now must neither decay nor be waited for
            projection.requires_grad_(any(name in projections_of(loss) for loss in self.active))
        self._student_capture = Capture(self.student, spec, project=self.projections.project)
        self._start_chunks()
        self.units = tuple(sorted({unit_of(loss) for loss in self.active}))

    def _start_chunks(self) -> None:
        """Let a language model's predictions be compared some tokens at a time, or hardly be made where no loss reads them."""
        self._stop_chunks()
        if not self._chunk_size:
            return
        losses = [loss for loss in self.active if isinstance(loss, LogitsLoss)]
        labels = any(isinstance(loss, LabelsLoss) for loss in self.active)
        if not losses:
            if not labels:
                self._unread = HeadTap.of_unread(self.student, only_in_training=True, wanted=lambda: self._shown)
            return
        self._chunked = ChunkedLogits(
            self.student, losses, labels=labels, chunk_size=self._chunk_size, own_label_loss=self._chunks.own_label_loss
        )
        live = [number for number, member in members_of(self.teacher).items() if isinstance(member, LiveTeacher)]
        self.teacher_spec = before_the_head(self.teacher_spec, live)  # they need not make whole logits either

    def student_changed(self) -> None:
        """The student has lost layers while it trains: let the losses choose their layers anew."""
        before, self.losses = self.losses, self._resolved(ModelShape.of(self.student))
        for loss in self.losses:
            if loss not in before:
                logger.info("from here on: %s", loss)
        if self.running:
            self.start()

    def check_stages(self, *, from_disk: Iterable[int | None]) -> None:
        """See that the losses fit the student at every stage, if layers are to go while it trains.

        Args:
            from_disk: the numbers of the teachers that are read from disk, and so show what they were asked for when the first batch was
                made; None is the only one.

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
            before, now_asked = self.whole_teacher_spec, _teacher_spec(losses)
            if any(now_asked.of_teacher(number) != before.of_teacher(number) for number in from_disk):
                raise LossError(
                    "A teacher on disk is read ahead, and what is compared with it changes when layers go while the student trains. Keep "
                    "the teacher in memory (leave --teacher_cache_dir out), compare predictions alone (--distill_recipe logits), or drop "
                    "the layers before training."
                )

    def _resolved(self, student: ModelShape) -> tuple[Loss, ...]:
        return tuple(resolved for loss in self._asked for resolved in loss.resolve(student, self._shapes.get(loss.teacher, student)))

    def stop(self) -> None:
        """Take the hooks off both models: what was trained is a plain model again."""
        if self._student_capture is not None:
            self._student_capture.remove()
            self._student_capture = None
        self._stop_chunks()
        if self.teacher is not None:
            self.teacher.close()

    def _stop_chunks(self) -> None:
        for hooks in (self._chunked, self._unread):
            if hooks is not None:
                hooks.remove()
        self._chunked = self._unread = None

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
        """Whether the student must be given the labels: a loss of this phase reads what the model itself makes of them."""
        return any(isinstance(loss, LabelsLoss) for loss in self.active) and not (self._chunked and self._chunked.takes_labels)

    @property
    def needs_teacher(self) -> bool:
        """Whether a loss of this phase reads the teacher."""
        return any(loss.needs_teacher for loss in self.active)

    def counts(self, batches: Sequence[Mapping[str, Any]], device: torch.device) -> Tensor:
        """How many units these batches have, (units,) float; to be summed over processes."""
        total = torch.zeros(len(self.units), device=device)
        for batch in batches:
            read = self._read(batch, self.teacher.signals(batch, self._selecting) if self.teacher and self._selecting else None)
            total = total + torch.stack([read.count(unit) for unit in self.units]).to(device)
        return total

    def teacher_signals(self, inputs: Mapping[str, Tensor]) -> Signals:
        """What the teacher shows of this batch, for the losses of this phase."""
        if self.teacher is None or not self.needs_teacher:
            return Signals()
        return self.teacher.signals(inputs, self.teacher_spec)

    def show(self, teacher: Signals, inputs: Mapping[str, Any]) -> None:
        """Tell the student's hooks at which tokens the teacher has states, and what it predicts; before the student's forward."""
        assert self._student_capture is not None
        if self._chunked is not None:
            self._chunked.show(self._read(inputs, teacher), teacher)
        self._shown = True
        self._student_capture.positions = positions_in(teacher)

    @property
    def _selecting(self) -> SignalSpec | None:
        """What is asked of the teachers that select tokens. They are on disk; a live one is not asked twice for one batch."""
        selecting = {loss.teacher for loss in self.active if loss.unit.startswith("selected.")}
        if not selecting or None in selecting:
            return self.teacher_spec if selecting else None
        return SignalSpec(teachers={number: asked for number, asked in self.teacher_spec.teachers.items() if number in selecting})

    def _read(self, inputs: Mapping[str, Any], teacher: Signals | None) -> Batch:
        return self.reader.read(inputs, {} if teacher is None else chosen_tokens(teacher))

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
        self._shown = False  # further forwards are a script's own, and make all their logits
        batch = self._read(inputs, teacher)
        student = self._student_capture.signals(outputs)
        parts: dict[str, tuple[Tensor, float]] = {}
        for loss in self.active:
            summed = None if self._chunked is None else self._chunked.total(loss, outputs)
            if summed is not None:
                total = summed
            elif isinstance(loss, LabelsLoss):
                total = loss.of_mean(labels_mean(outputs, batch.count(loss.unit)), batch)
            else:
                total = loss(shown_to(loss, student), teacher.of_teacher(loss.teacher), batch)
            value = total / counts[self.units.index(unit_of(loss))].clamp(min=1)
            own = loss.name if loss.teacher is None else f"{loss.name}_teacher_{loss.teacher}"
            names = chain((own, f"{own}_{getattr(loss, 'stack', 1)}"), (f"{own}_{number}" for number in count(2)))
            parts[next(name for name in names if name not in parts)] = (value, loss.weight_at(self.progress))
        return parts


def _teacher_spec(losses: Sequence[Loss]) -> SignalSpec:
    spec = SignalSpec()
    for loss in losses:
        spec = spec | asked_of_teacher(loss)
    return spec


def _kinds(teachers: Iterable[ModelShape]) -> str:
    """The architectures of the teachers, as a projection file names them; empty where one is not known."""
    kinds = [shape.model_type for shape in teachers]
    return "+".join(kinds) if all(kinds) else ""


def _projections(losses: Sequence[Loss]) -> dict[str, Projection]:
    """The learnt maps of all losses; those of one name are shared, and so must be of one size."""
    found: dict[str, Projection] = {}
    for loss in losses:
        for name, size in projections_of(loss).items():
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
