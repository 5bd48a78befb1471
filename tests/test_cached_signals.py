"""How a stored teacher reaches the student, that the live one is let go, and scripts that store first and train later."""

from __future__ import annotations

import gc
import os
import pickle
import shutil
import subprocess
import sys
import weakref
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertForSequenceClassification

from hf_compress.arguments import CompressionArguments
from hf_compress.cache.reader import TeacherCache
from hf_compress.cached_teacher import ENTRY, CachedTeacher, StoredSignals
from hf_compress.losses.logits import LogitsLoss
from hf_compress.run import main
from hf_compress.signals import Signals, SignalSpec
from hf_compress.trainer import DistillTrainer
from tests.cache.tiny_caches import built, padded, pairs, states
from tests.cached_runs import (
    data,
    tokenizer,
)
from tests.tiny_models import tiny_model
from tests.tiny_runs import arguments, student, teacher
from tests.training_scripts import read_report, training_flags, write_script

ROOT = Path(__file__).parents[1]

# --- how signals travel ---


def reading(tmp_path: Path) -> tuple[CachedTeacher, SignalSpec]:
    spec = SignalSpec(logits=True) | states(2)
    cache = built(tmp_path, teacher(), pairs(), spec)
    return CachedTeacher(cache, pad_token_id=0, device=torch.device("cpu")), spec


def test_a_collator_reads_ahead_in_a_thread_and_travels_to_workers(tmp_path: Path) -> None:
    source, spec = reading(tmp_path)
    source.cache.put_labels_in_order((1, 0))
    collator = source.reading(NamedCollator(), spec)
    batch = collator(pairs()[:4])
    found = source.signals(batch, spec)
    bare = {name: value for name, value in batch.items() if name != ENTRY}
    again = source.signals(bare, spec)  # made by a collator that is not ours
    copied = pickle.loads(pickle.dumps(collator))  # its thread stays here
    others = copied(pairs()[:4])[ENTRY].get()
    for other in (again, others):
        for name, tensor in found.named_tensors().items():
            assert torch.equal(tensor, other.named_tensors()[name])
    with torch.no_grad():
        live = teacher()(**bare).logits
    assert torch.allclose(found.logits["logits"], live.flip(-1), atol=1e-5)
    # Two threads share no open shards: each opens and lets go its own.
    assert collator.cache._shards.keys() == source.cache._shards.keys() == {0}
    assert collator.cache._shards[0] is not source.cache._shards[0]
    source.close()
    assert not collator.cache._shards and not source.cache._shards
    assert torch.equal(source.signals(bare, spec).logits["logits"], found.logits["logits"])


class NamedCollator:
    def __call__(self, examples: list[Any]) -> dict[str, torch.Tensor]:
        return padded()(examples)


def test_moving_does_not_wait_for_the_disk_and_casts_nothing() -> None:
    future: Future[Signals] = Future()
    stored = StoredSignals(future)
    assert stored.to("meta", non_blocking=True) is stored and stored.pin_memory() is stored  # not done yet
    future.set_result(Signals(logits={"logits": torch.ones(2, 2, dtype=torch.float16)}))
    assert stored.get().logits["logits"].device.type == "meta"
    assert stored.get().logits["logits"].dtype == torch.float16


# --- the teacher is let go ---


def test_the_teacher_is_gone_while_the_student_trains(tmp_path: Path) -> None:
    guide = teacher()
    gone = weakref.ref(guide)
    alive: list[bool] = []

    class Watching(DistillTrainer):
        def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            gc.collect()
            alive.append(gone() is not None)
            return super().training_step(*args, **kwargs)

    flags = CompressionArguments(teacher_cache_dir=str(tmp_path / "cache"))
    settings = arguments(tmp_path / "out", per_device_train_batch_size=4, max_steps=2)
    trainer = Watching(
        student(), settings, teacher=guide, compression=flags, train_dataset=data(), losses=[LogitsLoss()], processing_class=tokenizer()
    )
    del guide
    assert gone() is not None
    trainer.train()
    assert alive == [False, False]
    assert trainer.state.log_history[0]["loss_logits"] > 0


def test_a_teacher_from_a_path_is_gone_too(tmp_path: Path) -> None:
    tiny_model("bert", num_layers=5).save_pretrained(tmp_path / "teacher")  # nobody else has five
    alive: list[int] = []

    class Counting(DistillTrainer):
        def _report_teacher(self, distillation: Any) -> None:
            alive.append(loaded())

        def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            alive.append(loaded())
            return super().training_step(*args, **kwargs)

    def loaded() -> int:
        gc.collect()
        return sum(type(found) is BertForSequenceClassification and found.config.num_hidden_layers == 5 for found in gc.get_objects())

    flags = CompressionArguments(teacher_cache_dir=str(tmp_path / "cache"), teacher_model_name_or_path=str(tmp_path / "teacher"))
    settings = arguments(tmp_path / "out", per_device_train_batch_size=4)
    trainer = Counting(student(), settings, compression=flags, train_dataset=data(), losses=[LogitsLoss()], processing_class=tokenizer())
    trainer.train()
    assert alive == [1, 0]
    assert trainer.distillation is not None and isinstance(trainer.distillation.teacher, CachedTeacher)


# --- scripts ---


def flags_of(folder: Path, *more: str) -> list[str]:
    script = write_script(folder)
    return [str(script), *training_flags(folder), "--trainer_class", "DistillTrainer", "--teacher_cache_dir", str(folder / "cache"), *more]


@pytest.fixture
def saved_teacher(tmp_path: Path) -> str:
    tiny_model("bert", num_layers=4, seed=3).save_pretrained(tmp_path / "teacher")
    return str(tmp_path / "teacher")


def test_a_script_builds_only_and_later_trains_without_the_teacher(tmp_path: Path, saved_teacher: str) -> None:
    hsk = ("--hsk", "1l_3t_0.5h", "--distill_recipe", "layerwise")
    building = flags_of(tmp_path, "--build_teacher_cache_only", "--teacher_model_name_or_path", saved_teacher, *hsk)
    assert main(building) == 0
    assert len(TeacherCache(tmp_path / "cache")) == 8
    assert not (tmp_path / "report.json").exists() and not (tmp_path / "out" / "model.safetensors").exists()
    before = (tmp_path / "cache" / "manifest.json").read_bytes()
    assert main(building) == 0  # it is there: nothing to do
    assert not (tmp_path / "report.json").exists()
    assert (tmp_path / "cache" / "manifest.json").read_bytes() == before
    shutil.rmtree(saved_teacher)
    assert main(flags_of(tmp_path)) == 0
    logged = read_report(tmp_path)["logged"]
    assert {"loss_logits", "loss_hidden_states"} <= set(logged) and "loss_attention_scores" not in logged
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_a_script_that_has_neither_cache_nor_teacher(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(flags_of(tmp_path)) == 2
    assert "no finished teacher on disk" in capsys.readouterr().err
    assert not (tmp_path / "cache").exists()


@pytest.mark.slow
def test_the_same_in_processes_of_their_own(tmp_path: Path, saved_teacher: str) -> None:
    def start(*more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "hf_compress.run", *flags_of(tmp_path, *more)],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=300,
        )

    built_only = start("--build_teacher_cache_only", "--teacher_model_name_or_path", saved_teacher)
    assert built_only.returncode == 0, built_only.stderr
    assert "ending without training" in built_only.stderr and not (tmp_path / "report.json").exists()
    shutil.rmtree(saved_teacher)
    later = start()
    assert later.returncode == 0, later.stderr
    assert "loss_logits" in read_report(tmp_path)["logged"]
