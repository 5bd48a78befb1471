"""Where nothing is distilled, DistillTrainer is transformers' Trainer; and what users pass to a Trainer reaches the right place."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, IterableDataset
from torch import Tensor, nn
from transformers import BertForTokenClassification, EarlyStoppingCallback, Trainer, TrainingArguments, default_data_collator

from hf_compress.arguments import CompressionArguments
from hf_compress.errors import ArgumentError, LossError
from hf_compress.layers.drop import drop_layers
from hf_compress.losses.attention_scores import AttentionScoresLoss
from hf_compress.losses.hidden_states import HiddenStatesLoss
from hf_compress.losses.labels import LabelsLoss
from hf_compress.losses.logits import LogitsLoss
from hf_compress.losses.reduction import Batch
from hf_compress.signals import HiddenState, Signals
from hf_compress.task import ModelShape, kind_of
from hf_compress.trainer import DistillTrainer
from hf_compress.training_arguments import DistillTrainingArguments
from tests.test_distill_tasks import CASES, data_for
from tests.tiny_models import tiny_model
from tests.tiny_runs import NARROW, arguments, every_loss, largest_difference, rows, student, teacher, weights


def close(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.allclose(a, b, atol=1e-7) for a, b in zip(one.parameters(), other.parameters(), strict=True))


# GPT-2's own loss counts one position too many over micro-batches, in transformers.
@pytest.mark.parametrize("case", [name for name in CASES if name != "gpt2"])
def test_labels_alone_train_as_the_plain_trainer_does(case: str, tmp_path: Path) -> None:
    architecture, head, config, kind_of_labels = CASES[case]
    models = [tiny_model(architecture, num_layers=2, head=head, seed=2, **config) for _ in range(2)]
    start = copy.deepcopy(models[0])
    data = data_for(models[0], **kind_of_labels)
    args = arguments(tmp_path, max_steps=3, per_device_train_batch_size=4, learning_rate=0.05)
    DistillTrainer(models[0], args, losses=[LabelsLoss()], train_dataset=data, compression=CompressionArguments(trim_padding=False)).train()
    Trainer(models[1], args, train_dataset=data).train()
    assert close(*models)
    assert not close(models[0], start)


def test_label_smoothing_and_a_loss_function_of_ones_own(tmp_path: Path) -> None:
    def half(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        return 0.5 * nn.functional.cross_entropy(outputs["logits"], labels, reduction="sum") / num_items_in_batch

    for extra, kwargs in (({"label_smoothing_factor": 0.2}, {}), ({}, {"compute_loss_func": half})):
        models = [student(), student()]
        args = arguments(tmp_path, max_steps=2, per_device_train_batch_size=8, **extra)
        DistillTrainer(models[0], args, losses=[LabelsLoss()], train_dataset=rows(), **kwargs).train()
        Trainer(models[1], args, train_dataset=rows(), **kwargs).train()
        assert close(*models)


def test_evaluating_in_between_changes_nothing(tmp_path: Path) -> None:
    runs = []
    for strategy in ("no", "steps"):
        torch.manual_seed(5)
        args = arguments(tmp_path / strategy, max_steps=3, eval_strategy=strategy, eval_steps=1)
        trainer = DistillTrainer(
            student(**NARROW),
            args,
            teacher=teacher(),
            losses=every_loss(),
            train_dataset=rows(),
            eval_dataset=rows(),
            compute_metrics=lambda prediction: {"accuracy": float(prediction.predictions.shape == (16, 2))},
        )
        trainer.train()
        runs.append(trainer)
    assert largest_difference(weights(runs[0]), weights(runs[1])) == 0.0
    assert [log["eval_accuracy"] for log in runs[1].state.log_history if "eval_accuracy" in log] == [1.0, 1.0, 1.0]
    assert runs[1].state.log_history[0]["teacher_accuracy"] == 1.0


def test_resuming_is_exact_with_momentum_schedule_and_dropout(tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "optim": "adamw_torch",
        "learning_rate": 1e-2,
        "lr_scheduler_type": "linear",
    }

    def run(name: str, resume: str | None = None, **more: Any) -> DistillTrainer:
        torch.manual_seed(5)
        model = student(hidden_dropout_prob=0.1, **NARROW)
        trainer = DistillTrainer(
            model, arguments(tmp_path / name, **settings, **more), teacher=teacher(), losses=every_loss(), train_dataset=rows()
        )
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    whole = run("whole", save_strategy="steps", save_steps=3)
    resumed = run("resumed", str(tmp_path / "whole" / "checkpoint-3"))
    assert largest_difference(weights(whole), weights(resumed)) < 1e-6
    for key in ("loss", "loss_logits", "loss_hidden_states"):
        steps = [[log[key] for log in trainer.state.log_history if key in log] for trainer in (whole, resumed)]
        assert steps[1] == pytest.approx(steps[0], rel=1e-4), key


def test_the_map_of_a_dropped_student_is_what_dropping_left(tmp_path: Path) -> None:
    model = tiny_model("bert", num_layers=4, seed=2)
    drop_layers(model, layers_to_drop=[3])
    trainer = DistillTrainer(
        model, arguments(tmp_path), teacher=teacher(), losses=[HiddenStatesLoss(), AttentionScoresLoss()], train_dataset=rows()
    )
    assert trainer.distillation is not None
    assert [str(loss.layer_map) for loss in trainer.distillation.losses] == ["1:1,2:2,3:4"] * 2


def test_each_stack_of_an_encoder_decoder_has_its_own_map(tmp_path: Path) -> None:
    pupil = tiny_model("bart", num_layers=2)
    guide = tiny_model("bart", encoder_layers=4, decoder_layers=6)
    trainer = DistillTrainer(
        pupil,
        arguments(tmp_path),
        teacher=guide,
        compression=CompressionArguments(distill_recipe="layerwise", distill_layer_map="top"),
        train_dataset=data_for(pupil),
    )
    assert trainer.distillation is not None
    maps = {(loss.name, loss.stack): str(loss.layer_map) for loss in trainer.distillation.losses if loss.name == "hidden_states"}
    assert maps == {("hidden_states", "encoder"): "1:3,2:4", ("hidden_states", "decoder"): "1:5,2:6"}


def test_nan_at_the_teachers_padding_reaches_no_gradient() -> None:
    shape = ModelShape.of(tiny_model("bert", num_layers=1))
    (loss,) = HiddenStatesLoss().resolve(shape, shape)
    ours = torch.randn(1, 3, 16, requires_grad=True)
    theirs = torch.randn(1, 3, 16)
    theirs[0, 2] = float("nan")
    batch = Batch("sequence_classification", 1, {"layers": torch.tensor([[True, True, False]])})
    value = loss(Signals(hidden_states={HiddenState("layers", 1): ours}), Signals(hidden_states={HiddenState("layers", 1): theirs}), batch)
    value.backward()
    assert ours.grad is not None and torch.isfinite(ours.grad).all() and ours.grad[0, :2].abs().sum() > 0.01


class OwnTokenClassifier(BertForTokenClassification):
    """A script's own model."""


