"""A teacher's head is of the student's kind: heads of two kinds may have weights of the same names and sizes, and mean different things."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
from transformers import BertForMultipleChoice, BertModel

from hf_compress.errors import ArgumentError, LossError, TeacherError
from hf_compress.losses.hidden_states import HiddenStatesLoss
from hf_compress.losses.logits import LogitsLoss
from hf_compress.teacher import load_teacher
from hf_compress.trainer import DistillTrainer
from hf_compress.trainer_seq2seq import Seq2SeqDistillTrainer
from tests.tiny_models import tiny_model
from tests.tiny_runs import arguments, rows, teacher

# What was saved, what the student is for, and what is said.
WRONG: dict[str, tuple[str, dict[str, Any], Any, str]] = {
    "one_number_is_no_choice": ("sequence_classification", {"num_labels": 1}, "multiple_choice", "for sequence classification"),
    "a_choice_is_no_number": ("multiple_choice", {}, "sequence_classification", "for multiple choice"),
    "a_text_is_no_token": ("sequence_classification", {"num_labels": 3}, "token_classification", "for sequence classification"),
    "classes_are_no_choice": ("sequence_classification", {"num_labels": 3}, "multiple_choice", "for sequence classification"),
    "one_that_sees_what_comes": ("masked_lm", {}, "causal_lm", "is a BertForMaskedLM: its head is for masked lm"),
}


@pytest.mark.parametrize("case", WRONG)
def test_another_kind_of_head_is_refused(case: str, tmp_path: Path) -> None:
    head, config, kind, words = WRONG[case]
    tiny_model("bert", num_layers=2, head=head, **config).save_pretrained(tmp_path)
    with pytest.raises(TeacherError, match=f"{words}, and the student's for {kind.replace('_', ' ')}") as refused:
        load_teacher(str(tmp_path), kind)
    assert "\n" not in str(refused.value)


def test_the_students_kind_chooses_the_teachers_head(tmp_path: Path) -> None:
    tiny_model("bert", num_layers=2, head="multiple_choice").save_pretrained(tmp_path)
    assert isinstance(load_teacher(str(tmp_path), "multiple_choice"), BertForMultipleChoice)


def test_layers_may_be_learnt_from_a_teacher_of_another_task(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tiny_model("bert", num_layers=2, num_labels=3).save_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING, "hf_compress"):
        assert type(load_teacher(str(tmp_path), "multiple_choice", needs_logits=False)) is BertModel
    assert "Its layers teach alone" in caplog.text


def test_labels_that_exclude_each_other_are_not_compared_with_such_that_do_not(tmp_path: Path) -> None:
    several = tiny_model("bert", num_labels=3, problem_type="multi_label_classification")
    one = tiny_model("bert", num_labels=3, num_layers=2, problem_type="single_label_classification")
    data = rows().remove_columns("label").add_column("labels", [[1.0, 0.0, 1.0]] * 16)
    with pytest.raises(LossError, match="problem_type='single_label_classification', the teacher's 'multi_label_classification'"):
        DistillTrainer(one, arguments(tmp_path), teacher=several, losses=[LogitsLoss()], train_dataset=data)
    DistillTrainer(one, arguments(tmp_path), teacher=several, losses=[HiddenStatesLoss()], train_dataset=data)
    silent = tiny_model("bert", num_labels=3, num_layers=2)  # before it has seen labels a model says nothing: its teacher does
    trainer = DistillTrainer(silent, arguments(tmp_path), teacher=several, losses=[LogitsLoss()], train_dataset=data)
    assert trainer.distillation is not None
    assert [getattr(loss, "outputs", None) for loss in trainer.distillation.losses] == ["several_labels"]


def test_generation_has_arguments_of_its_own(tmp_path: Path) -> None:
    student = tiny_model("t5", num_layers=2)
    with pytest.raises(ArgumentError, match="needs Seq2SeqTrainingArguments, and was given TrainingArguments"):
        Seq2SeqDistillTrainer(student, arguments(tmp_path), teacher=teacher(), losses=[LogitsLoss()], train_dataset=rows())
