"""`--teacher_cache_budget`: what a teacher on disk keeps, chosen for so many bytes, before it is built; see `cache.budget`."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from accelerate.utils import broadcast_object_list
from tqdm.auto import tqdm

from hf_compress.arguments import CompressionArguments
from hf_compress.cache.budget import CODECS, Asked, Choices, Possible, choose, depths_of, possible_tokens, possible_widths
from hf_compress.cache.build import BATCH_TOKENS, CPU_BATCH_TOKENS
from hf_compress.cache.codec_name import CodecName
from hf_compress.cache.distortion import Distortion
from hf_compress.cache.draft import begun
from hf_compress.cache.estimate import TeacherSizes
from hf_compress.cache.examples import Examples
from hf_compress.cache.file_sizes import FileSizes, Records
from hf_compress.cache.key import Integers, Keys
from hf_compress.cache.plan import Plan, make_plan
from hf_compress.cache.sampling import sample_of_teacher
from hf_compress.cache.selection import Selection
from hf_compress.cache.spaces import SAMPLE_EXAMPLES, sampled_tokens
from hf_compress.cache.teacher_rows import TeacherRun
from hf_compress.errors import ArgumentError, CompressionError, LossError
from hf_compress.signals import SignalSpec

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Kept:
    """What is stored.

    Attributes:
        selection, codec: of the hidden states.
        spec: all signals.
        record: what the manifest keeps of the choice.
    """

    selection: Selection
    codec: CodecName
    spec: SignalSpec
    record: dict[str, Any]


def kept_within_budget(
    flags: CompressionArguments,
    asked: Asked,
    run: TeacherRun,
    examples: Examples,
    teacher: TeacherSizes,
    accelerator: Any,
    *,
    progress: bool,
) -> Kept:
    """Choose what a run stores within `--teacher_cache_budget`; all processes choose the same.

    Args:
        flags: the run's.
        asked: what the losses ask for.
        run: the live teacher; its signals and selection do not count.
        examples: of the training data.
        teacher: its sizes.
        accelerator: the trainer's.
        progress: whether to show bars.

    Raises:
        ArgumentError: nothing fits.
        LossError: the losses cannot learn from part of the hidden states.
    """
    found: list[Any] = [None]
    if accelerator.process_index == 0:
        try:
            with torch.random.fork_rng(devices=[]):  # a data loader draws a seed, which is to be the student's
                found = [_kept(flags, asked, run, examples, teacher, progress)]
        except CompressionError as error:
            found = [error]
    if accelerator.num_processes > 1:
        broadcast_object_list(found, from_process=0)
    if isinstance(found[0], CompressionError):
        raise found[0]
    return cast(Kept, found[0])


def _kept(flags: CompressionArguments, asked: Asked, run: TeacherRun, examples: Examples, teacher: TeacherSizes, progress: bool) -> Kept:
    budget = flags.cache_budget
    assert budget is not None and flags.teacher_cache_dir is not None
    codecs = (flags.codec,) if flags.teacher_cache_dtype is not None else CODECS
    earlier = begun(Path(flags.teacher_cache_dir))
    if earlier is not None and earlier.distillation.get("budget", {}).get("bytes") == budget and earlier.codec in codecs:
        selection = earlier.selection
        logger.info("--teacher_cache_budget: going on with what was chosen when the build began, --hsk %s", selection.describe())
        return Kept(selection, earlier.codec, asked(selection), earlier.distillation["budget"])
    choices = _chosen(budget, codecs, asked, run, examples, teacher, progress)
    for line in choices.lines():
        logger.info("%s", line)
    chosen = choices.best.chosen
    return Kept(chosen.selection, chosen.codec, chosen.spec, {"bytes": budget, "lost": round(chosen.lost, 6)})


def _chosen(
    budget: int,
    codecs: tuple[CodecName, ...],
    asked: Asked,
    run: TeacherRun,
    examples: Examples,
    teacher: TeacherSizes,
    progress: bool,
) -> Choices:
    everything = asked(Selection.everything())
    if not everything.hidden_states:
        raise ArgumentError(
            "--teacher_cache_budget chooses how much of the hidden states is kept, and no loss compares hidden states: leave it out, or "
            "take a recipe that does (layerwise, tinybert, mud)."
        )
    run = replace(run, spec=SignalSpec(hidden_states=everything.hidden_states), selection=Selection.everything())
    plan, choosable = _counted(run, examples, progress)
    drawn = plan.by_key[:SAMPLE_EXAMPLES]
    in_parts = _in_parts(asked)
    hidden = max(teacher.stacks[key.stack].hidden_size for key in everything.hidden_states)
    possible = Possible(
        depths=depths_of(asked),
        tokens=possible_tokens(int(choosable.max())) if in_parts else (None,),
        length="attention_no_sep" if run.ranks else "left_first",
        widths=possible_widths(hidden) if in_parts else (),
        codecs=codecs,
        learnt_on=sampled_tokens(plan.lengths[drawn], choosable[drawn]),
    )
    sizes = FileSizes(Records(plan.lengths, choosable, plan.batches, planned=True), teacher)

    def measure() -> Distortion:
        logger.info("measuring what is lost of the hidden states, on some of the examples")
        return Distortion(sample_of_teacher(run, examples, plan), possible.dimensions(hidden), codecs)

    return choose(budget, possible, sizes, measure)


def _in_parts(asked: Asked) -> bool:
    """Whether the losses can learn from part of a layer: cosines and summary tokens are of whole states."""
    try:
        asked(Selection(tokens=1, length="left_first"))
    except LossError:
        return False
    return True


def _counted(run: TeacherRun, examples: Examples, progress: bool) -> tuple[Plan, Integers]:
    """The plan of a build, its shards aside; and from how many tokens of each example attention_no_sep chooses, in the plan's order."""
    keys: list[Keys] = []
    lengths: list[Integers] = []
    choosable: list[Integers] = []
    with tqdm(total=len(examples), desc="reading the examples", unit="ex", disable=not progress) as bar:
        for batch in examples.scan():
            _, real, special = examples.padded(batch)
            keys.append(batch.keys())
            lengths.append(batch.lengths)
            left_out = run.only_special(real, special) if run.ranks else torch.zeros_like(real)
            choosable.append((real & ~left_out).sum(1).numpy().astype(np.int64))
            bar.update(len(batch))
    tokens = BATCH_TOKENS.get(run.device.type, CPU_BATCH_TOKENS)
    plan = make_plan(np.concatenate(keys), np.concatenate(lengths), batch_tokens=tokens, example_bytes=lambda length: 0.0)
    return plan, np.concatenate(choosable)[plan.order]
