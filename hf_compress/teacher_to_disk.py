"""A trainer's live teachers go to disk: what is stored is what the losses of its flags will ask for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from hf_compress.arguments import CompressionArguments
from hf_compress.cache.examples import Examples
from hf_compress.cached_teacher import CachedTeacher
from hf_compress.given_teachers import GivenTeacher
from hf_compress.layers.stack import unwrap
from hf_compress.losses.loss import Loss
from hf_compress.signals import SignalSource, SignalSpec
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
    given: object,
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


def store_teachers(trainer: Any, teachers: Sequence[GivenTeacher], sources: Mapping[int | None, SignalSource], asked: SignalSpec) -> bool:
    """Build what is to be on disk and is not there, and let those teachers go; of the others see that the data is there.

    Args:
        trainer: whose data and flags these are.
        teachers: of the run.
        sources: who answers for each, by its number.
        asked: all that any phase asks for.

    Returns:
        Whether any was built.

    Raises:
        CacheError, TeacherError, DataError, ArgumentError: see `store_for_run`.
    """
    built = False
    for each in teachers:
        source, flags = sources.get(each.number), each.flags
        if source is None or flags.teacher_cache_dir is None:
            continue
        columns: frozenset[str] = getattr(source, "columns", frozenset())
        may_lack = isinstance(source, CachedTeacher) and source.missing is not None
        workers = trainer.args.dataloader_num_workers
        examples = examples_of(*training_data(trainer), columns, trainer.processing_class, workers, may_change=may_lack)
        if isinstance(source, LiveTeacher):
            store_for_run(trainer, source, examples, asked.of_teacher(each.number), flags, each.losses, each.given, each.scores)
            each.let_go()
            built = True
        elif isinstance(source, CachedTeacher):
            look_for_examples(source.cache, examples, may_lack=may_lack, budget=flags.cache_budget)
    return built
