"""Caches on the hub: huggingface_hub's own client against a stand-in server, there and back, and all that breaks on the way."""

from __future__ import annotations

import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants, snapshot_download

from hf_compress.arguments import CompressionArguments
from hf_compress.cache import hub as hub_module
from hf_compress.cache.hub import local_folder
from hf_compress.cache.lock import waiting_lock
from hf_compress.cache.manifest import MANIFEST_FILE
from hf_compress.cache.reader import TeacherCache
from hf_compress.errors import CacheError
from hf_compress.signals import SignalSpec
from hf_compress.trainer import DistillTrainer
from tests.cache.hub_client import ADDRESS, ROOT, again, build, contents, environment, error, home_of, pushed
from tests.cache.hub_server import TOKEN, HubServer
from tests.cache.tiny_caches import canonical, pairs
from tests.cached_runs import data, losses, tokenizer
from tests.tiny_runs import arguments, largest_difference, student, teacher, weights

# --- there and back ---


def test_what_comes_back_is_what_was_pushed(hub: HubServer, cache: Path, tmp_path: Path) -> None:
    commit = pushed(hub, cache)
    on_hub = hub.files("me/cache")
    assert on_hub.keys() == {*contents(cache), "README.md", ".gitattributes"}
    assert len(hub.repos["me/cache"].commits) == 2  # made, and pushed at once
    found = local_folder(ADDRESS)
    assert found == home_of(tmp_path) / commit
    assert contents(found) == contents(cache)
    assert not any(path.is_symlink() for path in found.rglob("*"))
    assert sorted(path.name for path in home_of(tmp_path).iterdir()) == [commit, f"{commit}.lock", "refs"]
    batch = canonical(pairs(10))
    ours, theirs = TeacherCache(cache), TeacherCache(ADDRESS)
    one, other = ours.read(batch, ours.spec), theirs.read(batch, theirs.spec)
    assert one.logits.keys() == other.logits.keys() != set()
    assert all((one.logits[name] == other.logits[name]).all() for name in one.logits)
    for key, state in one.selected_states.items():
        assert (state.values == other.selected_states[key].values).all()


def test_training_from_the_hub_is_training_from_the_folder(hub: HubServer, tmp_path: Path) -> None:
    def trained(cache_dir: str, guide: Any = None) -> DistillTrainer:
        trainer = DistillTrainer(
            student(),
            arguments(tmp_path / "out", max_steps=4, per_device_train_batch_size=4, learning_rate=0.02),
            teacher=guide,
            losses=losses(),
            compression=CompressionArguments(teacher_cache_dir=cache_dir, teacher_cache_dtype="float32" if guide is not None else None),
            train_dataset=data(),
            processing_class=tokenizer(),
        )
        trainer.train()
        return trainer

    start = {name: parameter.detach().clone() for name, parameter in student().named_parameters()}
    folder = tmp_path / "built"
    trained(str(folder), teacher())
    local = weights(trained(str(folder)))
    pushed(hub, folder)
    shutil.rmtree(folder)
    from_hub = weights(trained(ADDRESS))
    assert largest_difference(from_hub, local) == 0
    assert largest_difference(from_hub, start) > 1e-3


def test_the_second_time_nothing_is_downloaded(hub: HubServer, cache: Path) -> None:
    commit = pushed(hub, cache)
    by_commit = f"{ADDRESS}@{commit}"
    folder = local_folder(ADDRESS)
    assert sorted(hub.downloads()) == sorted(contents(cache))
    hub.requests.clear()
    again()
    assert local_folder(ADDRESS) == folder
    assert hub.requests == ["GET /api/datasets/me/cache/revision/main"]
    hub.requests.clear()
    assert local_folder(ADDRESS) == local_folder(by_commit) == folder
    assert hub.requests == [], "within a process, and for a commit, nobody is asked"


