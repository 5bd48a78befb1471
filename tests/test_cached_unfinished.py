"""A teacher on disk that is not whole: half built, being built, damaged."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from hf_compress.cache.reader import TeacherCache
from hf_compress.cache.shard import shard_name
from hf_compress.errors import CacheError
from hf_compress.layers.layer_map import LayerMap
from hf_compress.losses.hidden_states import HiddenStatesLoss
from hf_compress.losses.logits import LogitsLoss
from tests.cached_runs import (
    other_rows,
    refused,
    run,
)
from tests.tiny_models import tiny_model
from tests.tiny_runs import teacher

ROOT = Path(__file__).parents[1]


def stopped(folder: Path, monkeypatch: pytest.MonkeyPatch, shards: int, **more: Any) -> None:
    """A build that ends after some shards; a shard holds 4 examples or so."""
    guide = teacher()

    def stop(*_: Any) -> None:
        if len(list((folder / "cache").glob("shard-*.safetensors"))) == shards:
            raise KeyboardInterrupt

    guide.register_forward_hook(stop)
    monkeypatch.setattr("hf_compress.cache.plan.SHARD_EXAMPLES", 4)
    monkeypatch.setattr("hf_compress.cache.build.CPU_BATCH_TOKENS", 40)
    with pytest.raises(KeyboardInterrupt):
        run(folder, guide, **more)
    assert len(list((folder / "cache").glob("shard-*.safetensors"))) == shards


@pytest.mark.parametrize(
    ("others", "words"),
    [
        ({"teacher_cache_dtype": "float16"}, ("codec", "float16", "int8")),
        ({"guide": tiny_model("bert", num_layers=4, seed=9)}, ("teacher.weights",)),
        ({"losses": [LogitsLoss(), HiddenStatesLoss(LayerMap(((1, 1), (2, 4))))]}, ("signals.hidden_states",)),
        ({"train_dataset": other_rows(range(16))}, ("examples",)),
        ({"hidden_states_selection": "3t"}, ("selection",)),
    ],
    ids=["codec", "teacher", "layers", "data", "selection"],
)
def test_a_cache_that_was_begun_with_other_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, others: dict[str, Any], words: tuple[str, ...]
) -> None:
    stopped(tmp_path, monkeypatch, 2)
    before = {path.name: path.read_bytes() for path in (tmp_path / "cache").glob("shard*")}
    refused(tmp_path, CacheError, "other settings", "not finished", *words, **{"guide": teacher(), **others})
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "cache").glob("shard*")}
    assert not (tmp_path / "cache" / "manifest.json").exists()
    run(tmp_path, teacher())
    assert len(TeacherCache(tmp_path / "cache")) == 16


def test_what_was_left_of_another_cache_is_not_taken_for_this_one(tmp_path: Path) -> None:
    """Somebody deletes the manifest to have the cache built anew, from another teacher: the old shards are of the same examples."""
    run(tmp_path, teacher())
    (tmp_path / "cache" / "manifest.json").unlink()
    other = tiny_model("bert", num_layers=4, seed=9)
    refused(tmp_path, CacheError, "2 files", "index.safetensors", "of which teacher is not known", "Delete the folder", guide=other)


def test_a_finished_cache_is_not_built_over(tmp_path: Path) -> None:
    """Two runs begin at once; the second has its turn when the first has finished."""
    late = run(tmp_path, tiny_model("bert", num_layers=4, seed=9), train=False)
    run(tmp_path, teacher())
    before = {path.name: path.read_bytes() for path in sorted((tmp_path / "cache").iterdir()) if path.suffix != ".lock"}
    with pytest.raises(CacheError, match="was finished by another process"):
        late.train()
    assert before == {path.name: path.read_bytes() for path in sorted((tmp_path / "cache").iterdir()) if path.suffix != ".lock"}


HOLDER = """
import sys
from pathlib import Path
from hf_compress.cache.lock import builder_lock
with builder_lock(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.mark.slow
def test_a_second_builder_is_told_who_the_first_is(tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path / "cache")], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        refused(tmp_path, CacheError, f"process {holder.pid}", "Wait until it has finished", guide=teacher())
        holder.kill()
        holder.wait()
    run(tmp_path, teacher())  # a lock dies with its process
    assert len(TeacherCache(tmp_path / "cache")) == 16


def test_a_damaged_record_stops_the_run(tmp_path: Path) -> None:
    run(tmp_path, teacher())
    path = tmp_path / "cache" / shard_name(0)
    content = bytearray(path.read_bytes())
    content[-3] ^= 16
    path.write_bytes(content)
    refused(tmp_path, CacheError, shard_name(0), settings={"max_steps": 4})
    refused(tmp_path, CacheError, shard_name(0), settings={"max_steps": 4, "dataloader_num_workers": 1})
