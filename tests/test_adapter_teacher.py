"""A teacher that is an adapter on a base, and a student that is one: named, loaded, stored, resumed."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForMaskedLM, AutoModelForSequenceClassification

from hf_compress.cache.reader import TeacherCache
from hf_compress.errors import CacheError, TeacherError
from hf_compress.layers.adapter_base import load_with_adapters
from hf_compress.layers.drop import drop_layers
from hf_compress.layers.peft import save_dropped_base
from hf_compress.losses.hidden_states import HiddenStatesLoss
from hf_compress.losses.logits import LogitsLoss
from hf_compress.teacher import LiveTeacher, load_teacher
from hf_compress.teacher_identity import weights_hash
from hf_compress.trainer import DistillTrainer
from tests.cached_runs import MAP, cached, data, refused, run, tokenizer
from tests.tiny_models import tiny_batch, tiny_model
from tests.tiny_runs import NARROW, arguments, largest_difference, student, teacher, weights


def adapter_on(base: Any, seed: int = 0, **config: Any) -> Any:
    """A LoRA adapter with weights that do something, in its own classifier too."""
    torch.manual_seed(seed)
    model = get_peft_model(base, LoraConfig(**{"task_type": "SEQ_CLS", "target_modules": ["query", "dense"], "r": 2, **config}))
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "modules_to_save" in name:
            parameter.data.normal_(std=0.3)
    return model.eval()


def saved_adapter(folder: Path, seed: int = 0) -> Any:
    """An adapter for classification on a base without a classifier: that is the adapter's own."""
    tiny_model("bert", head="base", seed=1).save_pretrained(folder / "base")
    model = adapter_on(AutoModelForSequenceClassification.from_pretrained(folder / "base"), seed)
    model.save_pretrained(folder / f"adapter-{seed}")
    return model


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    shown: torch.Tensor = model.eval()(**tiny_batch(model)).logits
    return shown


def test_an_adapters_folder_is_a_teacher(tmp_path: Path) -> None:
    expected = logits(saved_adapter(tmp_path))
    loaded = [load_teacher(str(tmp_path / "adapter-0"), "sequence_classification") for _ in range(2)]
    assert torch.equal(logits(loaded[0]), expected)
    assert not any(parameter.requires_grad for parameter in LiveTeacher(loaded[0]).model.parameters())
    # The base's own classifier is drawn anew each time; it is not used, and makes no other teacher.
    assert weights_hash(loaded[0].state_dict().items()) == weights_hash(loaded[1].state_dict().items())
    next(p for name, p in loaded[1].named_parameters() if "lora_A" in name).data += 1e-3
    assert weights_hash(loaded[0].state_dict().items()) != weights_hash(loaded[1].state_dict().items())


def test_distilling_from_an_adapters_folder_is_distilling_from_the_merged_model(tmp_path: Path) -> None:
    handed_over = saved_adapter(tmp_path)
    merged = copy.deepcopy(handed_over).merge_and_unload()
    losses = [LogitsLoss(), HiddenStatesLoss()]
    runs = []
    for name, guide in (("named", str(tmp_path / "adapter-0")), ("handed over", handed_over), ("merged", merged)):
        args = arguments(tmp_path / name)
        trainer = DistillTrainer(student(), args, teacher=guide, losses=losses, train_dataset=data(), processing_class=tokenizer())
        trainer.train()
        runs.append(weights(trainer))
    assert largest_difference(runs[0], runs[2]) < 1e-6 and largest_difference(runs[0], runs[1]) == 0.0


def test_on_disk_an_adapter_is_known_by_its_weights(tmp_path: Path) -> None:
    for seed in (0, 1):
        saved_adapter(tmp_path, seed)
    first, second = (str(tmp_path / f"adapter-{seed}") for seed in (0, 1))
    run(tmp_path, first)
    run(tmp_path, teacher_model_name_or_path=first)  # trains from disk
    assert TeacherCache(tmp_path / "cache").manifest.teacher.model_class == "BertForSequenceClassification"
    refused(tmp_path, CacheError, "teacher.weights", teacher_model_name_or_path=second)