def test_without_a_network_what_is_here_is_read(
    hub: HubServer, cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    commit = pushed(hub, cache)
    folder = local_folder(ADDRESS)
    caplog.clear()
    for failing in ("offline", "down", "broken"):
        again()
        with monkeypatch.context() as patch:
            if failing == "offline":
                patch.setattr(constants, "HF_HUB_OFFLINE", True)
            elif failing == "down":
                patch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
            else:
                hub.failing = 503
            assert local_folder(f"{ADDRESS}@{commit}") == folder
            assert "last asked" not in caplog.text
            assert local_folder(ADDRESS) == folder
            assert f"is read as it was when the hub was last asked: commit {commit[:12]}" in caplog.text
            caplog.clear()
            words = error("hf://me/other")
            assert "It was not downloaded before" in words
            assert ("HF_HUB_OFFLINE is set" in words) == (failing == "offline")
            assert f"{constants.ENDPOINT}" in words or failing == "offline"
            assert "cannot be reached" in error(f"hf://me/other@{commit}") or failing != "offline"


def test_a_branch_and_a_folder(hub: HubServer, cache: Path, tmp_path: Path) -> None:
    other = build(tmp_path / "other", seed=5)
    top = pushed(hub, cache)
    pushed(hub, other, "me/cache/for/mrpc")
    pushed(hub, other, revision="large/one")
    assert contents(local_folder(ADDRESS)) == contents(cache)
    assert contents(local_folder("hf://me/cache/for/mrpc/")) == contents(other)
    assert contents(local_folder(f"{ADDRESS}@large%2Fone")) == contents(other)
    assert contents(local_folder(f"{ADDRESS}@{top[:8]}")) == contents(cache)
    assert f"{top[:12]}" not in str(local_folder(ADDRESS)), "main is at the second commit now"
    assert f"has no branch, tag or commit larger. {hub.url}/datasets/me/cache/commits" in error(f"{ADDRESS}@larger")


def test_pushing_again_moves_main_and_takes_old_files_away(hub: HubServer, cache: Path, tmp_path: Path) -> None:
    first = pushed(hub, cache)
    folder = local_folder(ADDRESS)
    smaller = build(tmp_path / "smaller", spec=SignalSpec(logits=True))
    assert "shared.safetensors" in contents(cache) and "shared.safetensors" not in contents(smaller)
    hub.repos["me/cache"].commits[first]["train.csv"] = b"somebody's"
    second = pushed(hub, smaller, commit_message="without states")
    assert hub.repos["me/cache"].messages[-1] == "without states"
    assert hub.files("me/cache").keys() == {*contents(smaller), "README.md", ".gitattributes", "train.csv"}
    assert local_folder(ADDRESS) == folder, "a process reads one commit"
    again()
    assert local_folder(ADDRESS).name == second
    assert contents(folder) == contents(cache)
    before = len(hub.requests)
    pushed(hub, smaller, commit_message="the same once more")
    assert not any(line.startswith("PUT /lfs") for line in hub.requests[before:])


# --- what breaks on the way ---


def test_a_cut_connection_leaves_nothing_that_reads_as_whole(hub: HubServer, cache: Path, tmp_path: Path) -> None:
    commit = pushed(hub, cache)
    hub.cut["shard-00000.safetensors"] = 1000
    words = error()
    assert "while it was downloaded" in words and "start the same command again: what has arrived whole is kept" in words
    assert not (home_of(tmp_path) / commit).exists()
    with pytest.raises(CacheError):
        TeacherCache(home_of(tmp_path) / f"{commit}.partial")
    hub.cut.clear()
    hub.requests.clear()
    again()
    assert contents(local_folder(ADDRESS)) == contents(cache)
    assert "manifest.json" not in hub.downloads(), "what had arrived is kept"
    assert not (home_of(tmp_path) / f"{commit}.partial").exists()


def test_a_flipped_byte_is_found_and_only_its_file_comes_again(hub: HubServer, cache: Path, tmp_path: Path) -> None:
    commit = pushed(hub, cache)
    files = hub.files("me/cache")
    whole = files["shard-00000.safetensors"]
    files["shard-00000.safetensors"] = whole[:-5] + bytes([whole[-5] ^ 4]) + whole[-4:]
    words = error()
    assert f"{ADDRESS} is damaged: " in words and "shard-00000.safetensors is damaged: its hash is" in words
    assert "shard-00000.safetensors will be downloaded anew" in words and "damaged on the hub" in words
    assert not (home_of(tmp_path) / commit).exists()
    assert error() == words, "it is damaged on the hub"
    files["shard-00000.safetensors"] = whole
    hub.requests.clear()
    again()
    assert contents(local_folder(ADDRESS)) == contents(cache)
    assert hub.downloads() == ["shard-00000.safetensors"]


def test_a_damaged_manifest_comes_again(hub: HubServer, cache: Path) -> None:
    pushed(hub, cache)
    files = hub.files("me/cache")
    whole = files[MANIFEST_FILE]
    files[MANIFEST_FILE] = whole.replace(b'"tokens": ', b'"tokens": 1')
    words = error()
    assert "the manifest that came" in words and "checksum is" in words
    files[MANIFEST_FILE] = whole
    again()
    assert contents(local_folder(ADDRESS)) == contents(cache)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda files: files.pop("index.safetensors"), "not whole on the hub: index.safetensors is missing, as its manifest says"),
        (lambda files: files.update({"shard-00000.safetensors": b"x"}), "shard-00000.safetensors has 1 bytes, expected"),
        (
            lambda files: files.pop("manifest.json"),
            "there is no manifest.json in me/cache, so it is no teacher on disk. `hf-compress cache",
        ),
        (lambda files: files.update({"a/manifest.json": files.pop("manifest.json")}), f"Did you mean {ADDRESS}/a?"),
    ],
)
def test_what_is_not_whole_is_seen_before_anything_large_is_downloaded(
    hub: HubServer, cache: Path, change: Callable[[dict[str, bytes]], object], words: str
) -> None:
    pushed(hub, cache)
    change(hub.files("me/cache"))
    assert words in error()
    assert set(hub.downloads()) <= {"manifest.json"}


