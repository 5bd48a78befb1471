"""Dropping on parameters that DeepSpeed ZeRO-3 has split up: two processes, each started anew."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hf_compress.layers.drop import drop_layers
from tests.tiny_models import tiny_batch, tiny_model

SCRIPT = """
import json, os, sys
import deepspeed, torch
from transformers import AutoModelForSequenceClassification
from transformers.integrations import HfDeepSpeedConfig
from hf_compress.layers.drop import drop_layers
from tests.tiny_models import tiny_batch

folder = sys.argv[1]
deepspeed.init_distributed("gloo", verbose=False)
keep = HfDeepSpeedConfig({"zero_optimization": {"stage": 3}, "train_micro_batch_size_per_gpu": 1})
model = AutoModelForSequenceClassification.from_pretrained(folder)
weight = model.bert.encoder.layer[3].output.dense.weight
assert weight.numel() == 0, "not split up"
drop = drop_layers(model, strategy="contribution", num_layers_to_drop=2, batches=[tiny_batch(model)])
assert weight.numel() == 0, "not split up again"
with deepspeed.zero.GatheredParameters(list(model.parameters())), torch.no_grad():
    logits = model.eval()(**tiny_batch(model)).logits.tolist()
if torch.distributed.get_rank() == 0:
    stack = drop.stacks["layers"]
    with open(f"{folder}/result.json", "w") as file:
        json.dump({"kept": stack.kept, "similarities": stack.similarities, "logits": logits}, file)
os._exit(0)  # without Python's shutdown, in which a gloo thread may abort the process
"""


@pytest.mark.slow
def test_contribution_under_zero_3(tmp_path: Path) -> None:
    model = tiny_model("bert", num_layers=4)
    model.save_pretrained(tmp_path)
    (tmp_path / "script.py").write_text(SCRIPT)
    root = Path(__file__).parents[2]
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        str(tmp_path / "script.py"),
        str(tmp_path),
    ]
    ran = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(root)}, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr[-3000:]
    result = json.loads((tmp_path / "result.json").read_text())
    drop = drop_layers(model, strategy="contribution", num_layers_to_drop=2, batches=[tiny_batch(model)]).stacks["layers"]
    assert tuple(result["kept"]) == drop.kept
    assert result["similarities"] == pytest.approx(drop.similarities, abs=1e-6)
    with torch.no_grad():
        torch.testing.assert_close(torch.tensor(result["logits"]), model(**tiny_batch(model)).logits, rtol=0, atol=1e-6)
