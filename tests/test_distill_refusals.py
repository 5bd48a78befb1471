"""What a DistillTrainer refuses before it trains: no teacher, one that does not fit, data that tells too little; labels' order."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

from hf_compress.errors import ArgumentError, DataError, TeacherError
from hf_compress.losses.hidden_states import HiddenStatesLoss
from hf_compress.losses.logits import LogitsLoss
from hf_compress.teacher_checks import label_order, labels_of
from hf_compress.trainer import DistillTrainer
from tests.tiny_models import tiny_model
from tests.tiny_runs import arguments, rows, student, teacher


def refused(tmp_path: Path, error: type[Exception], match: str, **more: Any) -> None:
    given: dict[str, Any] = {"teacher": teacher(), "losses": [LogitsLoss()], "train_dataset": rows(), **more}
    model = given.pop("model", None) or student()
    with pytest.raises(error, match=match):
        DistillTrainer(model, given.pop("args", None) or arguments(tmp_path), **given)
    assert not list(tmp_path.iterdir())


def test_no_teacher(tmp_path: Path) -> None:
    refused(tmp_path, TeacherError, "no teacher: give --teacher_model_name_or_path", teacher=None, losses=None)
    refused(tmp_path, TeacherError, "logits compare with a teacher", teacher=None)


def test_a_teacher_that_is_not_there(tmp_path: Path) -> None:
    refused(tmp_path, TeacherError, "cannot be loaded. It is neither a folder", teacher="no-such-teacher")


def test_a_teacher_without_a_trained_head(tmp_path: Path) -> None:
    folder = tmp_path.parent / f"{tmp_path.name}-headless"
    tiny_model("bert", head="masked_lm").save_pretrained(folder)
    refused(tmp_path, TeacherError, "no trained head: .*classifier.* would be newly initialised", teacher=str(folder))


def test_a_teacher_with_another_vocabulary(tmp_path: Path) -> None:
    refused(tmp_path, TeacherError, "other vocabularies: 50 and 60 tokens", teacher=tiny_model("bert", vocab_size=60))


def named(names: list[str]) -> dict[str, Any]:
    return {"id2label": dict(enumerate(names)), "label2id": {name: index for index, name in enumerate(names)}}


def test_a_teacher_with_other_labels(tmp_path: Path) -> None:
    refused(tmp_path, TeacherError, "tells 2 labels apart .* the teacher 3", teacher=tiny_model("bert", num_labels=3))
    other = tiny_model("bert", **named(["cat", "dog"]))
    refused(
        tmp_path, TeacherError, "student's labels are yes, no, the teacher's cat, dog", teacher=other, model=student(**named(["yes", "no"]))
    )


def test_labels_in_another_order_are_put_right(tmp_path: Path) -> None:
    guide = tiny_model("bert", seed=4, **named(["A", "B", "C"]))
    data = Dataset.from_list([{**row, "label": 0} for row in rows()])
    shuffled = tiny_model("bert", seed=4, **named(["C", "A", "B"]))
    with torch.no_grad():
        order = torch.tensor([2, 0, 1])
        shuffled.classifier.weight.copy_(guide.classifier.weight[order])
        shuffled.classifier.bias.copy_(guide.classifier.bias[order])
    losses = []
    for number, model in enumerate((guide, shuffled)):
        trainer = DistillTrainer(
            student(**named(["a", "b", "c"])), arguments(tmp_path / str(number)), teacher=model, losses=[LogitsLoss()], train_dataset=data
        )
        trainer.train()
        losses.append(trainer.state.log_history[0]["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert losses[0] > 1e-4


def test_names_that_stand_in_label2id_alone_count() -> None:
    pupil, guide = student(), tiny_model("bert", **named(["no", "yes"]))
    pupil.config.label2id = {"yes": 0, "no": 1}  # as run_glue.py leaves it: id2label still says LABEL_0, LABEL_1
    assert pupil.config.id2label == {0: "LABEL_0", 1: "LABEL_1"}
    assert label_order(pupil, labels_of(guide)) == (1, 0)


def test_student_and_teacher_must_be_two_models(tmp_path: Path) -> None:
    model = student()
    refused(tmp_path, TeacherError, "same model object", model=model, teacher=model)


def test_empty_and_endless_data(tmp_path: Path) -> None:
    refused(tmp_path, DataError, "training data set is empty", train_dataset=rows().select([]))


def test_reentrant_checkpointing(tmp_path: Path) -> None:
    args = arguments(tmp_path, gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": True})
    refused(tmp_path, ArgumentError, "use_reentrant", args=args)
    model = student()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})  # without the Trainer's knowledge
    refused(tmp_path, ArgumentError, "use_reentrant=True, which hides the hidden states' gradients", model=model)


def test_batches_that_cannot_be_told_from_padding(tmp_path: Path) -> None:
    data = rows().remove_columns("attention_mask")
    model = tiny_model("bert", num_layers=2, pad_token_id=None)
    trainer = DistillTrainer(model, arguments(tmp_path), teacher=teacher(), losses=[HiddenStatesLoss()], train_dataset=data)
    with pytest.raises(DataError, match="no attention_mask"):
        trainer.train()
