"""`hyperparameter_search`: transformers' own search over students of one teacher, over our flags as over its own."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import GradientState
from torch import nn
from transformers.trainer_utils import HPSearchBackend

from hf_compress.arguments import CompressionArguments
from hf_compress.bound_trainer import trainer_of
from hf_compress.errors import ArgumentError
from hf_compress.layers.drop import drop_layers
from hf_compress.trainer import DistillTrainer
from hf_compress.training_arguments import DistillTrainingArguments
from tests.cached_runs import data, tokenizer
from tests.tiny_models import tiny_model
from tests.tiny_runs import NARROW, arguments, largest_difference, rows, teacher
from tests.tiny_search import Trial, install

FIRST = {"learning_rate": 0.05, "distill_temperature": 4.0, "num_layers_to_drop": 2, "labels": 0.5}
SECOND = {"learning_rate": 0.02, "distill_temperature": 1.5, "num_layers_to_drop": 1, "labels": 0.25}


def space(trial: Trial) -> dict[str, Any]:
    found = {name: trial.suggest(name) for name in trial.values if name != "labels"}
    return found | ({"distill_weights": {"labels": trial.suggest("labels")}} if "labels" in trial.values else {})


def build() -> nn.Module:
    return tiny_model("bert", num_layers=4, seed=2, **NARROW)


class Watch:
    """Runs a search and notes what each trial trained, and with what."""

    def __init__(self, trainer: Any) -> None:
        self.trainer, self.weights, self.seen = trainer, list[dict[str, torch.Tensor]](), list[tuple[Any, ...]]()

    def note(self, metrics: Mapping[str, float]) -> float:
        model = self.trainer.model
        self.weights.append({name: parameter.detach().clone() for name, parameter in model.named_parameters()})
        self.seen.append((model.config.num_hidden_layers, self.trainer.args.learning_rate))
        return float(metrics["eval_loss"])

    def search(self, hp_space: Callable[[Trial], dict[str, Any]] = space, n_trials: int = 3) -> Any:
        return self.trainer.hyperparameter_search(hp_space=hp_space, compute_objective=self.note, n_trials=n_trials, backend="optuna")


def alone(folder: Path, values: Mapping[str, Any], **given: Any) -> dict[str, torch.Tensor]:
    """The weights after a run of these values and no search."""
    flags = {"distill_temperature": values["distill_temperature"], "distill_weights": {"labels": values["labels"]}}
    drop = {"layer_drop_strategy": "top", "num_layers_to_drop": values["num_layers_to_drop"]}
    trainer = DistillTrainer(
        model_init=build,
        args=arguments(folder, max_steps=2, learning_rate=values["learning_rate"]),
        compression=CompressionArguments(**flags, **drop, **given.pop("flags", {})),
        **given,
    )
    trainer.train()
    return {name: parameter.detach() for name, parameter in trainer.model.named_parameters()}


def test_each_trial_is_the_run_of_its_values_and_the_teacher_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, [FIRST, SECOND, FIRST])
    guide = teacher()
    guide.save_pretrained(tmp_path / "teacher")
    given: dict[str, Any] = {"train_dataset": rows(), "eval_dataset": rows()}
    flags = CompressionArguments(
        layer_drop_strategy="top", num_layers_to_drop=3, teacher_model_name_or_path=str(tmp_path / "teacher"), distill_recipe="layerwise"
    )
    scored: list[int] = []
    settings = arguments(tmp_path / "out", max_steps=2, save_strategy="steps", save_steps=2)
    trainer = DistillTrainer(
        args=settings,
        model_init=build,
        compression=flags,
        **given,
        compute_metrics=lambda prediction: {"size": float(scored.append(1) or 1)},
    )
    loaded = trainer._teachers[0].loaded
    watch = Watch(trainer)
    best = watch.search()
    assert trainer._teachers[0].loaded is loaded is not None
    assert watch.seen == [(2, 0.05), (3, 0.02), (2, 0.05)]
    assert not any(module._forward_hooks for module in loaded.modules())  # no trial's hooks stay on the teacher
    assert len(scored) == 1 + 3  # the teacher's own score once
    assert largest_difference(watch.weights[0], watch.weights[2]) == 0.0
    for found, values in zip(watch.weights, (FIRST, SECOND), strict=False):
        wanted = alone(tmp_path / "alone", values, teacher=teacher(), **given)
        assert largest_difference(found, wanted) == 0.0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["run-0", "run-1", "run-2"]
    assert (tmp_path / "out" / "run-1" / "checkpoint-2" / "distill_projections.safetensors").is_file()
    assert flags.distill_temperature is None and flags.num_layers_to_drop == 3  # somebody else may hold them

    assert best.hyperparameters in (FIRST, SECOND)
    for name in ("learning_rate", "distill_temperature", "num_layers_to_drop"):  # as transformers' documentation has it
        setattr(trainer.args, name, SECOND[name])
    trainer.args.distill_weights = {"labels": SECOND["labels"]}
    trainer.train()
    after = {name: parameter.detach() for name, parameter in trainer.model.named_parameters()}
    assert largest_difference(after, watch.weights[1]) == 0.0


def test_trials_that_read_the_teacher_from_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, [FIRST, SECOND])
    given: dict[str, Any] = {"train_dataset": data(), "processing_class": tokenizer()}
    # Built for the deepest of the students: what it lacks a trial could not have.
    flags = {"teacher_cache_dir": str(tmp_path / "cache"), "layer_drop_strategy": "top", "num_layers_to_drop": 1}
    chosen = {"distill_recipe": "layerwise", "distill_layer_map": "bottom"}
    args = DistillTrainingArguments(
        **{**vars_of(arguments(tmp_path / "out", max_steps=2)), **flags, **chosen, "teacher_cache_dtype": "float32"}
    )
    trainer = DistillTrainer(args=args, model_init=build, teacher=teacher(), eval_dataset=data(), **given)
    watch = Watch(trainer)
    watch.search(n_trials=2)
    assert [seen[0] for seen in watch.seen] == [2, 3] and trainer._teachers[0].given is None
    assert args.distill_temperature == SECOND["distill_temperature"]  # as transformers leaves its own
    more = {"teacher_cache_dir": str(tmp_path / "cache"), **chosen}
    for found, values in zip(watch.weights, (FIRST, SECOND), strict=True):
        assert largest_difference(found, alone(tmp_path / "alone", values, flags=more, **given)) == 0.0


def vars_of(args: Any) -> dict[str, Any]:
    names = ("output_dir", "max_steps", "learning_rate", "optim", "lr_scheduler_type", "max_grad_norm", "report_to", "use_cpu")
    more = ("disable_tqdm", "seed", "per_device_train_batch_size", "logging_steps", "save_strategy")
    return {name: getattr(args, name) for name in (*names, *more)}


def test_a_flag_that_a_trial_leaves_out_is_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, [FIRST, {"learning_rate": 0.05}])
    flags = CompressionArguments(distill_temperature=3.0)
    trainer = DistillTrainer(
        args=arguments(tmp_path), model_init=build, teacher=teacher(), compression=flags, train_dataset=rows(), eval_dataset=rows()
    )
    seen: list[str] = []

    def asked(trial: Trial) -> dict[str, Any]:
        return space(trial) | ({"layer_drop_strategy": "symmetric"} if "num_layers_to_drop" in trial.values else {})

    trainer.compute_loss_of_step = trainer.compute_loss

    def noting(*args: Any, **kwargs: Any) -> Any:
        assert trainer.distillation is not None
        seen.append(f"{trainer.distillation.losses[0]}, {trainer.model.config.num_hidden_layers} layers")
        return trainer.compute_loss_of_step(*args, **kwargs)

    monkeypatch.setattr(trainer, "compute_loss", noting)
    Watch(trainer).search(asked, n_trials=2)
    assert list(dict.fromkeys(seen)) == ["1 x logits (kl, T = 4), 2 layers", "1 x logits (kl, T = 3), 4 layers"]


def test_a_model_init_that_drops_layers_by_the_trial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, [{"depth": 1}, {"depth": 3}])

    def of_depth(trial: Trial | None) -> nn.Module:
        model = build()
        drop_layers(model, strategy="bottom", num_layers_to_drop=4 - (2 if trial is None else trial.suggest("depth")))
        return model

    trainer = DistillTrainer(args=arguments(tmp_path), model_init=of_depth, teacher=teacher(), train_dataset=rows(), eval_dataset=rows())
    watch = Watch(trainer)
    watch.search(n_trials=2)
    assert [seen[0] for seen in watch.seen] == [1, 3]


def test_what_a_trial_cannot_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {"args": arguments(tmp_path), "model_init": build, "train_dataset": rows(), "eval_dataset": rows()}
    distilling = DistillTrainer(teacher=teacher(), **given)
    on_labels = trainer_of(CompressionArguments(layer_drop_strategy="top")).trainer_class(**given)
    with_args = DistillTrainer(**given | {"args": DistillTrainingArguments(**vars_of(given["args"]), layer_drop_strategy="top")})
    for trainer, values, words in (
        (distilling, {"teacher_cache_dir": "x"}, "--teacher_cache_dir, which is the same for all trials"),
        (distilling, {"distil_temperature": 2.0}, "Did you mean 'distill_temperature'"),
        (distilling, {"distill_temperature": -1.0}, "expected a number above 0"),
        (distilling, {"num_layers_to_drop": 1}, "no --layer_drop_strategy says which layers go"),
        (on_labels, {"num_layers_to_drop": 1}, "--num_layers_to_drop, and the script's own Trainer takes these as they are"),
        (with_args, {"distill_temperature": 2.0}, "--distill_temperature, and this run has no teacher"),
    ):
        install(monkeypatch, [values])
        with pytest.raises(ArgumentError, match=words):
            Watch(trainer).search(n_trials=1)


def test_a_plain_trainer_under_run_drops_the_layers_of_each_trial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, [{"learning_rate": 0.1}, {"learning_rate": 0.2}])
    bound = trainer_of(CompressionArguments(layer_drop_strategy="symmetric", num_layers_to_drop=2))
    watch = Watch(bound.trainer_class(args=arguments(tmp_path), model_init=build, train_dataset=rows(), eval_dataset=rows()))
    watch.search(n_trials=2)
    assert watch.seen == [(2, 0.1), (2, 0.2)]


def test_a_trainer_goes_to_a_process_that_searches_there(tmp_path: Path) -> None:
    """As Ray sends it: without its model."""
    GradientState._reset_state()  # accelerate's, which all of the process share, and which cannot be sent once a data loader was in use
    flags = CompressionArguments(layer_drop_strategy="top", num_layers_to_drop=1)
    here = DistillTrainer(args=arguments(tmp_path), model_init=build, teacher=teacher(), compression=flags, train_dataset=rows())
    here.model = None
    there = pickle.loads(pickle.dumps(here))
    there.hp_search_backend, there.hp_name = HPSearchBackend.RAY, lambda trial: "first"
    there.call_model_init({"num_layers_to_drop": 3, "distill_temperature": 8.0})
    assert there.model.config.num_hidden_layers == 1 and str(there.distillation.losses[0]) == "1 x logits (kl, T = 8)"
    here.train()
    assert here.model.config.num_hidden_layers == 3
