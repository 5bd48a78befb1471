"""The two lines that a script changes: either both, or an error; and what the flags then do without a teacher."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers.trainer
from transformers import BertForSequenceClassification, Seq2SeqTrainer, Trainer, TrainingArguments

from hf_compress.arguments import CompressionArguments
from hf_compress.callbacks import LayerDropCallback, UnusedFlagsCallback
from hf_compress.errors import ArgumentError, LayerDropError, TeacherError
from hf_compress.layers.record import recorded_drop
from hf_compress.losses.logits import LogitsLoss
from hf_compress.trainer import DistillTrainer
from hf_compress.training_arguments import DistillTrainingArguments, Seq2SeqDistillTrainingArguments
from tests.tiny_models import tiny_model
from tests.tiny_runs import rows, teacher


@pytest.fixture(autouse=True)
def default_callbacks_as_they_were() -> Iterator[None]:
    callbacks = list(transformers.trainer.DEFAULT_CALLBACKS)
    yield
    transformers.trainer.DEFAULT_CALLBACKS[:] = callbacks


def settings(folder: Path, **more: Any) -> dict[str, Any]:
    usual = {"output_dir": str(folder), "max_steps": 2, "per_device_train_batch_size": 8, "logging_steps": 1, "save_strategy": "no"}
    return {**usual, "report_to": [], "use_cpu": True, "disable_tqdm": True, "seed": 7, **more}


def flags(folder: Path, **more: Any) -> DistillTrainingArguments:
    return DistillTrainingArguments(**settings(folder, **more))


def student() -> Any:
    return tiny_model("bert", num_layers=4)


TOP = {"layer_drop_strategy": "top", "num_layers_to_drop": 2}


def test_flags_in_a_plain_trainers_arguments_are_refused(tmp_path: Path) -> None:
    args = flags(tmp_path, **TOP)
    with pytest.raises(ArgumentError, match=r"--layer_drop_strategy, --num_layers_to_drop.*DistillTrainer in place of Trainer"):
        Trainer(student(), args, train_dataset=rows())
    with pytest.raises(ArgumentError, match="--teacher_model_name_or_path"):
        Trainer(student(), flags(tmp_path, teacher_model_name_or_path="x"), train_dataset=rows())
    seq2seq = Seq2SeqDistillTrainingArguments(**settings(tmp_path, distill_recipe="logits"))
    with pytest.raises(ArgumentError, match="--distill_recipe"):
        Seq2SeqTrainer(tiny_model("t5"), seq2seq)
    assert transformers.trainer.DEFAULT_CALLBACKS.count(UnusedFlagsCallback) == 1  # type: ignore[comparison-overlap]


def test_no_flags_no_refusal(tmp_path: Path) -> None:
    flags(tmp_path, **TOP)  # so that the look-out is there
    Trainer(student(), flags(tmp_path), train_dataset=rows())
    Trainer(student(), flags(tmp_path, trim_padding=False), train_dataset=rows())
    Trainer(student(), TrainingArguments(**settings(tmp_path)), train_dataset=rows())


def test_a_plain_trainer_with_the_callback_takes_the_flags_it_knows(tmp_path: Path) -> None:
    args = flags(tmp_path, **TOP)
    trainer = Trainer(student(), args, train_dataset=rows(), callbacks=[LayerDropCallback.from_arguments(args)])
    assert trainer.model.config.num_hidden_layers == 2
    both = flags(tmp_path, **TOP, distill_recipe="logits")
    with pytest.raises(ArgumentError, match=r"hold --distill_recipe, and"):
        Trainer(student(), both, train_dataset=rows(), callbacks=[LayerDropCallback.from_arguments(both)])


def test_distill_trainer_takes_the_flags(tmp_path: Path) -> None:
    args = flags(tmp_path, **TOP, distill_temperature=3.0)
    trainer = DistillTrainer(student(), args, teacher=teacher(), train_dataset=rows())
    assert trainer.distillation is not None
    Trainer(student(), args)  # for one more evaluation, say: the flags were taken


def test_flags_in_two_places(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="compression= says --freeze_embeddings, and args says --layer_drop_strategy"):
        DistillTrainer(student(), flags(tmp_path, **TOP), compression=CompressionArguments(freeze_embeddings=True))


def test_without_distillation_it_is_trainer_and_layer_dropping(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    plain = Trainer(student(), TrainingArguments(**settings(tmp_path / "a")), train_dataset=rows())
    plain.train()
    torch.manual_seed(0)
    with caplog.at_level(logging.INFO, logger="hf_compress"):
        ours = DistillTrainer(student(), flags(tmp_path / "b"), train_dataset=rows(), eval_dataset=rows())
        assert "labels alone" not in caplog.text
        ours.train()
    assert caplog.text.count("training on the labels alone") == 1
    assert [entry.get("loss") for entry in ours.state.log_history] == [entry.get("loss") for entry in plain.state.log_history]
    assert all(torch.equal(one, other) for one, other in zip(plain.model.parameters(), ours.model.parameters(), strict=True))
    assert "eval_loss" in ours.evaluate()
    dropped = DistillTrainer(student(), flags(tmp_path / "c", **TOP), train_dataset=rows())
    dropped.train()
    dropped.save_model(str(tmp_path / "saved"))
    assert recorded_drop(BertForSequenceClassification.from_pretrained(tmp_path / "saved").config) is not None


def test_where_a_teacher_is_meant_it_stays_an_error(tmp_path: Path) -> None:
    with pytest.raises(TeacherError, match="no teacher"):
        DistillTrainer(student(), TrainingArguments(**settings(tmp_path)), train_dataset=rows())
    with pytest.raises(TeacherError, match="no teacher"):
        DistillTrainer(student(), flags(tmp_path, distill_temperature=2.0), train_dataset=rows())
    with pytest.raises(TeacherError, match="logits compare with a teacher"):
        DistillTrainer(student(), flags(tmp_path), losses=[LogitsLoss()], train_dataset=rows())


@pytest.mark.parametrize("name", ["Trainer", "Seq2SeqDistillTrainer", "mine:Mine"])
def test_a_script_that_takes_one_trainer_cannot_take_another(tmp_path: Path, name: str) -> None:
    with pytest.raises(ArgumentError, match=f"--trainer_class {name} would have no effect: this script takes DistillTrainer"):
        DistillTrainer(student(), flags(tmp_path, trainer_class=name), train_dataset=rows())


def test_the_class_that_a_script_takes_may_be_named(tmp_path: Path) -> None:
    DistillTrainer(student(), flags(tmp_path, trainer_class="DistillTrainer"), train_dataset=rows())


@pytest.mark.parametrize("resume", ["path", "newest"])
@pytest.mark.parametrize(
    ("again", "words"),
    [
        ({}, r"kept layers 1-2 of 4, and the model of this run has lost no layers.*num_layers_to_drop=2, strategy=top"),
        ({"layers_to_drop": "1"}, r"kept layers 1-2 of 4, and the model of this run kept layers 2-4 of 4"),
    ],
)
@pytest.mark.parametrize("distil", [True, False])
def test_resuming_with_other_layers_is_refused(tmp_path: Path, distil: bool, again: dict[str, Any], words: str, resume: str) -> None:
    given: dict[str, Any] = {"teacher": teacher(), "losses": [LogitsLoss()]} if distil else {}
    saving = {"save_strategy": "steps", "save_steps": 1}
    DistillTrainer(student(), flags(tmp_path, **TOP, **saving), train_dataset=rows(), **given).train()
    trainer = DistillTrainer(student(), flags(tmp_path, **again), train_dataset=rows(), **given)
    with pytest.raises(LayerDropError, match=words):
        trainer.train(resume_from_checkpoint=True if resume == "newest" else str(tmp_path / "checkpoint-1"))
    same = DistillTrainer(student(), flags(tmp_path, **TOP), train_dataset=rows(), **given)
    assert same.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1")).global_step == 2
