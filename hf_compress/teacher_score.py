"""What the teacher itself scores: the line that a student is measured against."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import EvalPrediction

from hf_compress.layers.stack import pretrained_model
from hf_compress.signals import SignalSource, SignalSpec
from hf_compress.task import LABELLED_KINDS, Kind, kind_of
from hf_compress.task_loss import with_decoder_inputs

logger = logging.getLogger(__name__)

# What a Trainer gives to a script's metrics where it has no gaps: the same number that transformers puts there.
_PADDING = -100


def can_be_scored(trainer: Any, kind: Kind) -> bool:
    """Whether a script's metrics read no more than logits and labels, all together, so that they can be asked about a teacher.

    Language models only where the script makes its predictions small first (`preprocess_logits_for_metrics`). Question answering wants
    texts, and encoder-decoders generate.
    """
    args = trainer.args
    if trainer.compute_metrics is None or args.batch_eval_metrics or not args.eval_do_concat_batches or args.include_for_metrics:
        return False
    if kind in ("masked_lm", "causal_lm"):
        return trainer.preprocess_logits_for_metrics is not None
    return kind in ("sequence_classification", "token_classification", "multiple_choice")


def teacher_score(
    teacher: SignalSource,
    batches: Iterable[Mapping[str, Any]],
    compute_metrics: Callable[[EvalPrediction], Mapping[str, Any]],
    accelerator: Any,
    label_names: Sequence[str],
    preprocess: Callable[[Tensor, Tensor], Any] | None = None,
) -> dict[str, float]:
    """Run the teacher over the evaluation data.

    Args:
        teacher: the teacher, its labels in the student's order.
        batches: the evaluation data loader.
        compute_metrics: the script's own.
        accelerator: gathers over processes.
        label_names: the columns that hold labels.
        preprocess: the script's own `preprocess_logits_for_metrics`.

    Returns:
        `teacher_accuracy` and so on; empty where the data has no labels, or the task's predictions are more than logits. Batches of other
        lengths are padded with -100, as a Trainer does it.
    """
    predictions: list[np.ndarray[Any, Any]] = []
    references: list[np.ndarray[Any, Any]] = []
    for batch in _without_drawing(batches):
        logits: Any = teacher.signals(batch, SignalSpec(logits=True)).logits.get("logits")
        labels = next((batch[name] for name in ("labels", *label_names) if isinstance(batch.get(name), Tensor)), None)
        if logits is None or labels is None:
            return {}
        shown: Any = logits if preprocess is None else preprocess(logits, labels)
        if not isinstance(shown, Tensor):
            return {}
        logits, labels = accelerator.pad_across_processes((shown, labels), dim=1, pad_index=_PADDING)
        logits, labels = accelerator.gather_for_metrics((logits, labels))
        predictions.append(logits.float().cpu().numpy())
        references.append(labels.cpu().numpy())
    if not predictions:
        return {}
    scores = compute_metrics(EvalPrediction(predictions=_joined(predictions), label_ids=_joined(references)))
    return {f"teacher_{name}": float(value) for name, value in scores.items() if isinstance(value, (int, float))}


def _joined(parts: Sequence[np.ndarray[Any, Any]]) -> np.ndarray[Any, Any]:
    """(examples, ...) of all batches, their second axis as long as the longest."""
    if parts[0].ndim == 1:
        return np.concatenate(parts)
    width = max(part.shape[1] for part in parts)
    gaps = [[(0, 0), (0, width - part.shape[1]), *[(0, 0)] * (part.ndim - 2)] for part in parts]
    return np.concatenate([np.pad(part, gap, constant_values=_PADDING) for part, gap in zip(parts, gaps, strict=True)])


def _without_drawing(batches: Iterable[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    """The batches, with torch's random state put back after them: a run that does not ask the teacher draws the same dropout."""
    before = torch.random.get_rng_state()
    try:
        yield from batches
    finally:
        torch.random.set_rng_state(before)


def say_score(scores: Mapping[str, float], num_labels: int | None, number: int | None = None) -> None:
    """Log the score, and warn of a teacher that is right less often than chance.

    Args:
        scores: see `teacher_score`.
        num_labels: of the task; None where chance is not known.
        number: of the teacher, where there are several.
    """
    teacher = "The teacher" if number is None else f"Teacher {number}"
    accuracy = min((value for name, value in scores.items() if name.endswith("_accuracy")), default=1.0)
    if num_labels is not None and accuracy < 1 / max(2, num_labels):
        logger.warning(
            "%s is right in %.1f%% of the cases, less than chance: its labels may stand in another order than the data's. "
            "Look at id2label in both configs.",
            teacher,
            100 * accuracy,
        )
    if scores:
        logger.info("%s's own score: %s", teacher, ", ".join(f"{name} {value:.4g}" for name, value in scores.items()))


def score_for_run(trainer: Any, teacher: SignalSource, number: int | None = None) -> dict[str, float]:
    """What the teacher scores on a trainer's evaluation data, by its metrics; the main process says it.

    Args:
        trainer: whose student, data, metrics and processes these are.
        teacher: as for `teacher_score`.
        number: of the teacher, where there are several.

    Returns:
        `teacher_accuracy` and so on, `teacher_NAME_accuracy` of several evaluation sets; empty where a script's metrics want more than
        logits, or nothing is evaluated.
    """
    student = trainer.model
    kind = kind_of(student)
    if trainer.eval_dataset is None or not can_be_scored(trainer, kind):
        return {}
    scores: dict[str, float] = {}
    for name in trainer.eval_dataset if isinstance(trainer.eval_dataset, dict) else [None]:
        batches = (with_decoder_inputs(student, batch) for batch in trainer.get_eval_dataloader(name))
        preprocess = trainer.preprocess_logits_for_metrics
        found = teacher_score(teacher, batches, trainer.compute_metrics, trainer.accelerator, trainer.label_names, preprocess)
        scores |= found if name is None else {key.replace("teacher_", f"teacher_{name}_", 1): value for key, value in found.items()}
    if trainer.is_world_process_zero():
        say_score(scores, pretrained_model(student).config.num_labels if kind in LABELLED_KINDS else None, number)
    return scores
