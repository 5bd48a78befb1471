"""The table of `hf-compress cache estimate`: selections down, number formats across, bytes on disk in the cells."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from hf_compress.arguments import CompressionArguments
from hf_compress.cache.codec_name import CodecName
from hf_compress.cache.estimate import Estimate, TeacherSizes, estimate, logits_bytes
from hf_compress.cache.predictions import TopK
from hf_compress.cache.price import free_bytes, readable
from hf_compress.cache.selection import Selection
from hf_compress.errors import ArgumentError, LossError, TeacherError
from hf_compress.losses.logits import LogitsLoss
from hf_compress.losses.recipes import DEFAULT_RECIPE, losses_of
from hf_compress.signals import SignalSpec
from hf_compress.task import ModelShape
from hf_compress.teacher_identity import logits_shapes, stack_sizes
from hf_compress.teacher_side import with_selection
from hf_compress.without_weights import model_without_weights

# bfloat16 takes what float16 takes.
_CODECS: tuple[CodecName, ...] = ("float32", "float16", "int8")
_COMPARED = ("1l_10t_0.1h", "1l")


@dataclass(frozen=True)
class Question:
    """What is to be estimated.

    Attributes:
        flags: the teacher, the recipe, the selection, the number format, and the folder where it would go.
        num_examples: different ones.
        tokens: real tokens of each.
        num_layers: the student's depth; None for that of `student`, or of the layer map's pairs, or else the teacher's.
        student: a folder or name with the student's config.
    """

    flags: CompressionArguments
    num_examples: int
    tokens: int
    num_layers: int | None = None
    student: str | None = None


@dataclass(frozen=True)
class _Row:
    """A line of the table."""

    name: str
    spec: SignalSpec
    selection: Selection


def estimate_page(question: Question) -> str:
    """The table, what was asked, and the free disk.

    Raises:
        TeacherError: if the teacher's config cannot be read, or such a teacher is not stored on disk.
        CompressionError: of the kind that fits, if recipe, selection and models do not go together.
    """
    flags, tokens = question.flags, question.tokens
    assert flags.teacher_model_name_or_path is not None
    model = model_without_weights(flags.teacher_model_name_or_path)
    teacher = ModelShape.of(model)
    if len(teacher.stacks) != 1:
        raise TeacherError(f"The teacher has several stacks of layers ({', '.join(teacher.stacks)}), and is not stored on disk yet.")
    student, whose = _student(question, teacher)
    logits = logits_shapes(model) if _predicts(teacher) else {}
    sizes = TeacherSizes(stack_sizes(teacher), logits, teacher.shows_attention_scores, _top(flags, logits))

    def price(row: _Row, codec: CodecName) -> Estimate:
        return estimate(row.spec, row.selection, codec, sizes, tokens)

    rows, asked = _rows(flags, student, teacher)
    rows.sort(key=lambda row: price(row, flags.codec).each)
    (stack,) = teacher.stacks.values()
    lines = [
        f"teacher    {flags.teacher_model_name_or_path} ({teacher.name}, {stack.num_layers} layers x {stack.hidden_size})",
        f"student    {', '.join(f'{size.num_layers} layers' for size in student.stacks.values())}{whose}",
        f"data       {question.num_examples:,} examples of {tokens} tokens",
        "",
        *_table(rows, lambda row, codec: price(row, codec).total(question.num_examples), lambda row: price(row, flags.codec).each),
        "",
        f"Bytes an example are as {flags.codec}; bfloat16 takes what float16 takes.",
    ]
    if teacher.kind in ("causal_lm", "masked_lm"):
        kept = "whole logits" if sizes.top is None else sizes.top.describe()
        lines.append(f"Of them the logits are {logits_bytes(flags.codec, sizes):,} bytes a token: {kept}.")
    total = price(asked, flags.codec).total(question.num_examples)
    lines.append(f"{asked.name}, that is {asked.selection.describe()}, as {flags.codec}: {readable(total)}")
    if flags.teacher_cache_dir is not None:
        free = free_bytes(Path(flags.teacher_cache_dir))
        lines.append(f"free in {flags.teacher_cache_dir}: {readable(free)}" + ("" if free > total else ", too little"))
    return "\n".join(lines)


def _top(flags: CompressionArguments, logits: Mapping[str, tuple[int, ...]]) -> TopK | None:
    """How much of a language model's logits would be stored."""
    k = flags.teacher_cache_logits_top_k
    if k is None:
        return None
    shape = logits.get("logits", ())
    if len(shape) != 2:
        raise ArgumentError(f"--teacher_cache_logits_top_k {k} is about a language model's logits, and the teacher has none.")
    losses = losses_of(flags.recipe or DEFAULT_RECIPE, weights=flags.weights)
    return TopK.asked_for(k, shape[-1], {float(loss.temperature) for loss in losses if isinstance(loss, LogitsLoss)})