def test_a_subclass_is_of_its_parents_kind() -> None:
    assert kind_of(OwnTokenClassifier(tiny_model("bert", head="token_classification").config)) == "token_classification"


def test_columns_that_the_trainer_does_not_remove(tmp_path: Path) -> None:
    seen: list[set[str]] = []
    model = tiny_model("distilbert", num_layers=2)
    model.register_forward_pre_hook(lambda module, args, kwargs: seen.append(set(kwargs)), with_kwargs=True)
    data = rows().add_column("token_type_ids", [[0] * 24] * 16)
    args = arguments(tmp_path, remove_unused_columns=False)
    DistillTrainer(model, args, teacher=teacher(), losses=[LogitsLoss()], train_dataset=data).train()
    assert seen == [{"input_ids", "attention_mask"}]


def test_settings_that_cannot_be_right_together(tmp_path: Path) -> None:
    def refuse(match: str, error: type[Exception] = ArgumentError, flags: dict[str, Any] | None = None, **more: Any) -> None:
        given: dict[str, Any] = {"teacher": teacher(), "losses": every_loss(), "train_dataset": rows(), **more}
        model = given.pop("model", None) or student(**NARROW)
        args = given.pop("args", None) or arguments(tmp_path, max_steps=-1)
        if flags is not None:
            given["compression"] = CompressionArguments(**flags)
        with pytest.raises(error, match=match):
            DistillTrainer(model, args, **given)

    phases = {"distill_phases": "intermediate=1,prediction=1"}
    model = student(**NARROW)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    refuse("does not hold the projections", model=model, optimizers=(sgd, None))
    refuse("builds an optimizer", flags=phases, model=model, optimizers=(sgd, None))
    refuse("max_steps would cut", flags=phases, args=arguments(tmp_path))
    refuse("EarlyStoppingCallback", flags=phases, callbacks=[EarlyStoppingCallback()])
    refuse("no effect: losses or teacher are given in Python", flags={"distill_recipe": "pkd"})
    refuse("distill_layer_map would have no effect", flags={"distill_recipe": "logits", "distill_layer_map": "top"}, losses=None)
    refuse("max_steps has to be specified", ValueError, train_dataset=IterableDataset.from_generator(lambda: iter(rows())))


class OwnStep(DistillTrainer):
    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        loss = model(**inputs)["loss"]
        loss.backward()
        return loss.detach()


@pytest.mark.parametrize("steps", [1, 3])
def test_a_training_step_of_ones_own_that_shadows_ours_is_noticed(steps: int, tmp_path: Path) -> None:
    trainer = OwnStep(student(), arguments(tmp_path, max_steps=steps), teacher=teacher(), losses=[LogitsLoss()], train_dataset=rows())
    with pytest.raises(LossError, match="computes a loss of its own"):
        trainer.train()


def test_positional_arguments_are_taken_as_the_trainer_takes_them(tmp_path: Path) -> None:
    trainer = DistillTrainer(student(), arguments(tmp_path), default_data_collator, rows(), rows(), losses=[LabelsLoss()])
    assert len(trainer.eval_dataset) == len(trainer.train_dataset) == 16


def test_a_script_with_flags_of_its_own_and_bound_ones(tmp_path: Path) -> None:
    class Bound(DistillTrainer):
        compression = CompressionArguments(layer_drop_strategy="top", num_layers_to_drop=1)

    settings = {"output_dir": str(tmp_path), "use_cpu": True, "report_to": []}
    trainer = Bound(tiny_model("bert"), DistillTrainingArguments(**settings), losses=[LabelsLoss()], train_dataset=rows())
    assert trainer.model.config.num_hidden_layers == 3
    with pytest.raises(ArgumentError, match="Run this script without"):
        Bound(tiny_model("bert"), DistillTrainingArguments(**settings, layer_drop_strategy="bottom"), losses=[LabelsLoss()])


def test_arguments_of_the_plain_kind_are_enough(tmp_path: Path) -> None:
    data = Dataset.from_list(list(rows()))
    args = TrainingArguments(str(tmp_path), max_steps=1, use_cpu=True, report_to=[], disable_tqdm=True, save_strategy="no")
    assert DistillTrainer(student(), args, losses=[LabelsLoss()], train_dataset=data).train().global_step == 1
