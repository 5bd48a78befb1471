"""Pruned students in training: with the teacher live and on disk, with layers dropped, and under a script that knows nothing of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, PreTrainedModel, Trainer

from hf_compress.arguments import CompressionArguments
from hf_compress.callbacks import LayerDropCallback
from hf_compress.errors import LossError
from hf_compress.layers.record import recorded_drop
from hf_compress.losses.recipes import layerwise, mud, tinybert
from hf_compress.run import main
from hf_compress.students.prune import prune_student
from hf_compress.students.pruned_models import Pruned
from hf_compress.task import kind_of_classes
from hf_compress.trainer import DistillTrainer
from tests.cached_runs import data, tokenizer
from tests.students.pruning import labelled, teacher
from tests.tiny_runs import arguments, largest_difference, weights


def pruned(guide: PreTrainedModel, **more: Any) -> PreTrainedModel:
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 10, "embedding_rank": 6}
    return prune_student(guide, labelled(guide), **{**sizes, **more})


def trained(folder: Path, student: PreTrainedModel, guide: PreTrainedModel | None, recipe: Any, **flags: Any) -> DistillTrainer:
    torch.manual_seed(5)
    trainer = DistillTrainer(
        student,
        arguments(folder / "out", max_steps=8, per_device_train_batch_size=4, learning_rate=0.02),
        teacher=guide,
        losses=recipe,
        compression=CompressionArguments(**flags),
        train_dataset=data(),
        processing_class=tokenizer(),
    )
    trainer.train()
    return trainer


def test_mud_from_disk_moves_the_weights_as_mud_live_does_and_the_student_comes_back(tmp_path: Path) -> None:
    guide = teacher(num_layers=4)
    student = pruned(guide)
    student.save_pretrained(tmp_path / "student")
    start = {name: parameter.detach().clone() for name, parameter in student.named_parameters()}
    stored = {"teacher_cache_dir": str(tmp_path / "cache"), "teacher_cache_dtype": "float32"}
    live = trained(tmp_path / "live", AutoModelForSequenceClassification.from_pretrained(tmp_path / "student"), guide, mud())
    cached = trained(tmp_path / "cached", student, guide, mud(), **stored)
    again = trained(
        tmp_path / "again", AutoModelForSequenceClassification.from_pretrained(tmp_path / "student"), None, mud(),
        teacher_cache_dir=stored["teacher_cache_dir"],
    )  # fmt: skip
    assert largest_difference(weights(cached), start) > 1e-3
    assert largest_difference(weights(cached), weights(live)) < 1e-6
    assert largest_difference(weights(cached), weights(again)) < 1e-6
    for part in ("word_embeddings.weight", "word_embeddings.projection.weight", "attention.self.query.weight"):
        name = next(name for name in start if name.endswith(part))
        assert not torch.equal(weights(cached)[name], start[name])
    cached.save_model(str(tmp_path / "saved"))
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved")
    assert isinstance(loaded, Pruned)
    assert all(torch.equal(value, cached.model.state_dict()[name]) for name, value in loaded.state_dict().items())


def test_attention_is_left_out_or_refused_where_heads_differ_and_compared_where_they_do_not(tmp_path: Path) -> None:
    guide = teacher(num_layers=4)
    with pytest.raises(LossError, match="the student has 2 heads and the teacher 4"):
        trained(tmp_path / "refused", pruned(guide), guide, tinybert())
    left_out = trained(tmp_path / "left_out", pruned(guide), guide, layerwise())
    assert not any("attention_scores" in name for entry in left_out.state.log_history for name in entry)
    compared = trained(tmp_path / "compared", pruned(guide, num_attention_heads=4), guide, tinybert())
    assert any("attention_scores" in name for entry in compared.state.log_history for name in entry)


def test_a_pruned_teacher_can_teach_from_disk(tmp_path: Path) -> None:
    guide = pruned(teacher(num_layers=4), num_hidden_layers=4, num_attention_heads=3)
    assert kind_of_classes((type(guide).__name__,)) == "sequence_classification"
    student = pruned(guide, embedding_rank=5)
    before = {name: parameter.detach().clone() for name, parameter in student.named_parameters()}
    trained(tmp_path / "build", student, guide, mud(), teacher_cache_dir=str(tmp_path / "cache"))
    again = trained(tmp_path / "again", pruned(guide, embedding_rank=5), None, mud(), teacher_cache_dir=str(tmp_path / "cache"))
    assert largest_difference(weights(again), before) > 1e-3


def test_the_callback_drops_its_layers(tmp_path: Path) -> None:
    guide = teacher(num_layers=4)
    student = prune_student(guide, labelled(guide), num_attention_heads=2, embedding_rank=6)
    trainer = Trainer(
        student,
        arguments(tmp_path),
        train_dataset=data(),
        processing_class=tokenizer(),
        callbacks=[LayerDropCallback(strategy="symmetric", num_layers_to_drop=2)],
    )
    trainer.train()
    trainer.save_model()
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    drop = recorded_drop(loaded.config)
    assert drop is not None
    assert (loaded.config.num_hidden_layers, drop["layers"].kept) == (2, (1, 4))


@pytest.mark.parametrize("flags", [[], ["--layer_drop_strategy", "top", "--num_layers_to_drop", "1"]])
def test_a_script_that_knows_nothing_of_it_loads_it_under_run(tmp_path: Path, flags: list[str]) -> None:
    prune_student(teacher(num_layers=4), embedding_rank=6).save_pretrained(tmp_path / "student")
    script = tmp_path / "script.py"
    script.write_text(
        "import sys\nfrom transformers import AutoModelForSequenceClassification, Trainer, TrainingArguments\n"
        "model = AutoModelForSequenceClassification.from_pretrained(sys.argv[1])\n"
        "trainer = Trainer(model, TrainingArguments(output_dir=sys.argv[2], use_cpu=True, report_to=[]))\ntrainer.save_model()\n"
    )
    assert main([str(script), str(tmp_path / "student"), str(tmp_path / "out"), *flags]) == 0
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert isinstance(loaded, Pruned)
    assert loaded.config.num_hidden_layers == (3 if flags else 4)
