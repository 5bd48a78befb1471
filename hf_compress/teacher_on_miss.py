"""`--teacher_cache_miss live`: who is asked for the examples that a teacher on disk lacks. Checked at the start, loaded at a miss."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import nn

from hf_compress.arguments import CompressionArguments
from hf_compress.cache.manifest import Manifest, refuse_mismatch
from hf_compress.cache.missing import HowToAsk, MissingExamples
from hf_compress.cache.teacher_rows import TeacherRun
from hf_compress.cached_teacher import CachedTeacher
from hf_compress.errors import ArgumentError, CacheError
from hf_compress.task import Kind
from hf_compress.teacher import LiveTeacher, load_teacher
from hf_compress.teacher_cache_run import teacher_run
from hf_compress.teacher_identity import had_head, special_ids_of, weights_hash

_OWN_DTYPE, _AUTOCAST = 0, 2


def asks_live(flags: CompressionArguments) -> bool:
    """Whether the teacher is asked for what is not on disk."""
    return flags.teacher_cache_miss == "live"


def ask_when_missing(
    source: CachedTeacher,
    flags: CompressionArguments,
    teacher: nn.Module | None,
    kind: Kind,
    accelerator: Any,
    tokenizer: Any,
    dataset: Any,
) -> None:
    """Have the teacher asked for what its cache lacks, where `--teacher_cache_miss live` says so; else change nothing.

    Args:
        source: the teacher on disk; that it is of the teacher named here has been seen to.
        flags: the run's.
        teacher: a model that was handed over; None for the one that the flags name.
        kind: what the student is for.
        accelerator: the trainer's.
        tokenizer: of both.
        dataset: the training data.

    Raises:
        ArgumentError: no teacher is named, or the run computes otherwise than the cache was computed.
        CacheError: the cache's folder cannot be written to.
    """
    if not asks_live(flags):
        return
    cache, path = source.cache, flags.teacher_model_name_or_path
    if teacher is None and path is None:
        raise ArgumentError(
            "--teacher_cache_miss live: nobody is there to be asked for the examples that are not on disk. Add "
            f"--teacher_model_name_or_path with the teacher that the cache is of ({cache.manifest.teacher.name})."
        )
    _refuse_other_precision(cache.manifest, flags, teacher, accelerator)
    if not os.access(cache.folder, os.W_OK):
        raise CacheError(
            f"--teacher_cache_miss live appends to the teacher on disk, and {flags.teacher_cache_dir} cannot be written to. Copy it to a "
            "folder of your own, and name that with --teacher_cache_dir."
        )

    def load() -> TeacherRun:
        model = teacher
        if model is None:
            assert path is not None
            own = cache.manifest.teacher.dtype.partition(",")[_OWN_DTYPE]
            with torch.random.fork_rng(devices=[]):  # the student's dropout shall not hang on when an example is missing
                model = load_teacher(path, kind, revision=flags.teacher_revision, dtype=own, needs_logits=had_head(cache.manifest))
            refuse_mismatch(cache.manifest, {"teacher.weights": weights_hash(model.state_dict().items())}, "in another folder")
        return teacher_run(LiveTeacher(model).to(accelerator.device), cache.spec, cache.stored.selection, accelerator, cache.top)

    known = len(dataset) if hasattr(dataset, "__len__") and kind != "multiple_choice" else None  # there each choice is asked for
    source.missing = MissingExamples(cache, HowToAsk(load, special_ids_of(tokenizer), source.pad_token_id, known))


def _refuse_other_precision(manifest: Manifest, flags: CompressionArguments, teacher: nn.Module | None, accelerator: Any) -> None:
    """What is appended is to be what a build would have stored."""
    stored = manifest.teacher.dtype.partition(", autocast to ")
    if teacher is None and flags.teacher_dtype not in (None, stored[_OWN_DTYPE]):
        raise ArgumentError(
            f"--teacher_dtype {flags.teacher_dtype}: the teacher on disk computed in {stored[_OWN_DTYPE]}, and so must the one that is "
            "asked for what is missing (--teacher_cache_miss live). Leave --teacher_dtype out."
        )
    mixed = getattr(accelerator, "mixed_precision", "no")
    if (stored[_AUTOCAST] or "no") != mixed:
        names = {"no": "without --bf16 and --fp16"}
        before, now = (names.get(each, f"with --{each}") for each in (stored[_AUTOCAST] or "no", mixed))
        raise ArgumentError(
            f"--teacher_cache_miss live: the teacher on disk was built {before}, and this run is {now}, so what is appended would be "
            f"computed otherwise. Run it {before}, or build another cache in another folder (--teacher_cache_dir)."
        )
