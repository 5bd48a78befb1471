"""Starts `tests/deepspeed_job.py` under the launcher of DeepSpeed, two processes on the CPU."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.tiny_models import tiny_model
from tests.tiny_runs import NARROW, student, teacher

ROOT = Path(__file__).parents[1]


def job(folder: Path, *scenarios: str) -> dict[str, Any]:
    """Run scenarios under the launcher of DeepSpeed."""
    teacher().save_pretrained(folder / "teacher")
    tiny_model("bert", num_layers=4, seed=9).save_pretrained(folder / "wide")
    student(**NARROW).save_pretrained(folder / "narrow")
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_accelerators", "2", "--master_port", str(free_port())]
    done = subprocess.run(
        [*launcher, str(ROOT / "tests" / "deepspeed_job.py"), str(folder), *scenarios],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return json.loads((folder / "results.json").read_text())


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
