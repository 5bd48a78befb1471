"""kill -9 of one of two processes that build: the other ends too, and the same command goes on, with one process or two."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from hf_compress.cache.reader import TeacherCache
from tests.cache.test_build_killed import files
from tests.cached_runs import run
from tests.launching import END, command, environment
from tests.tiny_runs import teacher

SCRIPT = """
import os, sys, time
from pathlib import Path
import torch
from hf_compress.cache import build, plan
from tests.cached_runs import run
from tests.tiny_runs import teacher

torch.set_num_threads(1)
plan.SHARD_EXAMPLES, build.CPU_BATCH_TOKENS = 2, 40
guide = teacher()
guide.register_forward_hook(lambda *_: time.sleep(float(sys.argv[2])))
(Path(sys.argv[1]) / f"pid-{os.environ['RANK']}").write_text(str(os.getpid()))
run(Path(sys.argv[1]), guide)
"""


def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_compress.cache.plan.SHARD_EXAMPLES", 2)
    monkeypatch.setattr("hf_compress.cache.build.CPU_BATCH_TOKENS", 40)


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 1])
def test_the_other_process_ends_and_the_build_goes_on(tmp_path: Path, killed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT + END)
    cache = tmp_path / "cache"
    with subprocess.Popen(
        command(script, str(tmp_path), "1"), env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as group:
        try:
            until = time.monotonic() + 120
            while len(list(cache.glob("shard-*.safetensors"))) < 2 and time.monotonic() < until and group.poll() is None:
                time.sleep(0.05)
            os.kill(int((tmp_path / f"pid-{killed}").read_text()), signal.SIGKILL)
            assert group.wait(60) != 0
        finally:
            group.kill()
    for rank in range(2):
        assert not Path(f"/proc/{(tmp_path / f'pid-{rank}').read_text()}").exists()
    there = len(list(cache.glob("shard-*.safetensors")))
    assert there >= 2 and not (cache / "manifest.json").exists()

    small_shards(monkeypatch)
    if killed:  # two again
        done = subprocess.run(command(script, str(tmp_path), "0"), env=environment(), capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
    else:
        guide, asked = teacher(), []
        guide.register_forward_hook(lambda module, args, output: asked.append(len(output["logits"])))
        run(tmp_path, guide)
        assert 0 < sum(asked) <= 16 - 2 * (there - 1)
    assert len(TeacherCache(cache)) == 16
    run(tmp_path / "at a stroke", teacher())
    assert files(cache) == files(tmp_path / "at a stroke" / "cache")
