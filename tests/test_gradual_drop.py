"""Layers that go while a Trainer trains: the weights, the optimizer's moments, checkpoints, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import nn
from transformers import BertForSequenceClassification, Trainer, TrainerCallback, TrainingArguments

from hf_compress.arguments import CompressionArguments
from hf_compress.bound_trainer import trainer_of
from hf_compress.cached_teacher import CachedTeacher
from hf_compress.callbacks import LayerDropCallback
from hf_compress.errors import ArgumentError, LayerDropError, LossError
from hf_compress.layers.layer_map import LayerMap
from hf_compress.layers.record import recorded_layers
from hf_compress.losses.hidden_states import HiddenStatesLoss
from hf_compress.losses.labels import LabelsLoss
from hf_compress.losses.logits import LogitsLoss
from hf_compress.trainer import DistillTrainer
from tests.tiny_models import tiny_model
from tests.tiny_runs import NARROW, largest_difference, rows, weights

ITERATIVE: dict[str, Any] = {"strategy": "symmetric", "num_layers_to_drop": 2, "every_n_epochs": 2}
FREEZING: dict[str, Any] = {"strategy": "top", "num_layers_to_drop": 2, "after_epochs": 2, "freeze_before_drop": True}


def arguments(folder: Path, **more: Any) -> TrainingArguments:
    settings: dict[str, Any] = {
        "num_train_epochs": 6,
        "per_device_train_batch_size": 8,
        "learning_rate": 0.01,
        "adam_epsilon": 1e-4,
        "max_grad_norm": 1e9,
        "weight_decay": 0.1,
        "save_strategy": "no",
        "logging_steps": 1,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 7,
    }
    return TrainingArguments(str(folder), **{**settings, **more})


def bert() -> Any:
    return tiny_model("bert", num_layers=4, seed=2)


def kept(model: Any) -> tuple[int, ...]:
    recorded = recorded_layers(model.config) or {}
    return recorded["layers"].kept


class Epochs(TrainerCallback):
    """What the model has when an epoch has begun."""

    def __init__(self) -> None:
        self.kept: list[tuple[int, ...]] = []
        self.frozen: list[set[str]] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.kept.append(kept(model))
        self.frozen.append({name for name, parameter in model.named_parameters() if not parameter.requires_grad})


def by_hand(model: Any, data: Dataset, gone: dict[int, list[int]], frozen: tuple[int, ...] = ()) -> Any:
    """Six steps on the whole data set, with an optimizer of its own for each parameter, so that none can disturb another's moments.

    gone: step -> the places, in the model as it is then, of the layers that go before it; frozen: layers that are not trained.
    """
    longest = max(map(len, data["input_ids"]))
    names = ("input_ids", "attention_mask")
    batch = {name: torch.tensor([row + [0] * (longest - len(row)) for row in data[name]]) for name in names}
    batch["labels"] = torch.tensor(data["label"])
    for layer in frozen:
        model.bert.encoder.layer[layer - 1].requires_grad_(False)
    decay = {p: 0.1 if "bias" not in name and "LayerNorm" not in name else 0.0 for name, p in model.named_parameters()}
    optimizers = {parameter: torch.optim.AdamW([parameter], eps=1e-4, weight_decay=decay[parameter]) for parameter in decay}
    model.train()
    for step in range(6):
        layers = list(enumerate(model.bert.encoder.layer, start=1))
        model.bert.encoder.layer = nn.ModuleList([layer for place, layer in layers if place not in gone.get(step, [])])
        model.zero_grad()
        model(**batch).loss.backward()
        for parameter in model.parameters():
            if parameter.requires_grad:
                optimizers[parameter].param_groups[0]["lr"] = 0.01 * (1 - step / 6)
                optimizers[parameter].step()
    return model


@pytest.mark.parametrize(
    ("drop", "gone", "frozen", "stages"),
    [
        (ITERATIVE, {2: [3], 4: [2]}, (), [(1, 2, 3, 4)] * 2 + [(1, 2, 4)] * 2 + [(1, 4)] * 2),
        (FREEZING, {2: [3, 4]}, (3, 4), [(1, 2, 3, 4)] * 2 + [(1, 2)] * 4),
    ],
    ids=["iterative", "freezing"],
)
def test_weights_moments_and_learning_rate_go_on(tmp_path: Path, drop: Any, gone: Any, frozen: Any, stages: Any) -> None:
    data, epochs, model = rows(), Epochs(), bert()
    args = arguments(tmp_path, per_device_train_batch_size=16)
    trainer = Trainer(model, args, train_dataset=data, callbacks=[LayerDropCallback(**drop), epochs])
    trainer.train()
    assert epochs.kept == stages
    assert {name.split(".")[3] for name in epochs.frozen[0]} == {str(layer - 1) for layer in frozen}
    assert epochs.frozen[-1] == set()
    apart = largest_difference(weights(trainer), dict(by_hand(bert(), data, gone, frozen).named_parameters()))
    assert apart < 1e-6
    held = {id(parameter) for group in trainer.optimizer.param_groups for parameter in group["params"]}
    assert held == {id(parameter) for parameter in model.parameters()}
    assert {id(parameter) for parameter in trainer.optimizer.optimizer.state} == held


def distilling(folder: Path, model: Any = None, **more: Any) -> DistillTrainer:
    losses = more.pop("losses", [LogitsLoss(), HiddenStatesLoss(), LabelsLoss(weight=0.5)])
    drop, flags = LayerDropCallback(**more.pop("drop", ITERATIVE)), more.pop("compression", None)
    callbacks = [drop, *more.pop("callbacks", ())]
    teacher = tiny_model("bert", num_layers=4, seed=1)
    args = arguments(folder, **more)
    return DistillTrainer(
        bert() if model is None else model,
        args,
        teacher=teacher,
        losses=losses,
        compression=flags,
        train_dataset=rows(),
        callbacks=callbacks,
    )


@pytest.mark.parametrize("drop", [ITERATIVE, FREEZING], ids=["iterative", "freezing"])
def test_a_resumed_run_goes_on_in_its_stage(tmp_path: Path, drop: Any) -> None:
    whole = distilling(tmp_path / "whole", drop=drop, save_strategy="steps", save_steps=1)
    whole.train()
    for step in (3, 4, 7):  # in the first stage, between two, in the second
        checkpoint, epochs = str(tmp_path / "whole" / f"checkpoint-{step}"), Epochs()
        resumed = distilling(tmp_path / "resumed", drop=drop, callbacks=[epochs])
        resumed.train(resume_from_checkpoint=checkpoint)
        assert resumed.state.global_step == 12 and len(epochs.kept) == 12 - step
        assert largest_difference(weights(resumed), weights(whole)) < 1e-6
        plain = arguments(tmp_path / "plain", resume_from_checkpoint=checkpoint)
        told = Trainer(bert(), plain, train_dataset=rows(), callbacks=[LayerDropCallback(**drop)])
        assert kept(told.model) == kept(BertForSequenceClassification.from_pretrained(checkpoint))


def test_checkpoints_are_whole_models_and_say_where_their_run_was(tmp_path: Path) -> None:
    trainer = Trainer(
        bert(),
        arguments(tmp_path, save_strategy="epoch", eval_strategy="epoch"),
        train_dataset=rows(),
        eval_dataset=rows(),
        callbacks=[LayerDropCallback(**ITERATIVE)],
    )
    trainer.train()
    for epoch, (layers, left) in enumerate([([1, 2, 3, 4], [3, 2]), ([1, 2, 4], [2]), ([1, 4], [])], start=1):
        folder = tmp_path / f"checkpoint-{4 * epoch}"
        entry = json.loads((folder / "config.json").read_text())["hf_compress"]["layer_drop"]["layers"]
        assert (entry["kept"], entry["num_layers"], entry.get("to_drop", [])) == (layers, 4, left)
        assert entry["request"] == ITERATIVE
        model = BertForSequenceClassification.from_pretrained(folder)
        # Evaluated with the flags of the training, or without any: as it is.
        evaluator = Trainer(model, arguments(tmp_path / "eval"), eval_dataset=rows(), callbacks=[LayerDropCallback(**ITERATIVE)])
        logged = [entry["eval_loss"] for entry in trainer.state.log_history if entry.get("epoch") == 2 * epoch and "eval_loss" in entry]
        assert evaluator.evaluate()["eval_loss"] == pytest.approx(logged[0], abs=1e-6)
        assert len(model.bert.encoder.layer) == len(layers)
    middle = BertForSequenceClassification.from_pretrained(tmp_path / "checkpoint-6")
    again = Trainer(middle, arguments(tmp_path / "again"), train_dataset=rows(), callbacks=[LayerDropCallback(**ITERATIVE)])
    with pytest.raises(LayerDropError, match=r"in the middle of its schedule \(layers 1-2 and 4 of 4\)"):
        again.train()
    (tmp_path / "checkpoint-6" / "optimizer.pt").unlink()  # with it torch itself would refuse, by its size
    unaware = Trainer(bert(), arguments(tmp_path / "more"), train_dataset=rows(), callbacks=[LayerDropCallback(**ITERATIVE)])
    with pytest.raises(LayerDropError, match=r"kept layers 1-2 and 4, and the model of this run has 1-4.*TrainingArguments\(resume_from"):
        unaware.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    other = distilling(tmp_path / "other", drop={**ITERATIVE, "every_n_epochs": 1})
    with pytest.raises(LayerDropError, match=r"every_n_epochs=2.*every_n_epochs=1"):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


@pytest.mark.parametrize("told", [False, True], ids=["by train", "by the arguments"])
def test_a_resumed_run_drops_what_the_first_one_measured(tmp_path: Path, told: bool) -> None:
    def made(folder: Path, examples: Any, **more: Any) -> DistillTrainer:
        drop = {"strategy": "contribution", "num_layers_to_drop": 2, "every_n_epochs": 2, "freeze_before_drop": True, "examples": examples}
        return distilling(folder, drop=drop, save_strategy="steps", save_steps=3, **more)

    made(tmp_path / "first", rows()).train()
    checkpoint = tmp_path / "first" / "checkpoint-3"
    config = json.loads((checkpoint / "config.json").read_text())
    entry = config["hf_compress"]["layer_drop"]["layers"]
    entry["to_drop"] = other = next([first, second] for first, second in ([1, 3], [2, 4]) if {first, second} != {*entry["to_drop"]})
    (checkpoint / "config.json").write_text(json.dumps(config))  # as if it had measured this
    (checkpoint / "optimizer.pt").unlink()
    epochs = Epochs()
    if told:  # no examples are needed then
        resumed = made(tmp_path / "resumed", None, callbacks=[epochs], resume_from_checkpoint=str(checkpoint))
    else:
        resumed = made(tmp_path / "resumed", rows(), callbacks=[epochs])
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert [set(range(1, 5)) - {*layers} for layers in epochs.kept] == [set()] + [{other[0]}] * 4 + [{*other}] * 4
    assert {name.split(".")[3] for name in epochs.frozen[0]} == {str(layer - 1) for layer in other}


def test_losses_follow_each_stage(tmp_path: Path) -> None:
    seen: list[str] = []

    class Maps(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            assert trainer.distillation is not None
            seen.append(str(trainer.distillation.losses[0].layer_map))  # type: ignore[attr-defined]

    trainer = distilling(tmp_path, losses=[HiddenStatesLoss()], model=tiny_model("bert", num_layers=4, **NARROW), callbacks=[Maps()])
    projection = next(trainer.distillation.projections.parameters())  # type: ignore[union-attr]
    trainer.train()
    assert seen == ["1:1,2:2,3:3,4:4"] * 4 + ["1:1,2:2,3:4"] * 4 + ["1:1,2:4"] * 4
    assert next(trainer.distillation.projections.parameters()) is projection  # type: ignore[union-attr]


def test_predictions_alone_may_come_from_disk(tmp_path: Path) -> None:
    flags = CompressionArguments(teacher_cache_dir=str(tmp_path / "cache"))
    trainer = distilling(tmp_path / "run", losses=[LogitsLoss()], compression=flags)
    trainer.train()
    live = distilling(tmp_path / "live", losses=[LogitsLoss()])
    live.train()
    assert trainer.distillation is not None and isinstance(trainer.distillation.teacher, CachedTeacher)
    assert kept(trainer.model) == (1, 4)
    assert largest_difference(weights(trainer), weights(live)) < 1e-2  # int8


@pytest.mark.parametrize(
    ("more", "error", "message"),
    [
        ({"losses": [HiddenStatesLoss(LayerMap.uniform(4, 4))]}, LossError, "names pairs of layers"),
        ({"losses": [HiddenStatesLoss(projection="per_layer")]}, LossError, "one projection for each student layer"),
        ({"compression": CompressionArguments(teacher_cache_dir="nowhere")}, LossError, "teacher on disk"),
        ({"compression": CompressionArguments(distill_phases="prediction=6")}, ArgumentError, "--distill_phases"),
        ({"num_train_epochs": 4}, LayerDropError, "last layer would go after epoch 4, and training ends after 4"),
        ({"max_steps": 100}, LayerDropError, "--max_steps 100"),
        ({"auto_find_batch_size": True}, LayerDropError, "--auto_find_batch_size"),
        ({"torch_compile": True}, LayerDropError, "torch.compile"),
        ({"load_best_model_at_end": True, "save_strategy": "epoch", "eval_strategy": "epoch"}, LayerDropError, "best checkpoint"),
    ],
)
def test_refused_before_training(tmp_path: Path, more: Any, error: Any, message: str) -> None:
    model = tiny_model("bert", num_layers=4, **NARROW)
    eval_dataset = rows() if "eval_strategy" in more else None
    with pytest.raises(error, match=message):
        if eval_dataset is not None:
            args = arguments(tmp_path, **more)
            Trainer(model, args, train_dataset=rows(), eval_dataset=eval_dataset, callbacks=[LayerDropCallback(**ITERATIVE)])
        distilling(tmp_path, model, **more)
    assert len(model.bert.encoder.layer) == 4


def test_optimizer_and_model_init(tmp_path: Path) -> None:
    model = bert()
    given = (torch.optim.SGD(model.parameters(), lr=0.1), None)
    with pytest.raises(LayerDropError, match="an optimizer was passed in"):
        Trainer(model, arguments(tmp_path), optimizers=given, train_dataset=rows(), callbacks=[LayerDropCallback(**ITERATIVE)])
    trainer = Trainer(None, arguments(tmp_path), model_init=bert, train_dataset=rows(), callbacks=[LayerDropCallback(**ITERATIVE)])
    with pytest.raises(LayerDropError, match="model_init"):
        trainer.train()
    teacher, losses = tiny_model("bert", num_layers=4, seed=1), [LogitsLoss(), HiddenStatesLoss()]
    own = DistillTrainer(
        None,
        arguments(tmp_path),
        model_init=bert,
        teacher=teacher,
        losses=losses,
        train_dataset=rows(),
        callbacks=[LayerDropCallback(**ITERATIVE)],
    )
    own.train()  # it plans anew for each model that it builds
    own.train()
    assert kept(own.model) == (1, 4)
    late = Trainer(bert(), arguments(tmp_path), train_dataset=rows())
    late.add_callback(LayerDropCallback(**ITERATIVE))
    with pytest.raises(LayerDropError, match="too late"):
        late.train()


def test_flags(tmp_path: Path) -> None:
    flags = CompressionArguments(layer_drop_strategy="top", num_layers_to_drop=2, layer_drop_after_epochs=1, freeze_layers_before_drop=True)
    epochs = Epochs()
    made = trainer_of(flags).trainer_class
    whole = made(
        bert(), arguments(tmp_path, num_train_epochs=2, save_strategy="steps", save_steps=1), train_dataset=rows(), callbacks=[epochs]
    )
    whole.train()
    assert epochs.kept == [(1, 2, 3, 4)] * 2 + [(1, 2)] * 2 and epochs.frozen[0] and not epochs.frozen[2]
    resumed = trainer_of(flags).trainer_class(bert(), arguments(tmp_path, num_train_epochs=2), train_dataset=rows())
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert kept(resumed.model) == (1, 2)
    assert largest_difference(weights(resumed), weights(whole)) < 1e-6
    for given, message in (
        ({"layer_drop_after_epochs": 1}, "no layers are dropped"),
        ({"layer_drop_strategy": "top", "layer_drop_after_epochs": 1, "layer_drop_every_n_epochs": 1}, "contradict"),
        ({"layer_drop_strategy": "top", "freeze_layers_before_drop": True}, "add --layer_drop_after_epochs"),
        ({"layer_drop_strategy": "top", "layer_drop_every_n_epochs": 0}, "whole number of at least 1"),
        ({"layer_drop_strategy": "top", "layer_drop_every_n_epochs": 1, "distill_phases": "prediction=1"}, "--distill_phases"),
    ):
        with pytest.raises(ArgumentError, match=message):
            CompressionArguments(**given)  # type: ignore[arg-type]
