"""The teachers of a run as they were given: who each of them is, what it weighs, and the flags that speak of it alone.

    DistillTrainer(teacher=[a, b], teacher_weights=[0.7, 0.3])       --teacher_model_name_or_path a,b --teacher_weights 0.7,0.3
        |
    GivenTeacher 1 (a, 0.7)   GivenTeacher 2 (b, 0.3)                each with a TeacherSide of its own, live or from disk
        |
    lessons()                                                        one SignalSource, and losses that know their teacher

One teacher goes the same way, and nothing is added to what it would be without this.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from hf_compress.adapter_off import ADAPTER_OFF, AdapterOffTeacher, adapter_off_side, asks_adapter_off
from hf_compress.arguments import CompressionArguments
from hf_compress.cache_arguments import TeacherCacheArguments
from hf_compress.cached_teacher import CachedTeacher
from hf_compress.errors import ArgumentError, LossError, TeacherError
from hf_compress.layers.stack import unwrap
from hf_compress.losses.loss import Loss
from hf_compress.run_checks import check_teacher_and_losses, warn_of_same_model
from hf_compress.several_teachers import SeveralTeachers
from hf_compress.signals import SignalSource
from hf_compress.task import ModelShape
from hf_compress.teacher_identity import has_cache
from hf_compress.teacher_on_miss import asks_live
from hf_compress.teacher_placement import placed
from hf_compress.teacher_places import count_of_teachers, places, shares
from hf_compress.teacher_score import score_for_run
from hf_compress.teacher_side import TeacherSide, cached_side, live_side, no_teacher, teacher_at

logger = logging.getLogger(__name__)

# The flags that are a teacher's own where there are several.
_PLACES = ("teacher_model_name_or_path", "teacher_cache_dir")

# What a trainer takes as a teacher: a model, the path of one, the student with its adapters off; None for one that is on disk.
Teacher = PreTrainedModel | nn.Module | AdapterOffTeacher | str | None


@dataclass(eq=False)
class GivenTeacher:
    """One teacher of a run.

    Attributes:
        number: counted from 1; None for the only one.
        given: a model, or the path of one; None where it is on disk, or no loss needs it.
        share: what its losses weigh; the shares of all teachers sum to 1.
        flags: the run's, with places that are this teacher's alone.
        losses: those of this teacher that were given in Python; None for the recipe of the flags.
        loaded: the model, if a path was given and it is in memory.
        scores: its own.
        known: what is on disk was seen to be of this teacher, for another student of the run.
    """

    number: int | None
    given: Teacher
    share: float
    flags: CompressionArguments
    losses: Sequence[Loss] | None
    loaded: PreTrainedModel | None = None
    scores: dict[str, float] = field(default_factory=dict)
    known: bool = False

    @property
    def model(self) -> nn.Module | None:
        """The model that was handed over."""
        return self.given if isinstance(self.given, nn.Module) else None

    @property
    def reads_cache(self) -> bool:
        """Whether it answers from disk."""
        return self.flags.teacher_cache_dir is not None and has_cache(self.flags.teacher_cache_dir)

    @property
    def named_scores(self) -> dict[str, float]:
        """Its scores for the log: `teacher_accuracy`, or `teacher_2_accuracy` where there are several."""
        if self.number is None:
            return dict(self.scores)
        return {f"teacher_{self.number}_{name.removeprefix('teacher_')}": score for name, score in self.scores.items()}

    def take_flags(self, flags: CompressionArguments) -> None:
        """Flags that a trial of a search has set, with this teacher's own places."""
        path, folder = (getattr(self.flags, name) for name in _PLACES)
        self.flags = _own_flags(flags, path, folder, among_several=self.number is not None)

    def let_go(self) -> None:
        """Free the model: what it says is on disk now."""
        self.loaded = None
        if self.model is not None and not asks_live(self.flags):
            self.given = None

    def side(self, student: nn.Module, tokenizer: Any, device: Any, *, is_fsdp: bool = False) -> TeacherSide:
        """Who answers for it, and what is compared; a model is loaded where a path was given, once for many students.

        Args:
            student: the student.
            tokenizer: of both.
            device: where the student is.
            is_fsdp: FSDP will wrap the student.

        Raises:
            CompressionError: it does not fit the student; see `live_side` and `cached_side`.
        """
        if asks_adapter_off(self.given):
            alone = self.number is None
            return adapter_off_side(student, self.given, self.flags, self.losses, is_fsdp=is_fsdp, alone=alone)
        if self.reads_cache:
            known, self.known = self.known, True
            return cached_side(student, self.flags, self.losses, tokenizer, self.model, device, known=known)
        path = self.given if isinstance(self.given, str) else None
        if path is not None and self.loaded is None:
            self.loaded = teacher_at(path, student, self.flags, self.losses)
        model = self.loaded if path is not None else self.model
        if path is not None:
            warn_of_same_model(student, model, path)
        side = live_side(student, model, path, self.flags, self.losses, tokenizer)
        return replace(side, source=placed(side.source, student, device))


