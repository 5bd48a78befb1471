"""Layers that go while two processes train: DDP finds the rest, a resumed run goes on, and what would wait for ever is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.test_gradual_drop import distilling, weights

ROOT = Path(__file__).parents[1]

SCRIPT = """
import json, os, sys
from pathlib import Path
from safetensors.torch import save_file
from transformers import Trainer
from hf_compress import LayerDropCallback, LayerDropError
from tests.test_gradual_drop import ITERATIVE, arguments, bert, distilling, rows

folder = Path(sys.argv[1])
whole = distilling(folder / "run", save_strategy="epoch", gradient_checkpointing=True)
whole.train()
resumed = distilling(folder / "again", gradient_checkpointing=True)
resumed.train(resume_from_checkpoint=str(folder / "run" / "checkpoint-3"))
args = arguments(folder / "plain", ddp_find_unused_parameters=False)
try:
    Trainer(bert(), args, train_dataset=rows(), callbacks=[LayerDropCallback(**ITERATIVE)])
    refused = ""
except LayerDropError as error:
    refused = str(error)
if whole.is_world_process_zero():
    for name, trainer in (("whole", whole), ("resumed", resumed)):
        save_file({name: p.detach().clone() for name, p in trainer.model.named_parameters()}, folder / f"{name}.safetensors")
    (folder / "report.json").write_text(json.dumps({"refused": refused, "wrapped": type(whole.model_wrapped).__name__}))
sys.stdout.flush()
os._exit(0)  # without Python's shutdown, in which a gloo thread may abort the process
"""


@pytest.mark.slow
def test_two_processes_lose_the_layers_that_one_loses(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script), str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["wrapped"] == "DistributedDataParallel"
    assert "--ddp_find_unused_parameters True" in report["refused"]
    one = distilling(tmp_path / "one", per_device_train_batch_size=16)
    one.train()
    two, resumed = load_file(tmp_path / "whole.safetensors"), load_file(tmp_path / "resumed.safetensors")
    for name, weight in weights(one).items():
        assert torch.allclose(two[name], weight, atol=1e-5), name
        assert torch.allclose(resumed[name], weight, atol=1e-5), name


SHARDED = """
import os, sys
from pathlib import Path
from transformers import Trainer
from hf_compress import LayerDropCallback, LayerDropError
from tests.test_gradual_drop import ITERATIVE, arguments, bert, rows

zero = {"zero_optimization": {"stage": 2}, "train_micro_batch_size_per_gpu": "auto", "train_batch_size": "auto"}
more = {"deepspeed": zero} if sys.argv[2] == "DeepSpeed" else {"fsdp": True}
try:
    Trainer(bert(), arguments(Path(sys.argv[1]), **more), train_dataset=rows(), callbacks=[LayerDropCallback(**ITERATIVE)])
except LayerDropError as error:
    print(error, flush=True)
os._exit(0)
"""


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["DeepSpeed", "FSDP"])
def test_engines_that_split_parameters_up_are_refused(tmp_path: Path, engine: str) -> None:
    (tmp_path / "script.py").write_text(SHARDED)
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc_per_node",
            "1",
            "script.py",
            str(tmp_path / "out"),
            engine,
        ],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert f"Layers cannot go while this run trains: {engine} has" in done.stdout, done.stderr[-3000:]
