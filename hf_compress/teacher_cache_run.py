"""Building the teacher on disk for a run: from a trainer's data, collator and live teacher to a finished cache."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import datasets
import torch
from torch import nn

from hf_compress import __version__
from hf_compress.agreement import joined
from hf_compress.arguments import CompressionArguments
from hf_compress.cache.build import CacheBuilder, CacheContents, Processes
from hf_compress.cache.estimate import TeacherSizes
from hf_compress.cache.examples import Examples
from hf_compress.cache.manifest import Manifest
from hf_compress.cache.predictions import TopK
from hf_compress.cache.price import readable
from hf_compress.cache.reader import TeacherCache
from hf_compress.cache.selection import Selection
from hf_compress.cache.teacher_rows import TeacherRun
from hf_compress.errors import CacheError
from hf_compress.layers.stack import find_stacks
from hf_compress.signals import HiddenState, SignalSpec
from hf_compress.task import ModelShape
from hf_compress.teacher import LiveTeacher
from hf_compress.teacher_cache_budget import kept_within_budget
from hf_compress.teacher_identity import identity_of, logits_shapes, refuse_several_stacks, special_ids_of, stack_sizes, tokenizer_hash

logger = logging.getLogger(__name__)

# How many examples of the data are looked up before training starts.
LOOKED_UP = 256


def examples_of(
    dataset: Any,
    collator: Callable[[list[Any]], Mapping[str, Any]],
    columns: frozenset[str],
    tokenizer: Any,
    num_workers: int,
    *,
    may_change: bool = False,
) -> Examples:
    """A trainer's training data as a teacher on disk sees it; see `Examples`."""
    pad, eos = getattr(tokenizer, "pad_token_id", None), getattr(tokenizer, "eos_token_id", None)
    return Examples(dataset, collator, columns, special_ids_of(tokenizer), pad if pad != eos else None, num_workers, may_change=may_change)


def training_data(trainer: Any) -> tuple[Any, Callable[[list[Any]], Any]]:
    """The training data and its collator, as the Trainer's own data loader has them."""
    dataset = trainer.train_dataset
    if isinstance(dataset, datasets.Dataset):
        return trainer._remove_unused_columns(dataset, description="training"), trainer.data_collator
    return dataset, trainer._get_collator_with_removed_columns(trainer.data_collator, description="training")


def teacher_run(teacher: LiveTeacher, spec: SignalSpec, selection: Selection, accelerator: Any, top: TopK | None = None) -> TeacherRun:
    """A live teacher as a cache is filled from it.

    Args:
        teacher: on its device, its labels in its own order.
        spec: the signals to store.
        selection: what is kept of hidden states.
        accelerator: the trainer's.
        top: how much of a language model's logits is stored; None for all.
    """
    stacks = find_stacks(teacher.model)
    return TeacherRun(
        source=teacher,
        spec=spec,
        selection=selection,
        device=accelerator.device,
        forward_context=accelerator.autocast,
        ranks=ModelShape.of(teacher.model).shows_attention_scores,
        summary_last=frozenset(stack for stack, found in stacks.items() if found.summary_token == "last"),
        top=top,
    )