def _rows(flags: CompressionArguments, student: ModelShape, teacher: ModelShape) -> tuple[list[_Row], _Row]:
    """The lines, and the one that was asked for."""
    wanted = flags.selection
    rows = [_Row("logits only", SignalSpec(logits=True), Selection.everything())] if _predicts(teacher) else []
    for text in _COMPARED:
        # Where attention cannot be seen, tokens cannot be ranked by it.
        blind = "t" in text and not teacher.shows_attention_scores
        selection = Selection.parse(text, length="left_first" if blind else None)
        try:
            spec = _asked_for(flags, selection, student, teacher)
        except LossError:
            continue  # the recipe takes no part of the hidden states
        if spec.hidden_states and selection != wanted:
            rows.append(_Row(text, spec, selection))
    everything = f"all of the recipe {flags.recipe or DEFAULT_RECIPE}"
    rows.append(_Row(everything, _asked_for(flags, None, student, teacher), Selection.everything()))
    if wanted is not None:
        rows.append(_Row(f"--hsk {wanted}", _asked_for(flags, wanted, student, teacher), wanted))
    return rows, rows[-1]


def _predicts(teacher: ModelShape) -> bool:
    """Whether it has a head: a bare language model, as general distillation has for its teacher, has none."""
    return teacher.kind != "other"


def _table(rows: Sequence[_Row], total: Callable[[_Row, CodecName], int], each: Callable[[_Row], int]) -> list[str]:
    width = max(len(row.name) for row in rows)
    lines = [f"{'':<{width}}  {'bytes an example':>16}  " + "  ".join(f"{codec:>9}" for codec in _CODECS)]
    for row in rows:
        cells = "  ".join(f"{readable(total(row, codec)):>9}" for codec in _CODECS)
        lines.append(f"{row.name:<{width}}  {each(row):>16,}  {cells}")
    return lines


def _asked_for(flags: CompressionArguments, selection: Selection | None, student: ModelShape, teacher: ModelShape) -> SignalSpec:
    """What the losses of the recipe would ask a teacher for."""
    losses = losses_of(flags.recipe or DEFAULT_RECIPE, layer_map=flags.layer_map, weights=flags.weights)
    if selection is not None:
        losses = with_selection(losses, selection, student, teacher)
    spec = SignalSpec()
    for loss in losses:
        for resolved in loss.resolve(student, teacher):
            spec |= resolved.teacher_spec()
    return spec


def _student(question: Question, teacher: ModelShape) -> tuple[ModelShape, str]:
    """The student's shape as far as it is told, and how it is known."""
    if question.student is not None:
        if question.num_layers is not None:
            raise ArgumentError("--num_layers and --model_name_or_path both tell the student's depth; give one of them.")
        # The script gives it the task's head, whatever it was saved with.
        return replace(ModelShape.of(model_without_weights(question.student)), kind=teacher.kind), ""
    pairs = question.flags.layer_map
    depth, whose = question.num_layers, ""
    if depth is None and pairs is not None and ":" in pairs:
        depth = max(1, *(int(pair.partition(":")[0]) for pair in pairs.split(",")))
    if depth is None:
        depth, whose = max(size.num_layers for size in teacher.stacks.values()), ", as deep as the teacher (--num_layers says otherwise)"
    if depth < 1:
        raise ArgumentError(f"--num_layers {depth}: a student has one layer at least.")
    return replace(teacher, stacks={name: replace(size, num_layers=depth) for name, size in teacher.stacks.items()}), whose