def test_too_little_disk_is_said_before_the_download(hub: HubServer, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pushed(hub, cache)
    monkeypatch.setattr(hub_module, "free_bytes", lambda folder: 1000)
    words = error()
    assert "only 1.0 kB are free" in words and "set HF_HOME to a folder on a larger disk" in words
    assert hub.downloads() == ["manifest.json"]


def test_who_may_not_see_it(hub: HubServer, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pushed(hub, cache, private=True)
    assert "there is no data set me/cahce" in error("hf://me/cahce")
    monkeypatch.delenv("HF_TOKEN")
    words = error()
    assert "or it is private and you may not see it" in words and "`hf auth login`" in words and "set HF_TOKEN" in words
    assert "Nothing is built on the hub" in words
    monkeypatch.setenv("HF_TOKEN", "hf_an_old_one")
    assert "does not take your token" in error()
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    again()
    assert contents(local_folder(ADDRESS)) == contents(cache)


def test_files_of_the_hubs_own_cache_become_real_ones(hub: HubServer, cache: Path) -> None:
    pushed(hub, cache)
    snapshot = Path(snapshot_download("me/cache", repo_type="dataset", endpoint=hub.url))
    assert (snapshot / MANIFEST_FILE).is_symlink()
    hub.requests.clear()
    assert contents(local_folder(ADDRESS)) == contents(cache)
    assert not any(path.is_symlink() for path in local_folder(ADDRESS).rglob("*"))
    assert hub.downloads() == []


def test_a_second_process_waits_and_shares(hub: HubServer, cache: Path, tmp_path: Path) -> None:
    commit = pushed(hub, cache)
    home_of(tmp_path).mkdir(parents=True)
    found: list[Path] = []
    with waiting_lock(home_of(tmp_path) / f"{commit}.lock", lambda: None):
        thread = threading.Thread(target=lambda: found.append(local_folder(ADDRESS)))
        thread.start()
        thread.join(0.5)
        assert thread.is_alive() and not hub.downloads()
        shutil.copytree(cache, home_of(tmp_path) / commit)  # the first one is ready
    thread.join(20)
    assert found == [home_of(tmp_path) / commit] and not hub.downloads()


@pytest.mark.slow
def test_a_download_that_is_killed_goes_on(hub: HubServer, cache: Path, tmp_path: Path) -> None:
    commit = pushed(hub, cache)
    hub.stalling = "shard-00000.safetensors"
    process = subprocess.Popen(
        [sys.executable, "-m", "hf_compress.cli.app", "cache", "verify", ADDRESS], env=environment(hub, tmp_path), cwd=ROOT
    )
    assert hub.stalled.wait(100)
    process.kill()
    process.wait()
    hub.stalling = None
    hub.go_on.set()
    partial = home_of(tmp_path) / f"{commit}.partial"
    assert list(partial.rglob("*.incomplete")) and not (home_of(tmp_path) / commit).exists()
    with pytest.raises(CacheError):
        TeacherCache(partial)
    hub.requests.clear()
    assert contents(local_folder(ADDRESS)) == contents(cache)
    assert "shard-00000.safetensors" in hub.downloads() and "manifest.json" not in hub.downloads()
    assert not partial.exists()


@pytest.mark.slow
def test_with_hf_endpoint_in_processes_of_their_own(hub: HubServer, cache: Path, tmp_path: Path) -> None:
    """The environment that people set; and two processes that start at once download once."""
    command = [sys.executable, "-m", "hf_compress.cli.app", "cache"]
    subprocess.run([*command, "push", str(cache), "me/cache"], env=environment(hub, tmp_path), cwd=ROOT, check=True, capture_output=True)
    hub.requests.clear()
    both = [
        subprocess.Popen(
            [*command, "verify", ADDRESS],
            env=environment(hub, tmp_path),
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    for process in both:
        out, told = process.communicate(timeout=100)
        assert process.returncode == 0 and out.startswith("whole"), told
    assert sorted(hub.downloads()) == sorted(contents(cache))
