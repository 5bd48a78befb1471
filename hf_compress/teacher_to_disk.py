"""A trainer's live teacher goes to disk: what is stored is what the losses of its flags will ask for."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import nn

from hf_compress.arguments import CompressionArguments
from hf_compress.cache.examples import Examples
from hf_compress.cached_teacher import CachedTeacher
from hf_compress.distillation import Distillation
from hf_compress.layers.stack import unwrap
from hf_compress.losses.loss import Loss
from hf_compress.signals import SignalSpec
from hf_compress.teacher import LiveTeacher
from hf_compress.teacher_cache_run import build_for_run, examples_of, look_for_examples, training_data
from hf_compress.teacher_side import recipe_settings, signals_within


def store_for_run(
    trainer: Any,
    teacher: LiveTeacher,
    examples: Examples,
    spec: SignalSpec,
    flags: CompressionArguments,
    losses: Sequence[Loss] | None,
    given: nn.Module | str | None,
    scores: dict[str, float],
) -> None:
    """Build the teacher on disk for a run.

    Args:
        trainer: whose student, tokenizer and processes these are.
        teacher: on its device; its labels are put into its own order, and each run puts them into its student's.
        examples: of the training data.
        spec: all signals that any phase asks for.
        flags, losses: the run's.
        given: the teacher as it was given, a path or a model.
        scores: the teacher's own.

    Raises:
        CacheError, TeacherError, DataError, ArgumentError: see `build_for_run`.
    """
    teacher.put_labels_in_order(None)
    build_for_run(
        teacher,
        examples,
        spec,
        flags,
        asked=partial(signals_within, trainer.model, teacher.model, flags, losses),
        name=given if isinstance(given, str) else type(unwrap(teacher.model)).__name__,
        tokenizer=trainer.processing_class,
        accelerator=trainer.accelerator,
        distillation=recipe_settings(flags, losses is not None),
        scores=scores,
        progress=not trainer.args.disable_tqdm,
    )


def teacher_to_disk(
    trainer: Any,
    distillation: Distillation,
    flags: CompressionArguments,
    losses: Sequence[Loss] | None,
    given: nn.Module | str | None,
    scores: dict[str, float],
) -> bool:
    """Build the teacher on disk where a run asks for it and it is not there; else see that it holds the run's examples.

    Args:
        trainer: whose data these are.
        distillation: whose teacher it is.
        flags, losses, given, scores: as for `store_for_run`.

    Returns:
        Whether it was built, so that it can be read from now on.
    """
    teacher = distillation.teacher
    if teacher is None or flags.teacher_cache_dir is None:
        return False
    columns: frozenset[str] = getattr(teacher, "columns", frozenset())
    may_lack = isinstance(teacher, CachedTeacher) and teacher.missing is not None
    workers = trainer.args.dataloader_num_workers
    examples = examples_of(*training_data(trainer), columns, trainer.processing_class, workers, may_change=may_lack)
    if isinstance(teacher, LiveTeacher):
        store_for_run(trainer, teacher, examples, distillation.whole_teacher_spec, flags, losses, given, scores)
        return True
    if isinstance(teacher, CachedTeacher):
        look_for_examples(teacher.cache, examples, may_lack=may_lack, budget=flags.cache_budget)
    return False