def test_a_teacher_over_a_dropped_base(tmp_path: Path) -> None:
    tiny_model("bert", num_layers=6).save_pretrained(tmp_path / "full")
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "full")
    drop_layers(base, strategy="symmetric")
    model = adapter_on(base)
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(TeacherError, match="was not saved with it"):
        load_teacher(str(tmp_path / "adapter"), "sequence_classification")
    save_dropped_base(model, tmp_path / "adapter")
    model.save_pretrained(tmp_path / "adapter")
    assert torch.equal(logits(load_teacher(str(tmp_path / "adapter"), "sequence_classification")), logits(model))


def test_an_adapter_for_another_task(tmp_path: Path) -> None:
    tiny_model("bert", head="masked_lm").save_pretrained(tmp_path / "base")
    adapter_on(AutoModelForMaskedLM.from_pretrained(tmp_path / "base"), task_type=None).save_pretrained(tmp_path / "adapter")
    with pytest.raises(TeacherError, match="is an adapter for masked_lm, the student is for sequence_classification"):
        load_teacher(str(tmp_path / "adapter"), "sequence_classification")
    # Where its predictions are not read, its layers teach.
    assert load_teacher(str(tmp_path / "adapter"), "sequence_classification", needs_logits=False).config.num_hidden_layers == 4


def test_a_student_of_dropped_layers_is_saved_with_its_base(tmp_path: Path) -> None:
    """Dropped by hand, then adapted: what the trainer saves loads again."""
    tiny_model("bert", num_layers=6).save_pretrained(tmp_path / "full")
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "full")
    drop_layers(base, strategy="top")
    model = adapter_on(base)
    guide = tiny_model("bert", hidden_size=8, intermediate_size=12)
    args = arguments(tmp_path / "out", max_steps=2, per_device_train_batch_size=8)
    more = {"losses": [LogitsLoss(), HiddenStatesLoss()], "train_dataset": data(), "processing_class": tokenizer()}
    trainer = DistillTrainer(model, args, teacher=guide, **more)
    trainer.train()
    trainer.save_model()
    assert torch.equal(logits(load_with_adapters(tmp_path / "out")), logits(model))
    stored = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert stored and not [name for name in stored if "projection" in name]


def lora_student() -> Any:
    torch.manual_seed(4)
    config = LoraConfig(task_type="SEQ_CLS", target_modules=["query", "value"], r=2)
    return get_peft_model(tiny_model("bert", num_layers=2, seed=2, **NARROW), config)


@pytest.mark.parametrize("stored", [False, True])
def test_a_lora_student_resumes_with_adapter_and_projections(stored: bool, tmp_path: Path) -> None:
    settings = {"max_steps": 4, "per_device_train_batch_size": 4, "learning_rate": 0.05, "save_strategy": "steps", "save_steps": 2}
    losses = [LogitsLoss(), HiddenStatesLoss(MAP)]

    def trained(folder: str, checkpoint: str | None = None) -> DistillTrainer:
        if stored:
            guide = None if (tmp_path / folder / "cache").exists() else teacher()
            return cached(tmp_path / folder, lora_student(), guide, losses=losses, resume=checkpoint, **settings)
        args = arguments(tmp_path / folder / "out", **settings)
        torch.manual_seed(5)
        more = {"train_dataset": data(), "processing_class": tokenizer()}
        trainer = DistillTrainer(lora_student(), args, teacher=teacher(), losses=losses, **more)
        trainer.train(resume_from_checkpoint=checkpoint)
        return trainer

    unbroken = trained("a")
    start, end = dict(lora_student().named_parameters()), weights(unbroken)
    moved = {name for name in end if name not in start or not torch.equal(end[name], start[name])}
    trainable = {name for name, parameter in unbroken.model.named_parameters() if parameter.requires_grad}
    assert moved == trainable
    assert {name for name in trainable if "lora_" not in name and "modules_to_save" not in name} == {
        "hf_compress_projections.layers_shared.bias",
        "hf_compress_projections.layers_shared.weight",
    }
    checkpoint = tmp_path / "a" / "out" / "checkpoint-2"
    assert (checkpoint / "distill_projections.safetensors").is_file() and not (checkpoint / "model.safetensors").exists()
    torch.manual_seed(99)
    resumed = trained("a", str(checkpoint))
    assert resumed.state.global_step == 4
    assert largest_difference(weights(resumed), end) < 1e-6
