"""Does this teacher fit this student? Asked before the first step, by name and not by luck."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from hf_compress.errors import TeacherError
from hf_compress.layers.stack import pretrained_model
from hf_compress.task import LABELLED_KINDS, kind_of

logger = logging.getLogger(__name__)


def check_vocabularies(student: nn.Module, teacher: nn.Module, student_tokenizer: Any, teacher_tokenizer: Any) -> None:
    """Both read the same ids, so both must mean the same tokens by them.

    Args:
        student, teacher: the models.
        student_tokenizer, teacher_tokenizer: compared word by word where both are known; else the sizes must do.

    Raises:
        TeacherError: naming the sizes, or the first id with two meanings.
    """
    if isinstance(student_tokenizer, PreTrainedTokenizerBase) and isinstance(teacher_tokenizer, PreTrainedTokenizerBase):
        ours, theirs = student_tokenizer.get_vocab(), teacher_tokenizer.get_vocab()
        if ours == theirs:
            return
        first = min(index for word, index in (ours.items() ^ theirs.items()))
        meanings = [next((word for word, index in vocabulary.items() if index == first), "nothing") for vocabulary in (ours, theirs)]
        raise TeacherError(
            f"Student and teacher have other vocabularies ({len(ours)} and {len(theirs)} tokens): "
            f"id {first} is {meanings[0]!r} to the student and {meanings[1]!r} to the teacher. "
            "Take a student that was made from this teacher, or a teacher with the student's tokenizer."
        )
    sizes = [getattr(pretrained_model(model).config.get_text_config(), "vocab_size", None) for model in (student, teacher)]
    if sizes[0] != sizes[1]:
        raise TeacherError(
            f"Student and teacher have other vocabularies: {sizes[0]} and {sizes[1]} tokens. The teacher would be fed the student's ids, "
            "which mean other words to it. Take a student that was made from this teacher, or a teacher with the student's tokenizer."
        )


def label_order(student: nn.Module, theirs: Sequence[str]) -> tuple[int, ...] | None:
    """How the teacher's logits are put into the student's order.

    Args:
        student: the student.
        theirs: the teacher's labels, see `labels_of`.

    Returns:
        For each of the student's labels the teacher's index; None where nothing has to move.

    Raises:
        TeacherError: if the two tell other labels apart.
    """
    if kind_of(student) not in LABELLED_KINDS:
        return None
    ours, theirs = labels_of(student), list(theirs)
    if len(ours) != len(theirs):
        raise TeacherError(
            f"The student tells {len(ours)} labels apart ({', '.join(ours)}), the teacher {len(theirs)} ({', '.join(theirs)}). "
            "Take a teacher that was fine-tuned on this task."
        )
    if ours == theirs:
        return None
    folded, teacher_folded = [name.lower() for name in ours], [name.lower() for name in theirs]
    if len(set(folded)) == len(folded) and set(folded) == set(teacher_folded):
        order = tuple(teacher_folded.index(name) for name in folded)
        if order != tuple(range(len(order))):
            logger.warning("The teacher's labels stand in another order (%s): its logits are put right by name.", ", ".join(theirs))
            return order
        return None
    if _made_up(folded) or _made_up(teacher_folded):
        logger.warning(
            "Labels could not be compared by name: the student has %s, the teacher %s. Their order is taken to be the same.",
            ", ".join(ours),
            ", ".join(theirs),
        )
        return None
    raise TeacherError(
        f"The student's labels are {', '.join(ours)}, the teacher's {', '.join(theirs)}: their predictions cannot be compared. "
        "Take a teacher that was fine-tuned on this task, or give both configs the same id2label."
    )


def labels_of(model: nn.Module) -> list[str]:
    """The names of what a model tells apart, in the order of its logits; made up where nobody gave any."""
    config = pretrained_model(model).config
    names: dict[Any, str] = dict(config.id2label or {})
    labels = [str(names[index]) for index in sorted(names)]
    # Scripts such as run_glue.py put the names they find into label2id alone.
    by_id = {int(index): str(name) for name, index in (config.label2id or {}).items()}
    if _made_up([label.lower() for label in labels]) and sorted(by_id) == list(range(len(labels))):
        labels = [by_id[index] for index in range(len(labels))]
    return labels


def _made_up(names: list[str]) -> bool:
    """Names that a config invents where nobody gave any: label_0, label_1; or bare numbers."""
    return all(name == f"label_{index}" or name == str(index) for index, name in enumerate(names))
