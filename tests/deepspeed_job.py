"""What two processes do under DeepSpeed, for the tests: `deepspeed tests/deepspeed_job.py FOLDER CONFIG:SCENARIO...`.

Each scenario trains on tiny models, and notes in FOLDER/results.json what the test is to look at. A job costs 20 seconds before it does
anything, so one job has many scenarios.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForSequenceClassification, TrainerCallback, TrainingArguments

from hf_compress import CompressionArguments, DistillTrainer, deepspeed_config, student_from_teacher
from hf_compress.layers.zero import loaded_whole, whole_parameters
from tests.tiny_runs import NARROW, arguments, every_loss, every_objective, rows, student, teacher

SCENARIOS: dict[str, Callable[[Path, str], dict[str, Any]]] = {}


def scenario(function: Callable[[Path, str], dict[str, Any]]) -> Callable[[Path, str], dict[str, Any]]:
    SCENARIOS[function.__name__] = function
    return function


def settings(folder: Path, name: str, **more: Any) -> TrainingArguments:
    values = {"per_device_train_batch_size": 4, "max_steps": 2, "learning_rate": 1e-2, "deepspeed": deepspeed_config(name), **more}
    made = arguments(folder, **values)
    assert made.device.type == "cpu"  # begins the process group
    return made


def loaded(folder: Path) -> nn.Module:
    """As a script loads a model after its TrainingArguments: split up under ZeRO-3."""
    return AutoModelForSequenceClassification.from_pretrained(folder)


def losses_of(trainer: DistillTrainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def weights_of(trainer: DistillTrainer) -> dict[str, torch.Tensor]:
    with whole_parameters(trainer.model):
        return {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}


def farthest(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    assert one.keys() == other.keys()
    return max((one[name] - other[name]).abs().max().item() for name in one)


def exported(trainer: DistillTrainer, folder: Path) -> dict[str, Any]:
    """Save the student, load it anew, and see that it is whole and predicts as the one in the engine."""
    trainer.save_model(str(folder))
    torch.distributed.barrier()
    batch = trainer.data_collator([rows()[index] for index in range(8)])
    with loaded_whole():
        again, loading = AutoModelForSequenceClassification.from_pretrained(folder, output_loading_info=True)
    trainer.model.eval()
    with torch.no_grad():
        difference = (trainer.model_wrapped(**batch).logits - again.eval()(**batch).logits).abs().max().item()
    names = {name for name, _ in again.named_parameters()}
    return {
        "predicts otherwise by": difference,
        "layers": len(again.bert.encoder.layer),
        "loading": sorted(f"{kind} {key}" for kind, keys in loading.items() for key in keys),
        "stored": sorted(names ^ stored_names(folder)),
        "files": sorted(file.name for file in folder.iterdir()),
    }


def stored_names(folder: Path) -> set[str]:
    with safe_open(folder / "model.safetensors", "pt") as file:
        return set(file.keys())


@scenario
def phases(folder: Path, name: str) -> dict[str, Any]:
    """The engine of the first phase gives way to that of the second; projections are learnt in the first."""
    flags = CompressionArguments(distill_phases="intermediate=1,prediction=1")
    made = settings(folder / "out", name, max_steps=-1, optim="adamw_torch")
    trainer = DistillTrainer(student(**NARROW), made, teacher=teacher(), losses=every_loss(), compression=flags, train_dataset=rows())
    before = weights_of(trainer)
    trainer.train()
    after = weights_of(trainer)
    moved = {key: not torch.equal(before[key], after[key]) for key in before}
    return {
        "losses": losses_of(trainer),
        "moved": sorted(key for key in moved if not moved[key]),
        "exported": exported(trainer, folder / "exported"),
    }


@scenario
def resume(folder: Path, name: str) -> dict[str, Any]:
    """Four steps, and two and two: weights, projections and the optimizer's moments come back."""

    def run(**more: Any) -> dict[str, torch.Tensor]:
        torch.manual_seed(5)
        made = settings(folder / "out", name, max_steps=4, optim="adamw_torch", save_strategy="steps", save_steps=2)
        trainer = DistillTrainer(student(**NARROW), made, teacher=teacher(), losses=every_loss(), train_dataset=rows())
        trainer.train(**more)
        return weights_of(trainer)

    whole = run()
    resumed = run(resume_from_checkpoint=str(folder / "out" / "checkpoint-2"))
    half = stored_names(folder / "out" / "checkpoint-2")
    return {"differs by": farthest(whole, resumed), "projections": [key for key in whole if "projections" in key], "in model": sorted(half)}


@scenario
def loaded_after_the_config(folder: Path, name: str) -> dict[str, Any]:
    """Student and teacher by path, layers dropped by contribution; the teacher answers live, from disk, and split up."""
    found: dict[str, Any] = {}
    drop = {"layer_drop_strategy": "contribution", "num_layers_to_drop": 2}
    ways: dict[str, dict[str, Any]] = {
        "live": {},
        "built": {"teacher_cache_dir": str(folder / "cache"), "teacher_cache_dtype": "float32"},
        "stored": {"teacher_cache_dir": str(folder / "cache")},
        **({"split": {"teacher_sharded": True}} if name == "zero3" else {}),
    }
    for way, more in ways.items():
        made = settings(folder / way, name)
        model = loaded(folder.parent / "wide")
        shapes = {tuple(parameter.shape) for parameter in model.parameters()}
        flags = CompressionArguments(teacher_model_name_or_path=str(folder.parent / "teacher"), **drop, **more)
        trainer = DistillTrainer(model, made, compression=flags, train_dataset=rows(), eval_dataset=rows())
        assert trainer.distillation is not None
        teacher_model = getattr(trainer.distillation.teacher, "model", None)
        of_teacher = None if teacher_model is None else {tuple(each.shape) for each in teacher_model.parameters()}
        trainer.train()
        found[way] = {
            "student was split": shapes == {(0,)},
            "teacher": {None: "on disk", frozenset({(0,)}): "split"}.get(of_teacher and frozenset(of_teacher), "whole"),
            "losses": losses_of(trainer),
            "evaluated": trainer.evaluate()["eval_loss"],
            "exported": exported(trainer, folder / f"{way}_exported"),
        }
    return found