def build_for_run(
    teacher: LiveTeacher,
    examples: Examples,
    spec: SignalSpec,
    flags: CompressionArguments,
    *,
    asked: Callable[[Selection], SignalSpec],
    name: str,
    tokenizer: Any,
    accelerator: Any,
    distillation: Mapping[str, Any],
    scores: dict[str, float],
    progress: bool,
) -> Manifest:
    """Build what the losses of a run will ask for, or what of it `--teacher_cache_budget` has room for, and the layers that
    `--teacher_cache_layers` names.

    Args:
        teacher: live, on its device, its labels in its own order.
        examples: of the training data.
        spec: all signals that any phase asks for.
        flags: the run's.
        asked: what the losses ask for where they learn from a selection of hidden states; for `--teacher_cache_budget`.
        name: of the teacher.
        tokenizer: of both.
        accelerator: the trainer's.
        distillation: what the manifest keeps of the flags.
        scores: the teacher's own.
        progress: whether to show bars.

    Raises:
        CacheError, TeacherError, DataError: see `CacheBuilder`.
        ArgumentError: if a layer is named that the teacher does not have, or the budget is too small.
    """
    assert flags.teacher_cache_dir is not None
    model: nn.Module = teacher.model
    shape = ModelShape.of(model)
    refuse_several_stacks(shape)
    sizes = stack_sizes(shape)
    selection, codec = flags.selection or Selection.everything(), flags.codec
    logits = logits_shapes(model) if spec.logits else {}
    top = None
    if flags.teacher_cache_logits_top_k is not None:
        top = TopK.asked_for(flags.teacher_cache_logits_top_k, logits["logits"][-1], spec.temperatures)
    if flags.teacher_cache_budget is not None:
        whole = teacher_run(teacher, spec, Selection.everything(), accelerator)
        known = TeacherSizes(sizes, logits, whole.ranks, top)
        kept = kept_within_budget(flags, asked, whole, examples, known, accelerator, progress=progress)
        selection, codec, spec = kept.selection, kept.codec, kept.spec
        distillation = {**distillation, "selected": True, "budget": kept.record}
    if flags.teacher_cache_layers is not None:
        (stack,) = shape.stacks
        # A view of so many layers of the run's own map must not count in the others.
        distillation = {**distillation, "compared_layers": sorted(key.layer for key in spec.hidden_states)}
        more = flags.stored_layers(shape.stacks[stack].num_layers)
        spec = spec | SignalSpec(hidden_states=frozenset(HiddenState(stack, layer) for layer in more))
    mixed = getattr(accelerator, "mixed_precision", "no")
    run = teacher_run(teacher, spec, selection, accelerator, top)
    contents = CacheContents(
        teacher=identity_of(model, name, None if mixed == "no" else mixed, scores),
        tokenizer=tokenizer_hash(tokenizer),
        codec=codec,
        distillation=distillation,
        sizes=sizes,
        logits=logits,
        version=__version__,
    )
    processes = Processes(accelerator.process_index, accelerator.num_processes, joined)
    return CacheBuilder(Path(flags.teacher_cache_dir), examples, run, contents, processes=processes, progress=progress).build()


def look_for_examples(cache: TeacherCache, examples: Examples, *, may_lack: bool, budget: int | None = None) -> None:
    """Look some of the data up before the first step.

    Args:
        cache: the teacher on disk.
        examples: of the training data.
        may_lack: say what is missing, since the teacher will be asked for it.
        budget: bytes that the run allows a teacher on disk; it is too late for that.

    Raises:
        CacheError: if the cache does not hold it, with the likely reason.
    """
    if budget is not None:
        size = cache.manifest.bytes
        logger.info(
            "--teacher_cache_budget counts when a teacher on disk is built, and this one is there: %s%s, hidden states %s",
            readable(size),
            "" if size <= budget else f", more than {readable(budget)}",
            cache.selection.describe(),
        )
    step = max(1, len(examples) // LOOKED_UP)
    looked_up = list(range(0, len(examples), step))
    with torch.random.fork_rng(devices=[]):  # a collator that draws shall not change the student's dropout
        found = [examples.canonical(looked_up[start : start + 64]) for start in range(0, len(looked_up), 64)]
    absent = sum(cache.missing(batch.keys()) for batch in found)
    if may_lack:
        logger.info("%d of %d training examples that were looked up are not on disk: the teacher will be asked", absent, len(looked_up))
        return
    if not absent:
        return
    if absent == len(looked_up):
        reason = "none of it: it is other data, or was tokenized in another way (another tokenizer, --max_seq_length, other columns)"
    else:
        reason = "only part of it: there are examples more than when the cache was built (--max_train_samples, augmentation)"
    raise CacheError(
        f"{absent} of {len(looked_up)} training examples that were looked up are not in the teacher on disk ({cache.folder}). It holds "
        f"{reason}. "
        "Build one of this data: name another folder with --teacher_cache_dir, and the teacher with --teacher_model_name_or_path; or have "
        "the teacher asked for what is missing, and keep this one (--teacher_cache_miss live)."
    )
