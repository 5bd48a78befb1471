"""A trainer's live teacher goes to disk: what is stored is what the losses of its flags will ask for."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import nn

from hf_compress.arguments import CompressionArguments
from hf_compress.cache.examples import Examples
from hf_compress.layers.stack import unwrap
from hf_compress.losses.loss import Loss
from hf_compress.signals import SignalSpec
from hf_compress.teacher import LiveTeacher
from hf_compress.teacher_cache_run import build_for_run
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