@scenario
def handed_over(folder: Path, name: str) -> dict[str, Any]:
    """A teacher that ZeRO-3 has split up, and students that are made from it, or from its path."""
    found: dict[str, Any] = {}
    for way in ("teacher", "student", "student of a path"):
        made = settings(folder / way, name)
        of_path = str(folder.parent / "teacher")
        split = loaded(Path(of_path))
        if way == "teacher":
            model, teaches = loaded(folder.parent / "narrow"), split
        else:
            model, teaches = student_from_teacher(split if way == "student" else of_path, layers_to_keep=(1, 4)), of_path
        trainer = DistillTrainer(model, made, teacher=teaches, train_dataset=rows())
        trainer.train()
        found[way] = {"losses": losses_of(trainer), "exported": exported(trainer, folder / f"{way}_exported")}
    return found


@scenario
def asked_when_missing(folder: Path, name: str) -> dict[str, Any]:
    """A teacher on disk that lacks half of the examples, each process asking for its own."""
    found = {}
    for way, count, miss in (("half", 8, None), ("whole", 16, "live")):
        flags = CompressionArguments(
            teacher_model_name_or_path=str(folder.parent / "teacher"),
            teacher_cache_dir=str(folder / "cache"),
            teacher_cache_dtype="float32",
            teacher_cache_miss=miss,
        )
        trainer = DistillTrainer(
            student(**NARROW),
            settings(folder / way, name),
            compression=flags,
            train_dataset=rows(count=count),
        )
        trainer.train()
        found[way] = losses_of(trainer)
    made = settings(folder / "live", name)
    trainer = DistillTrainer(student(**NARROW), made, teacher=str(folder.parent / "teacher"), train_dataset=rows())
    trainer.train()
    return {**found, "live": losses_of(trainer)}


@scenario
def half_precision(folder: Path, name: str) -> dict[str, Any]:
    """A bfloat16 student beside a teacher as it was saved."""
    trainer = DistillTrainer(
        loaded(folder.parent / "narrow") if name == "zero3" else student(**NARROW),
        settings(folder / "out", name, bf16=True),
        teacher=str(folder.parent / "teacher"),
        losses=every_loss(),
        train_dataset=rows(),
    )
    trainer.train()
    return {"types": sorted({str(parameter.dtype) for parameter in trainer.model.parameters()}), "losses": losses_of(trainer)}


STEPS, LEARNING_RATE = 20, 0.05


def stepped(folder: Path, losses: str, batch_size: int, **more: Any) -> list[dict[str, torch.Tensor]]:
    """The weights at the start, after one step, and after all, of SGD on very uneven lengths."""
    kept: list[dict[str, torch.Tensor]] = []

    class Keep(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step in (1, STEPS):
                kept.append(weights_of(trainer))

    torch.manual_seed(5)  # projections are random
    made = arguments(folder, per_device_train_batch_size=batch_size, max_steps=STEPS, learning_rate=LEARNING_RATE, **more)
    compared = {"every_loss": every_loss, "every_objective": every_objective}[losses]()
    trainer = DistillTrainer(student(**NARROW), made, teacher=teacher(), losses=compared, train_dataset=rows(count=48), callbacks=[Keep()])
    start = weights_of(trainer)
    trainer.train()
    return [start, *kept]


@scenario
def equality(folder: Path, name: str) -> dict[str, Any]:
    """The same training on two processes, in one go and accumulated."""
    layouts = {"two": ("every_loss", 8, 1), "accumulated": ("every_loss", 4, 2)}
    if name == "zero3":
        layouts["objectives"] = ("every_objective", 8, 1)
    for layout, (losses, batch_size, accumulation) in layouts.items():
        more = {"gradient_accumulation_steps": accumulation, "deepspeed": deepspeed_config(name)}
        for when, weights in zip(("start", "one", "all"), stepped(folder / layout, losses, batch_size, **more), strict=True):
            if os.environ["RANK"] == "0":
                save_file(weights, folder / layout / f"{when}.safetensors")
    # 13 examples do not fill two steps of 2 x 4.
    made = settings(folder / "uneven", name, max_steps=-1, num_train_epochs=1)
    trainer = DistillTrainer(student(**NARROW), made, teacher=teacher(), losses=every_loss(), train_dataset=rows(count=13))
    trainer.train()
    return {"steps of an uneven epoch": trainer.state.global_step}


def main() -> None:
    folder, *chosen = [argument for argument in sys.argv[1:] if not argument.startswith("--local_rank")]
    results = {}
    for each in chosen:
        name, _, wanted = each.partition(":")
        results[each] = SCENARIOS[wanted](Path(folder) / each.replace(":", "_"), name)
    if os.environ["RANK"] == "0":
        (Path(folder) / "results.json").write_text(json.dumps(results))
    torch.distributed.barrier()
    sys.stdout.flush()
    os._exit(0)  # without Python's shutdown, in which a gloo thread may abort the process


if __name__ == "__main__":
    main()
