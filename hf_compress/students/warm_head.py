"""The head of a narrow student, fitted to its teacher's answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_compress.students.least_squares import Ridge
from hf_compress.students.replay import HELD_OUT, Sample, Side, run
from hf_compress.students.warm_parts import Head


def head_watch(head: Head | None) -> dict[str, tuple[str, Side]]:
    """What to note of a model's run, so that a head can be fitted to it."""
    watch: dict[str, tuple[str, Side]] = {}
    if head is not None and head.dense is not None:
        watch |= {"dense_in": (head.dense, "in"), "dense_out": (head.dense, "out")}
    if head is not None and head.answer is not None:
        watch |= {"answer_in": (head.answer, "in"), "answer_out": (head.answer, "out")}
    return watch


def fit_head(
    head: Head,
    teacher: PreTrainedModel,
    shown: Mapping[str, Sequence[Tensor]],
    student: PreTrainedModel,
    first_layer: nn.Module,
    sample: Sample,
) -> None:
    """Fit the head from the student's last hidden states to the teacher's answers.

    Args:
        head: where both keep it.
        teacher: says which neurons of its dense layer count most; those stay.
        shown: what `head_watch` noted of the teacher's run.
        student: all below its head is fitted already.
        first_layer: the student's.
        sample: what both read.
    """
    if head.dense is not None:
        wanted = _rows(shown["dense_out"], sample)
        fitted = _fitted_rows(wanted, sample)
        layer = _linear(student, head.dense)
        importance = wanted[fitted].var(0)
        if head.answer is not None:
            importance = importance * _linear(teacher, head.answer).weight.float().square().sum(0)
        kept = importance.argsort(descending=True, stable=True)[: layer.out_features].sort().values
        features = _rows(run(student, first_layer, sample, head_watch(head)).noted["dense_in"], sample)
        Ridge(features, fitted).fit(wanted[:, kept]).put_into(layer)
    if head.answer is not None:
        wanted = _rows(shown["answer_out"], sample)
        features = _rows(run(student, first_layer, sample, head_watch(head)).noted["answer_in"], sample)
        Ridge(features, _fitted_rows(wanted, sample)).fit(wanted).put_into(_linear(student, head.answer))


def _rows(noted: Sequence[Tensor], sample: Sample) -> Tensor:
    """(examples, width), or (tokens, width) where the head reads all tokens."""
    return sample.flat(noted) if noted[0].dim() == 3 else torch.cat(list(noted)).float()


def _fitted_rows(rows: Tensor, sample: Sample) -> Tensor:
    """(rows,) bool."""
    if len(rows) == len(sample.fitted):
        return sample.fitted
    return torch.arange(len(rows), device=rows.device) % HELD_OUT != HELD_OUT - 1


def _linear(model: nn.Module, path: str) -> nn.Linear:
    found = model.get_submodule(path)
    assert isinstance(found, nn.Linear)
    return found