def given_teachers(
    teacher: Teacher | Sequence[Teacher], weights: Sequence[float] | None, flags: CompressionArguments, losses: Sequence[Loss] | None
) -> tuple[GivenTeacher, ...]:
    """The teachers that a run asks, without those that weigh nothing.

    Args:
        teacher: as `DistillTrainer` takes it; None for what the flags name.
        weights: of several teachers; None for those of the flags.
        flags: the run's.
        losses: as given in Python; None for the recipe of the flags.

    Raises:
        TeacherError, LossError, ArgumentError: a teacher that is none, losses without a teacher, or numbers that do not agree.
    """
    asked = teacher if isinstance(teacher, (list, tuple)) else None if teacher is None else [teacher]
    if asked is not None and not asked:
        raise TeacherError("teacher is an empty list: give at least one fine-tuned model.")
    models, folders = flags.teacher_model_name_or_path, flags.teacher_cache_dir
    weighed: object = weights if weights is not None else flags.teacher_weights
    count = len(asked) if asked is not None else count_of_teachers(models, folders, weighed)
    named = tuple(asked) if asked is not None else places(models, count, flag="teacher_model_name_or_path")
    cached = places(folders, count, flag="teacher_cache_dir")
    share_of = shares(weighed, count)
    _check_numbers(losses, count)
    asked_ones = [place for place in range(count) if share_of[place]]
    found = []
    for place in asked_ones:
        given = named[place]
        # A model that was handed over may be named as well, by the flag.
        path = given if isinstance(given, str) else models if count == 1 else None
        own = _own_flags(flags, path, cached[place], among_several=count > 1)
        number = place + 1 if len(asked_ones) > 1 else None
        each = GivenTeacher(number, named[place], share_of[place], own, _losses_of(losses, place + 1))
        _check_one(each, f"Teacher {place + 1} of {count}" if count > 1 else "")
        found.append(each)
    handed = [id(each.model) for each in found if each.model is not None]
    if len(set(handed)) < len(handed):
        raise TeacherError("teacher names the same model object twice. Name it once, with the sum of its weights in teacher_weights.")
    return tuple(found)


@dataclass(frozen=True)
class Lessons:
    """What all teachers of a run give a student: see `Distillation`."""

    source: SignalSource | None
    shapes: Mapping[int | None, ModelShape]
    losses: Sequence[Loss]


def lessons(teachers: Sequence[GivenTeacher], student: nn.Module, tokenizer: Any, device: Any, *, is_fsdp: bool = False) -> Lessons:
    """Set up each teacher, and put them together.

    Args:
        teachers: of the run.
        student, tokenizer, device, is_fsdp: as for `GivenTeacher.side`.

    Raises:
        CompressionError: a teacher does not fit the student.
        ArgumentError: teachers on disk that were built for other weights of the labels.
    """
    sides = [(each, each.side(student, tokenizer, device, is_fsdp=is_fsdp)) for each in teachers]
    if len(sides) == 1:
        side = sides[0][1]
        return Lessons(side.source, {} if side.shape is None else {None: side.shape}, side.losses)
    members = {each.number: side.source for each, side in sides if each.number is not None and side.source is not None}
    of_labels = [[loss for loss in side.losses if not loss.needs_teacher] for _, side in sides]
    if any(each != of_labels[0] for each in of_labels):
        raise ArgumentError(
            "The teachers on disk were built for recipes that weigh the labels differently, and labels count once: say which with "
            "--distill_recipe and --distill_weights labels=0.5."
        )
    taught = [replace(loss.times(each.share), teacher=each.number) for each, side in sides for loss in side.losses if loss.needs_teacher]
    shapes: dict[int | None, ModelShape] = {each.number: side.shape for each, side in sides if side.shape is not None}
    return Lessons(SeveralTeachers(members) if members else None, shapes, [*taught, *of_labels[0]])


