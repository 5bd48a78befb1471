"""Building the teacher on disk for a run: from a trainer's data, collator and live teacher to a finished cache."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object
from torch import nn

from hf_compress import __version__
from hf_compress.arguments import CompressionArguments
from hf_compress.cache.build import CacheBuilder, CacheContents, Processes
from hf_compress.cache.examples import Examples
from hf_compress.cache.manifest import Manifest
from hf_compress.cache.reader import TeacherCache
from hf_compress.cache.selection import Selection
from hf_compress.cache.teacher_rows import TeacherRun
from hf_compress.errors import CacheError, TeacherError
from hf_compress.layers.stack import find_stacks
from hf_compress.signals import SignalSpec
from hf_compress.task import ModelShape
from hf_compress.teacher import LiveTeacher
from hf_compress.teacher_identity import identity_of, logits_shapes, special_ids_of, tokenizer_hash

# How many examples of the data are looked up before training starts.
LOOKED_UP = 256


def examples_of(
    dataset: Any, collator: Callable[[list[Any]], Mapping[str, Any]], columns: frozenset[str], tokenizer: Any, num_workers: int
) -> Examples:
    """A trainer's training data as a teacher on disk sees it."""
    pad, eos = getattr(tokenizer, "pad_token_id", None), getattr(tokenizer, "eos_token_id", None)
    return Examples(dataset, collator, columns, special_ids_of(tokenizer), pad if pad != eos else None, num_workers)


def build_for_run(
    teacher: LiveTeacher,
    examples: Examples,
    spec: SignalSpec,
    flags: CompressionArguments,
    *,
    name: str,
    tokenizer: Any,
    accelerator: Any,
    distillation: Mapping[str, Any],
    scores: dict[str, float],
    progress: bool,
) -> Manifest:
    """Build what the losses of a run will ask for.

    Args:
        teacher: live, on its device, its labels in its own order.
        examples: of the training data.
        spec: all signals that any phase asks for.
        flags: the run's.
        name: of the teacher.
        tokenizer: of both.
        accelerator: the trainer's.
        distillation: what the manifest keeps of the flags.
        scores: the teacher's own.
        progress: whether to show bars.

    Raises:
        CacheError, TeacherError, DataError: see `CacheBuilder`.
    """
    assert flags.teacher_cache_dir is not None
    model: nn.Module = teacher.model
    stacks = find_stacks(model)
    if len(stacks) != 1:
        raise TeacherError(
            f"The teacher has several stacks of layers ({', '.join(stacks)}), and is not stored on disk yet. Distil from it live: leave "
            "--teacher_cache_dir out."
        )
    shape = ModelShape.of(model)
    selection = flags.selection or Selection.everything()
    mixed = getattr(accelerator, "mixed_precision", "no")
    run = TeacherRun(
        source=teacher,
        spec=spec,
        selection=selection,
        device=accelerator.device,
        forward_context=accelerator.autocast,
        ranks=shape.shows_attention_scores,
        summary_last=frozenset(stack for stack, found in stacks.items() if found.summary_token == "last"),
    )
    contents = CacheContents(
        teacher=identity_of(model, name, None if mixed == "no" else mixed, scores),
        tokenizer=tokenizer_hash(tokenizer),
        codec=flags.codec,
        distillation=distillation,
        sizes={stack: (size.hidden_size, size.num_attention_heads) for stack, size in shape.stacks.items()},
        logits=logits_shapes(model) if spec.logits else {},
        version=__version__,
    )
    processes = Processes(accelerator.process_index, accelerator.num_processes, gather_object, accelerator.wait_for_everyone)
    return CacheBuilder(Path(flags.teacher_cache_dir), examples, run, contents, processes=processes, progress=progress).build()


def refuse_missing_examples(cache: TeacherCache, examples: Examples) -> None:
    """Look some of the data up before the first step.

    Raises:
        CacheError: if the cache does not hold it, with the likely reason.
    """
    step = max(1, len(examples) // LOOKED_UP)
    looked_up = list(range(0, len(examples), step))
    found = [examples.canonical(looked_up[start : start + 64]) for start in range(0, len(looked_up), 64)]
    absent = sum(cache.missing(batch.keys()) for batch in found)
    if not absent:
        return
    if absent == len(looked_up):
        reason = "none of it: it is other data, or was tokenized in another way (another tokenizer, --max_seq_length, other columns)"
    else:
        reason = "only part of it: there are examples more than when the cache was built (--max_train_samples, augmentation)"
    raise CacheError(
        f"{absent} of {len(looked_up)} training examples that were looked up are not in the teacher on disk ({cache.folder}). It holds "
        f"{reason}. "
        "Build one of this data: name another folder with --teacher_cache_dir, and the teacher with --teacher_model_name_or_path."
    )
