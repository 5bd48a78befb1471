"""Every setting of transformers' Trainer does in DistillTrainer what it does there: the same weights, the same log, the same files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, IterableDataset
from safetensors.torch import load_file
from torch import nn
from transformers import EarlyStoppingCallback, EvalPrediction, Trainer, TrainerCallback

from hf_compress.arguments import CompressionArguments
from hf_compress.losses.labels import LabelsLoss
from hf_compress.projection_file import FILE_NAME
from hf_compress.trainer import DistillTrainer
from hf_compress.training_arguments import DistillTrainingArguments
from tests.tiny_runs import NARROW, arguments, every_loss, largest_difference, rows, student, teacher, weights

TIMES = ("runtime", "per_second", "mem_", "total_flos", "loss_labels")


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def of_uneven_lengths() -> Dataset:
    examples = [
        {name: values[: sum(row["attention_mask"])] if name != "label" else values for name, values in row.items()} for row in rows()
    ]
    return Dataset.from_list(examples)


def padded(examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    longest = max(len(example["input_ids"]) for example in examples)
    batch = {name: torch.tensor([e[name] + [0] * (longest - len(e[name])) for e in examples]) for name in ("input_ids", "attention_mask")}
    return {**batch, "labels": torch.tensor([example["label"] for example in examples])}


def runs_out_of_memory(model: nn.Module, limit: int) -> nn.Module:
    """A model that does so in its backward, as on a GPU, above so many examples."""
    sizes: list[int] = []

    def refuse(gradient: torch.Tensor) -> None:
        if sizes[-1] > limit:
            raise RuntimeError("CUDA out of memory.")

    model.register_forward_pre_hook(lambda module, args, given: sizes.append(len(given["input_ids"])), with_kwargs=True)
    model.get_input_embeddings().weight.register_hook(refuse)
    return model


def values_of(trainer: Trainer) -> list[dict[str, Any]]:
    return [{name: value for name, value in line.items() if not any(word in name for word in TIMES)} for line in trainer.state.log_history]


# Without accumulation, where transformers' own BERT takes a mean for a sum, and ours a mean over the whole step.
# What is set, and what else is given to the trainer.
SETTINGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "group by length": ({"train_sampling_strategy": "group_by_length"}, {"train_dataset": of_uneven_lengths(), "data_collator": padded}),
    "a stream": ({"max_steps": 3}, {"train_dataset": IterableDataset.from_generator(lambda: iter(rows()))}),
    "neftune": ({"neftune_noise_alpha": 5.0}, {}),
    "epochs and a rest": (
        {"max_steps": -1, "num_train_epochs": 1.5},
        {},
    ),
    "evaluated before": ({"eval_on_start": True, "eval_strategy": "epoch"}, {"compute_metrics": accuracy}),
    "several sets": (
        {"eval_strategy": "steps", "eval_steps": 2},
        {"eval_dataset": {"a": rows(), "b": rows(count=6)}, "compute_metrics": accuracy},
    ),
    "memory": ({"skip_memory_metrics": False, "torch_empty_cache_steps": 1}, {}),
    "tokens of one device": (
        {"average_tokens_across_devices": False},
        {},
    ),
    "on a plateau": (
        {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "steps", "eval_steps": 1, "metric_for_best_model": "loss"},
        {},
    ),
    "tokens seen": ({"include_num_input_tokens_seen": "non_padding", "logging_first_step": True, "logging_steps": 3}, {}),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_a_setting_does_what_it_does_in_trainer(name: str, tmp_path: Path) -> None:
    settings, given = SETTINGS[name]
    made = []
    for cls in (Trainer, DistillTrainer):
        torch.manual_seed(3)
        own = {"losses": [LabelsLoss()], "compression": CompressionArguments(trim_padding=False)} if cls is DistillTrainer else {}
        args = arguments(tmp_path / cls.__name__, **{"max_steps": 4, "per_device_train_batch_size": 3, **settings})
        data = {"train_dataset": rows(), "eval_dataset": rows(count=7), **given}
        made.append(cls(student(hidden_dropout_prob=0.1), args, **data, **own))
        made[-1].train()
    plain, ours = made
    assert largest_difference(weights(plain), weights(ours)) < 1e-6 < largest_difference(weights(plain), dict(student().named_parameters()))
    assert [line.keys() for line in values_of(plain)] == [line.keys() for line in values_of(ours)]
    for found, wanted in zip(values_of(ours), values_of(plain), strict=True):
        assert found == pytest.approx(wanted, rel=1e-4, abs=1e-6)
    assert (plain.state.num_input_tokens_seen, plain.state.epoch) == (ours.state.num_input_tokens_seen, ours.state.epoch)
    if name == "memory":
        assert {key for line in plain.state.log_history for key in line} <= {key for line in ours.state.log_history for key in line}


def test_a_batch_that_does_not_fit_is_made_smaller_and_leaves_no_trace(tmp_path: Path) -> None:
    made = []
    for cls in (Trainer, DistillTrainer):
        model = runs_out_of_memory(student(), 14)
        own = {"losses": [LabelsLoss()], "compression": CompressionArguments(trim_padding=False)} if cls is DistillTrainer else {}
        args = arguments(tmp_path / cls.__name__, max_steps=3, auto_find_batch_size=True)
        made.append(cls(model, args, train_dataset=rows(), **own))
        made[-1].train()
    plain, ours = made
    assert ours._train_batch_size == plain._train_batch_size <= 14
    assert largest_difference(weights(plain), weights(ours)) < 1e-6
    for line in ours.state.log_history[:3]:
        assert line["loss_labels"] == pytest.approx(line["loss"], abs=1e-5)


def test_a_distilled_run_whose_batch_is_made_smaller(tmp_path: Path) -> None:
    model = runs_out_of_memory(student(**NARROW), 14)
    args = arguments(tmp_path, max_steps=2, auto_find_batch_size=True)
    trainer = DistillTrainer(model, args, teacher=teacher(), losses=every_loss(), train_dataset=rows())
    trainer.train()
    assert trainer._train_batch_size <= 14
    assert trainer.distillation is not None
    for line in trainer.state.log_history[:2]:
        parts = [line[f"loss_{loss.name}"] * loss.weight for loss in trainer.distillation.losses]
        assert sum(parts) == pytest.approx(line["loss"], abs=1e-4)


def test_a_loss_that_is_not_finite_is_left_out_of_the_log_part_by_part(tmp_path: Path) -> None:
    class Overflowing(DistillTrainer):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            assert self.distillation is not None
            before = self.distillation.parts
            if self.state.global_step == 1:
                self.distillation.parts = lambda *a: {key: (value * float("nan"), weight) for key, (value, weight) in before(*a).items()}
            try:
                return super().compute_loss(*args, **kwargs)
            finally:
                self.distillation.parts = before

    logged = {}
    for filtered in (True, False):
        args = arguments(tmp_path, max_steps=3, logging_steps=3, learning_rate=0.0, logging_nan_inf_filter=filtered)
        trainer = Overflowing(student(), args, losses=[LabelsLoss()], train_dataset=rows())
        trainer.train()
        logged[filtered] = trainer.state.log_history[0]
    assert logged[True]["loss_labels"] == pytest.approx(logged[True]["loss"], rel=1e-5) and logged[True]["loss"] > 0
    assert logged[False]["loss_labels"] != logged[False]["loss_labels"]


def test_predictions_and_metrics_that_want_more(tmp_path: Path) -> None:
    seen: list[Any] = []

    def with_inputs(prediction: EvalPrediction) -> dict[str, float]:
        assert prediction.inputs.shape == (16, 24) and prediction.losses.shape == (16,)
        return {"first": float(prediction.inputs[0, 0])}

    def by_batch(prediction: EvalPrediction, compute_result: bool) -> dict[str, float]:
        seen.append(len(prediction.label_ids))
        return {"batches": float(len(seen))} if compute_result else {}

    for more, metrics in (({"include_for_metrics": ["inputs", "loss"]}, with_inputs), ({"batch_eval_metrics": True}, by_batch)):
        found = []
        for cls in (Trainer, DistillTrainer):
            seen.clear()
            own = {"teacher": teacher(), "losses": every_loss()} if cls is DistillTrainer else {}
            trainer = cls(
                student(**NARROW),
                arguments(tmp_path, learning_rate=0.0, **more),
                train_dataset=rows(),
                eval_dataset=rows(),
                compute_metrics=metrics,
                **own,
            )
            trainer.train()
            seen.clear()
            found.append(trainer.predict(rows()))
        assert (found[0].predictions == found[1].predictions).all()
        own_metrics = [
            {name: value for name, value in each.metrics.items() if "_per_" not in name and "time" not in name} for each in found
        ]
        assert own_metrics[0] == own_metrics[1]


class Remember(TrainerCallback):
    """Stands for what `report_to` names: it is told what is logged."""

    def __init__(self) -> None:
        self.logged: dict[str, float] = {}
        self.arguments = ""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.arguments = args.to_json_string()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.logged |= logs


def test_what_reports_are_told(tmp_path: Path) -> None:
    told = Remember()
    settings = {"output_dir": str(tmp_path), "max_steps": 1, "use_cpu": True, "report_to": [], "logging_steps": 1, "disable_tqdm": True}
    args = DistillTrainingArguments(**settings, distill_weights={"labels": 0.5}, distill_layer_map={1: 2, 2: 4})
    sets = {"a": rows(), "b": rows(count=6)}
    DistillTrainer(
        student(), args, teacher=teacher(), train_dataset=rows(), eval_dataset=sets, compute_metrics=accuracy, callbacks=[told]
    ).train()
    assert {"loss", "loss_logits", "loss_labels", "teacher_a_accuracy", "teacher_b_accuracy"} <= set(told.logged)
    assert json.loads(told.arguments)["distill_weights"] == {"labels": 0.5}


def best_at(step: int, folder: Path, **more: Any) -> DistillTrainer:
    """A run of four steps whose metric is best at one of them."""
    scores = iter([0.0, *(1.0 - 0.1 * abs(step - each) for each in range(1, 9))])  # the teacher's own comes first

    torch.manual_seed(5)
    settings = {
        "max_steps": 4,
        "eval_strategy": "steps",
        "save_strategy": "steps",
        "eval_steps": 1,
        "save_steps": 1,
        "load_best_model_at_end": True,
        "metric_for_best_model": "score",
    }
    resume = more.pop("resume", None)
    trainer = DistillTrainer(
        student(**NARROW),
        arguments(folder, **{**settings, **more.pop("settings", {})}),
        teacher=teacher(),
        losses=every_loss(),
        train_dataset=rows(),
        eval_dataset=rows(),
        compute_metrics=lambda prediction: {"score": next(scores)},
        **more,
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def test_the_best_model_comes_back_with_the_projections_of_its_step(tmp_path: Path) -> None:
    trainer = best_at(2, tmp_path, settings={"save_total_limit": 1, "save_only_model": True})
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-2")
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]
    assert not (tmp_path / "checkpoint-2" / "optimizer.pt").exists()
    stored = {**load_file(tmp_path / "checkpoint-2" / "model.safetensors"), **load_file(tmp_path / "checkpoint-2" / FILE_NAME)}
    found = {name.removeprefix("hf_compress_projections."): value for name, value in trainer.model.state_dict().items()}
    assert largest_difference(found, stored) == 0.0
    trainer.save_model()
    assert (tmp_path / FILE_NAME).read_bytes() == (tmp_path / "checkpoint-2" / FILE_NAME).read_bytes()


def test_stopping_early_and_going_on_with_the_patience_that_was_left(tmp_path: Path) -> None:
    trainer = best_at(1, tmp_path / "a", callbacks=[EarlyStoppingCallback(2)])
    assert trainer.state.global_step == 3
    two = best_at(1, tmp_path / "b", callbacks=[EarlyStoppingCallback(2)], settings={"max_steps": 2})
    assert two.state.global_step == 2
    # Two steps without a better score in the resumed run would be needed, if it did not remember the one before.
    going_on = best_at(
        -5, tmp_path / "b", resume=True, callbacks=[EarlyStoppingCallback(2)], settings={"restore_callback_states_from_checkpoint": True}
    )
    assert going_on.state.global_step == 3 and going_on.state.best_model_checkpoint == str(tmp_path / "b" / "checkpoint-1")
