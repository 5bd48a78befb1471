"""Predictions compared in chunks by two processes: the step of one process that compares them whole."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.launching import launch

SCRIPT = """
import json, os, sys
from pathlib import Path
from hf_compress import CompressionArguments, DistillTrainer, LabelsLoss, LogitsLoss
from tests.tiny_models import tiny_model
from tests.tiny_runs import arguments, rows

folder, batch_size, chunk_size, zero = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
more = {}
if zero:
    stage = {"stage": zero, "stage3_gather_16bit_weights_on_model_save": zero == 3}
    more["deepspeed"] = {"zero_optimization": stage, "zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False,
                         "train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto"}
args = arguments(folder, per_device_train_batch_size=batch_size, max_steps=3, **more)
student, teacher = tiny_model("gpt2", num_layers=2, head="causal_lm", seed=2), tiny_model("gpt2", head="causal_lm", seed=1)
def labels(row):
    return [token if token and place % 3 else -100 for place, token in enumerate(row["input_ids"])]

data = [{"input_ids": row["input_ids"], "attention_mask": row["attention_mask"], "labels": labels(row)} for row in rows(24)]
flags = CompressionArguments(distill_logits_chunk_size=chunk_size)
losses = [LogitsLoss(), LabelsLoss(weight=0.5)]
trainer = DistillTrainer(student, args, teacher=teacher, losses=losses, compression=flags, train_dataset=data)
trainer.train()
trainer.save_model(str(folder))
if trainer.is_world_process_zero():
    (folder / "log.json").write_text(json.dumps(trainer.state.log_history))
"""


def run(
    tmp_path: Path, name: str, processes: int, batch_size: int, chunk_size: int, zero: int = 0
) -> tuple[dict[str, torch.Tensor], list[dict[str, float]]]:
    folder = tmp_path / name
    folder.mkdir()
    launch(folder, SCRIPT, str(batch_size), str(chunk_size), str(zero), processes=processes)
    return load_file(folder / "model.safetensors"), json.loads((folder / "log.json").read_text())


@pytest.mark.slow
def test_two_processes_in_chunks_step_as_one_process_does_whole(tmp_path: Path) -> None:
    whole, log = run(tmp_path, "whole", 1, 16, 0)
    assert log[0]["loss"] > 0.01 and log[0]["grad_norm"] > 0.01
    for zero in (0, 3):  # DDP; under ZeRO-3 both must call the head equally often, and have unequally many tokens
        chunked, log_of_chunked = run(tmp_path, f"chunked {zero}", 2, 8, 7, zero)
        for name in whole:
            assert torch.allclose(whole[name], chunked[name], atol=1e-5), (zero, name)
        for before, after in zip(log[:3], log_of_chunked[:3], strict=True):
            assert after["loss_logits"] == pytest.approx(before["loss_logits"], rel=1e-4)
            assert after["loss_labels"] == pytest.approx(before["loss_labels"], rel=1e-4)


SHARDED = """
import os, sys
from pathlib import Path
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from hf_compress import LabelsLoss, LiveTeacher, LogitsLoss
from hf_compress.chunked_logits import ChunkSettings
from hf_compress.distillation import Distillation
from hf_compress.task import ModelShape
from tests.tiny_models import tiny_batch, tiny_model

dist.init_process_group("gloo")
mesh = init_device_mesh("cpu", (2,))

def gradients(batch, chunk_size, *wrapped):
    model, teacher = (tiny_model("llama", num_layers=2, head="causal_lm", seed=seed) for seed in (2, 1))
    losses = [LogitsLoss(), LabelsLoss(weight=0.5)]
    shapes = {None: ModelShape.of(teacher)}
    distillation = Distillation(model.train(), losses, LiveTeacher(teacher), shapes, chunks=ChunkSettings(chunk_size))
    distillation.start()
    for path in wrapped:
        fully_shard(model.get_submodule(path), mesh=mesh)
    counts = distillation.counts([batch], torch.device("cpu"))
    signals = distillation.teacher_signals(batch)
    distillation.show(signals, batch)
    outputs = model(**{name: value for name, value in batch.items() if name != "labels" or distillation.needs_labels})
    parts = distillation.parts(outputs, signals, batch, counts, lambda shown, count: shown["loss"])
    sum(value * weight for value, weight in parts.values()).backward()
    found = {name: each.grad for name, each in model.named_parameters()}
    return {name: each.full_tensor() if hasattr(each, "full_tensor") else each for name, each in found.items()}

model = tiny_model("llama", head="causal_lm")
batches = [tiny_batch(model, labels=True, lengths=lengths) for lengths in ((7, 5, 4), (20, 18, 16))]
whole = [gradients(batch, 0) for batch in batches]
for wrapped in ([""], ["lm_head", ""]):
    for name, gradient in gradients(batches[dist.get_rank()], 5, *wrapped).items():
        assert torch.allclose(gradient, (whole[0][name] + whole[1][name]) / 2, atol=1e-6), (wrapped, name)
        assert gradient.abs().max() > 0, name
(Path(sys.argv[1]) / f"equal-{dist.get_rank()}").touch()
dist.barrier()
"""


@pytest.mark.slow
def test_a_sharded_student(tmp_path: Path) -> None:
    launch(tmp_path, SHARDED)
    assert len(list(tmp_path.glob("equal-*"))) == 2
