"""kill -9 anywhere in an append: the cache opens whole, as it was before or as it is after, and the next append goes on from there.

As in test_build_killed: one process forks, and each child is killed from inside one of its calls that reach the disk.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
LEAST = 24

SCRIPT = """
import json, shutil, sys
from pathlib import Path

import torch

torch.set_num_threads(1)

from hf_compress.cache.missing import HowToAsk, MissingExamples
from hf_compress.cache.reader import TeacherCache
from hf_compress.cache.selection import Selection
from hf_compress.cache.verify import verify
from hf_compress.signals import SignalSpec
from tests.cache.killing import child, was_killed
from tests.cache.tiny_caches import SPECIAL, builder, built, canonical, pairs, states
from tests.tiny_models import tiny_model

FOLDER = Path(sys.argv[1])
DATA = pairs(40)
SPEC = SignalSpec(logits=True) | states(1, 2)
MODEL = tiny_model("bert", num_layers=2, seed=1)

CALLS = ("write", "fsync", "replace", "unlink")


def append(folder):
    # Twice, as at two checkpoints; what is there already is not asked for.
    for part in (DATA[20:30], DATA[30:]):
        cache = TeacherCache(folder)
        run = builder(folder, MODEL, DATA, cache.spec, cache.stored.selection).run
        missing = MissingExamples(cache, HowToAsk(lambda: run, SPECIAL, 0))
        missing.records(cache, canonical(part))
        missing.write()
        missing.close()
        assert not missing._pending


def told(cache, data):
    return {name: tensor.clone() for name, tensor in cache.read(canonical(data), SPEC).named_tensors().items()}


def same(one, other):
    return all(torch.allclose(one[name], other[name], atol=1e-5) for name in other)


built(FOLDER / "before", MODEL, DATA[:20], SPEC, Selection.parse("3t_0.5h"))
shutil.copytree(FOLDER / "before", FOLDER / "whole")
assert child(lambda: append(FOLDER / "whole"), CALLS, report=FOLDER / "events.json") == 0
events = json.loads((FOLDER / "events.json").read_text())
expected = told(TeacherCache(FOLDER / "whole"), DATA)

def moments(number, call):
    if call in ("replace", "unlink"):
        return "before", "after"
    return ("before",) if number >= len(events) // 2 else ()  # of the first append the steps alone


results = []
for number, (call, file) in enumerate(events):
    for moment in moments(number, call):
        folder = FOLDER / f"killed-{number}-{moment}"
        shutil.copytree(FOLDER / "before", folder)
        reader = TeacherCache(folder)
        killed = child(lambda: append(folder), CALLS, number, moment)
        there = sorted(path.name for path in folder.iterdir())
        examples, problems = len(TeacherCache(folder)), verify(folder).problems
        reads = same(told(reader, DATA[:20]), told(TeacherCache(FOLDER / "before"), DATA[:20]))
        reads_on = same(told(TeacherCache(folder), DATA[:examples]), told(TeacherCache(FOLDER / "whole"), DATA[:examples]))
        resumed = child(lambda: append(folder), CALLS)
        results.append(
            {
                "at": [call, file, moment], "there": there, "examples": examples, "problems": problems, "reads": reads and reads_on,
                "killed": was_killed(killed), "resumed": resumed == 0,
                "finished": len(TeacherCache(folder)), "problems then": verify(folder).problems,
                "same": same(told(TeacherCache(folder), DATA), expected), "left": sorted(path.name for path in folder.iterdir()),
            }
        )
        shutil.rmtree(folder)
whole = sorted(path.name for path in (FOLDER / "whole").iterdir())
(FOLDER / "results.json").write_text(json.dumps({"whole": whole, "kills": results}))
"""


@pytest.mark.slow
def test_an_append_that_is_killed_anywhere_leaves_a_whole_cache(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads((tmp_path / "results.json").read_text())
    kills: list[dict[str, Any]] = results["kills"]
    assert len(kills) >= LEAST
    assert {kill["examples"] for kill in kills} == {20, 30, 40}  # before, between, after
    assert any(name.endswith(".tmp") for kill in kills for name in kill["there"])  # half a file was left
    places = {f"{call} {file.split('.')[0].split('-')[0]} {moment}" for call, file, moment in (kill["at"] for kill in kills)}
    assert {
        *("write shard before", "replace shard after", "write index before", "replace index after"),
        *("write manifest before", "replace manifest before", "replace manifest after", "unlink index before", "unlink index after"),
    } <= places
    for kill in kills:
        assert kill["killed"] and kill["resumed"], (kill, done.stderr[-3000:])
        assert kill["problems"] == [] and kill["problems then"] == [] and kill["reads"], kill
        assert kill["finished"] == 40 and kill["same"], kill
        # Nothing is left of the killed one but a lock's file, where all was appended already.
        indexes = [name for name in kill["left"] if name.startswith("index")]
        assert len(indexes) == 1 or kill["examples"] == 40, kill
        assert not any(name.endswith(".tmp") for name in kill["left"]) or kill["examples"] == 40, kill
