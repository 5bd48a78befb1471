"""The package's own run_glue under each launcher, on two processes, and on two nodes that are both this machine: one process's weights."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from hf_compress.run import main
from tests.deepspeed_launch import ROOT, free_port
from tests.kept_logging import logging_as_it_was as logging_as_it_was
from tests.tiny_glue import write_glue
from tests.tiny_text import model_folder

FLAGS = (
    *("glue", "--task_name", "sst2", "--model_name_or_path", "model", "--do_train", "--do_eval", "--use_cpu", "True", "--max_steps", "3"),
    *("--learning_rate", "0.1", "--optim", "sgd", "--lr_scheduler_type", "constant", "--report_to", "none", "--save_strategy", "no"),
    *("--disable_tqdm", "True", "--cache_dir", "cache", "--trainer_class", "DistillTrainer", "--teacher_model_name_or_path", "teacher"),
    *("--layer_drop_strategy", "contribution", "--num_layers_to_drop", "2"),
)
DEEPSPEED = (sys.executable, "-m", "deepspeed.launcher.runner", "--master_addr", "127.0.0.1", "--master_port")
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--master_addr", "127.0.0.1", "--master_port")
ACCELERATE = (sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--main_process_port")
MODULE = "hf_compress.run"


def commands(launcher: str, port: str) -> list[list[str]]:
    """One command for each node."""
    if launcher == "deepspeed":
        return [[*DEEPSPEED, port, "--num_accelerators", "2", "--module", MODULE, *FLAGS, "--deepspeed", "zero3"]]
    if launcher == "accelerate":
        one_machine = ("--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no")
        return [[*ACCELERATE, port, "--use_deepspeed", "--zero_stage", "2", *one_machine, "-m", MODULE, *FLAGS]]
    if launcher == "deepspeed on two nodes":
        nodes = ("--hostfile", "hosts", "--no_ssh", "--node_rank")
        return [[*DEEPSPEED, port, *nodes, rank, "--module", MODULE, *FLAGS, "--deepspeed", "zero1"] for rank in "01"]
    nodes = ("--nnodes", "2", "--nproc_per_node", "1", "--node_rank")
    return [[*TORCHRUN, port, *nodes, rank, "-m", MODULE, *FLAGS] for rank in "01"]


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["deepspeed", "accelerate", "deepspeed on two nodes", "torchrun on two nodes"])
def test_every_launcher_distils_as_one_process_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, launcher: str) -> None:
    write_glue(tmp_path)
    model_folder(tmp_path / "teacher", head="sequence_classification", seed=3)
    model_folder(tmp_path / "model", head="sequence_classification", seed=4)
    (tmp_path / "hosts").write_text("localhost slots=1\n127.0.0.1 slots=1\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["hf-compress"])
    assert main([*FLAGS, "--per_device_train_batch_size", "8", "--output_dir", "alone"]) == 0

    environment = {**os.environ, "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu"}
    nodes = [
        subprocess.Popen(
            [*command, "--per_device_train_batch_size", "4", "--output_dir", "launched"],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for command in commands(launcher, str(free_port()))
    ]
    output = [node.communicate(timeout=300)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0] * len(nodes), output[0][-4000:]
    assert "".join(output).count("kept 1-2 of 4, dropped 3-4") == 1
    alone, launched = (load_file(tmp_path / folder / "model.safetensors") for folder in ("alone", "launched"))
    assert alone.keys() == launched.keys()
    before = load_file(tmp_path / "model" / "model.safetensors")
    assert max((alone[name] - before[name]).abs().max().item() for name in alone) > 1e-2
    assert max((alone[name] - launched[name]).abs().max().item() for name in alone) < 1e-5
