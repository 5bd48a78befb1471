"""kill -9 anywhere in a build: what it goes on to is, byte for byte, what a build at a stroke writes.

One process imports torch and forks; each child builds, and is killed by SIGKILL from inside one of the calls that reach the disk: before
it, in the middle of a write, or right after it. So it is alive when it is killed, and where that happens is no matter of luck.
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
LEAST = 20

SCRIPT = """
import json, logging, mmap, sys
from pathlib import Path

import torch

torch.set_num_threads(1)

from hf_compress.cache import plan as plans, spaces
from hf_compress.cache.manifest import Manifest
from hf_compress.cache.selection import Selection
from hf_compress.signals import SignalSpec
from tests.cache.killing import child, event, was_killed
from tests.cache.test_build import teacher
from tests.cache.tiny_caches import Counting, builder, pairs, states

FOLDER = Path(sys.argv[1])
DATA = pairs(40)
SHARED = mmap.mmap(-1, 8)  # how many examples the teacher was asked for, seen by parent and child
plans.SHARD_EXAMPLES = 6
spaces.SAMPLE_EXAMPLES = 10
logging.getLogger("hf_compress").setLevel(logging.WARNING)  # the pace is found out by asking the teacher, too


class Telling(Counting):
    def signals(self, inputs, spec):
        event("forward", "teacher")
        found = super().signals(inputs, spec)
        SHARED[:8] = self.asked.to_bytes(8, "little")
        return found


CALLS = ("write", "fsync", "replace")


def build(folder):
    model = teacher()
    source = Telling(model)
    # What was finished, and then killed, is read and not built.
    if not (folder / "manifest.json").exists():
        builder(folder, model, DATA, SignalSpec(logits=True) | states(1, 2), Selection.parse("3t_0.5h"), source=source).build()
    return Manifest.load(folder).examples


def built(folder, *kill):
    SHARED[:8] = bytes(8)
    return child(lambda: build(folder), CALLS, *kill)


def asked():
    return int.from_bytes(SHARED[:8], "little")


assert built(FOLDER / "whole", None, "", FOLDER / "events.json") == 0
events = json.loads((FOLDER / "events.json").read_text())
everything = asked()


def moments():
    chosen = {}
    for number, (call, file) in enumerate(events):
        kind = file.split(".")[0].split("-")[0]  # shard, index, manifest, shared, building, teacher; the folder's own name
        wanted = kind in ("index", "manifest") or call == "replace" and number % 2 or number % max(1, len(events) // 14) == 0
        if wanted:
            chosen[number] = "after" if call == "replace" and kind in ("shard", "manifest") else "before"
    return chosen


results = []
for number, moment in moments().items():
    folder = FOLDER / f"killed-{number}"
    killed = built(folder, number, moment)
    before = asked()
    there = {path.name: path.stat().st_size for path in folder.iterdir()}
    resumed = built(folder)
    results.append(
        {
            "at": [*events[number], moment], "folder": folder.name, "there": there, "asked": before, "asked again": asked(),
            "killed": was_killed(killed), "resumed": resumed == 0,
        }
    )
(FOLDER / "results.json").write_text(json.dumps({"asked": everything, "kills": results}))
"""


def files(folder: Path) -> dict[str, bytes]:
    """Of the manifest all but when it was made, and the checksum that covers it."""
    left = ("building.json", "building.lock")  # of a build that was killed after all was written
    found = {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.name not in left}
    manifest = json.loads(found["manifest.json"])
    del manifest["created"], manifest["checksum"]
    return {**found, "manifest.json": json.dumps(manifest).encode()}


@pytest.mark.slow
def test_a_build_that_is_killed_anywhere_goes_on_and_loses_at_most_a_shard(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads((tmp_path / "results.json").read_text())
    kills: list[dict[str, Any]] = results["kills"]
    whole = files(tmp_path / "whole")
    rows = {shard["name"]: shard["examples"] for shard in json.loads(whole["manifest.json"])["shards"]}
    assert len(rows) >= 5 and sum(rows.values()) == 40 and results["asked"] == 40
    assert len(kills) >= LEAST
    assert any(name.endswith(".tmp") for kill in kills for name in kill["there"])  # half a file was left
    assert any("manifest.json" in kill["there"] for kill in kills) and any(not set(rows) & set(kill["there"]) for kill in kills)
    places = {f"{call} {file.split('.')[0].split('-')[0]} {moment}" for call, file, moment in (kill["at"] for kill in kills)}
    assert {
        *("write shard before", "replace shard after", "write index before", "replace index before"),
        *("write manifest before", "fsync manifest before", "replace manifest after", "forward teacher before"),
    } <= places
    for kill in kills:
        assert kill["killed"] and kill["resumed"], (kill, done.stderr[-3000:])
        finished = "manifest.json" in kill["there"]
        safe = sum(rows[name] for name in kill["there"] if name in rows)
        ahead = max(0, 10 - safe)  # of the basis's sample: asked before the first shard is written
        assert kill["asked"] - safe - ahead <= max(rows.values()), kill
        assert kill["asked again"] == (0 if finished else 40 - safe), kill
        assert files(tmp_path / kill["folder"]) == whole, kill
        assert not list((tmp_path / kill["folder"]).glob("*.tmp")), kill
