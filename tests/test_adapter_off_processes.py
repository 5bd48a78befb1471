"""The student as its own teacher in two real processes: under DDP, and under ZeRO-3, where each process holds half of every weight."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parents[1]

SCRIPT = """
import os, sys
from pathlib import Path
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from hf_compress import AttentionScoresLoss, DistillTrainer, HiddenStatesLoss, LabelsLoss, LogitsLoss
from hf_compress.layers.zero import whole_parameters
from tests.tiny_models import tiny_model
from tests.tiny_runs import arguments, rows

folder, batch_size, how = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
zero = {"zero_optimization": {"stage": 3}, "train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto",
        "zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False, "gradient_clipping": "auto"}
more = {"deepspeed": zero} if how == "zero3" else {"gradient_checkpointing": how == "checkpointed"}
torch.manual_seed(3)
model = get_peft_model(tiny_model("bert", num_layers=2), LoraConfig(task_type="SEQ_CLS", target_modules=["query", "dense"], r=2))
for name, parameter in model.named_parameters():
    if "lora_B" in name:
        parameter.data.normal_(std=0.1)  # so that the base says something else from the first step on
args = arguments(folder, per_device_train_batch_size=batch_size, max_steps=2, learning_rate=0.5, **more)
losses = [LogitsLoss(), HiddenStatesLoss(), AttentionScoresLoss(), LabelsLoss()]
trainer = DistillTrainer(model, args, teacher="adapter_off", losses=losses, train_dataset=rows())
trainer.train()
with whole_parameters(trainer.model):
    if trainer.is_world_process_zero():
        trained = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
        assert all(entry["loss_logits"] > 1e-5 for entry in trainer.state.log_history if "loss" in entry)
        save_file(trained, folder / "weights.safetensors")
sys.stdout.flush()
os._exit(0)  # without Python's shutdown, in which a gloo thread may abort the process
"""


def run(tmp_path: Path, how: str, processes: int, batch_size: int) -> dict[str, torch.Tensor]:
    folder = tmp_path / how
    folder.mkdir()
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)] if processes > 1 else []
    done = subprocess.run(
        [sys.executable, *launcher, str(script), str(folder), str(batch_size), how],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return load_file(folder / "weights.safetensors")


@pytest.mark.slow
def test_two_processes_step_as_one_does(tmp_path: Path) -> None:
    one = run(tmp_path, "one", 1, 16)
    assert any("lora_A" in name for name in one)
    for how in ("checkpointed", "zero3"):
        two = run(tmp_path, how, 2, 8)
        for name in one:
            assert torch.allclose(one[name], two[name], atol=1e-6), (how, name)