def score_teachers(
    trainer: Any, teachers: Sequence[GivenTeacher], sources: Mapping[int | None, SignalSource], *, asked: bool
) -> dict[str, float]:
    """What each teacher scores by itself on a trainer's evaluation data; one on disk was asked when it was built.

    Args:
        trainer: whose data and metrics these are.
        teachers: of the run.
        sources: who answers for each, by its number.
        asked: whether a loss asks them anything.

    Returns:
        For the log, see `GivenTeacher.named_scores`; empty where the task's predictions are more than logits, or nothing scores them.
    """
    found: dict[str, float] = {}
    for each in teachers:
        source = sources.get(each.number)
        if isinstance(source, CachedTeacher):
            each.scores = dict(source.cache.manifest.teacher.scores)
        elif source is not None and asked:
            each.scores = score_for_run(trainer, source, each.number)
        found |= each.named_scores
    return found


def _own_flags(flags: CompressionArguments, path: str | None, folder: str | None, *, among_several: bool) -> CompressionArguments:
    """The run's flags as they are about one teacher; what is said of teachers on disk is not about a live one beside them."""
    own = copy.copy(flags)
    if among_several and folder is None:
        for each in fields(TeacherCacheArguments):
            setattr(own, each.name, each.default)
    if among_several and path == ADAPTER_OFF:
        own.teacher_dtype = own.teacher_revision = None
    own.teacher_model_name_or_path, own.teacher_cache_dir, own.teacher_weights = path, folder, None
    return own


def _check_one(teacher: GivenTeacher, which: str) -> None:
    """Refuse a teacher that is none, or that no loss learns from; say which of several weighs what."""
    nobody = no_teacher(teacher.flags.teacher_cache_dir)
    if which and teacher.given is None and not teacher.reads_cache:
        raise TeacherError(f"{which} is not there. {nobody}")
    if which and isinstance(teacher.losses, list) and not any(loss.needs_teacher and loss.weight for loss in teacher.losses):
        raise LossError(f"{which}: no loss learns from it. Give it one, or the weight 0 in teacher_weights.")
    check_teacher_and_losses(teacher.given, teacher.losses, from_disk=teacher.reads_cache, nobody=nobody)
    if which and teacher.number is not None:
        of_class = "" if teacher.model is None else type(unwrap(teacher.model)).__name__
        shown = ADAPTER_OFF if asks_adapter_off(teacher.given) else teacher.given
        name = shown if isinstance(shown, str) else of_class or teacher.flags.teacher_cache_dir
        logger.info("%s: %s, weight %g", which.lower(), name, teacher.share)


def _losses_of(losses: Sequence[Loss] | None, number: int) -> Sequence[Loss] | None:
    """The losses of one teacher, as if it were the only one."""
    if not isinstance(losses, (list, tuple)) or not all(isinstance(loss, Loss) for loss in losses):
        return losses  # refused by the checks that follow
    if all(loss.teacher is None for loss in losses):
        return losses
    return [replace(loss, teacher=None) for loss in losses if loss.teacher in (None, number)]


def _check_numbers(losses: Sequence[Loss] | None, count: int) -> None:
    for loss in losses if isinstance(losses, (list, tuple)) else ():
        number = getattr(loss, "teacher", None)
        if number is not None and not loss.needs_teacher:
            raise LossError(f"{type(loss).__name__}(teacher={number!r}): it asks no teacher. Leave teacher= out.")
        if number is not None and number not in range(1, count + 1):
            there = "there is one teacher" if count == 1 else f"there are {count} teachers, counted from 1"
            raise LossError(f"{type(loss).__name__}(teacher={number!r}): {there}.")
