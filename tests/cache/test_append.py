"""Appending: what was asked for later is stored as a build would have stored it, and the cache is whole at any moment."""

from __future__ import annotations

import logging
import shutil
import threading
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import nn

from hf_compress.cache import append as appending
from hf_compress.cache import build as building
from hf_compress.cache import plan as plans
from hf_compress.cache.append import NewRecord, append_records
from hf_compress.cache.budget_view import _learnt_on, _records
from hf_compress.cache.codec_name import CodecName
from hf_compress.cache.copy_view import View, copy_view
from hf_compress.cache.index import longer_index_name
from hf_compress.cache.lock import builder_lock
from hf_compress.cache.manifest import Manifest
from hf_compress.cache.missing import HowToAsk, MissingExamples
from hf_compress.cache.reader import TeacherCache
from hf_compress.cache.selection import Selection
from hf_compress.cache.shard import shard_name
from hf_compress.cache.spaces import read_spaces
from hf_compress.cache.verify import verify
from hf_compress.errors import CacheError
from hf_compress.signals import SignalSpec
from tests.cache.small_cache import COLUMNS, SmallCache, random_keys, random_shard, read_all, slices
from tests.cache.small_cache import build as small_cache
from tests.cache.tiny_caches import SPECIAL, Counting, builder, built, canonical, padded, pairs, scores, states
from tests.tiny_models import tiny_model

ALL = SignalSpec(logits=True) | states(0, 2) | scores(2)
PART = SignalSpec(logits=True) | states(1, 2)
DATA = pairs(40)
BUILT, LATER = DATA[::2], DATA[1::2]


def teacher(**config: Any) -> nn.Module:
    return tiny_model("bert", num_layers=2, seed=1, **config)


def missing_of(cache: TeacherCache, source: Counting | None = None, examples: int | None = None) -> MissingExamples:
    """Asks the teacher of `tiny_caches`."""
    model = teacher()
    run = builder(cache.folder, model, DATA, cache.spec, cache.stored.selection, source=source).run
    return MissingExamples(cache, HowToAsk(lambda: run, SPECIAL, 0, examples))


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.suffix != ".lock"}


def appended(folder: Path, cache: TeacherCache, data: Any = LATER, at_once: int = 7) -> TeacherCache:
    """Ask for `data` in batches, and append it."""
    missing = missing_of(cache)
    for start in range(0, len(data), at_once):
        missing.records(cache, canonical(data[start : start + at_once]))
    assert missing.write() and missing.asked == missing.appended == len(data)
    missing.close()
    return TeacherCache(folder)


@pytest.mark.parametrize(
    ("words", "width", "codec", "spec", "error"),
    [
        ("all", None, "float32", ALL, 1e-6),
        ("all", None, "float16", ALL, 2e-3),
        ("all", None, "int8", ALL, 3e-2),
        ("3t_0.5h", "pca", "float32", PART, 1e-5),
        ("3t_0.5h", "pca", "int8", PART, 3e-2),
        ("4t_0.5h", "magnitude", "float16", PART, 5e-3),
        ("0.25h", "magnitude", "bfloat16", PART, 5e-2),
        ("2t_0.5h", "random", "float16", PART, 5e-3),
        ("5t", None, "int8", SignalSpec() | states(2), 3e-2),
        ("all", None, "float32", SignalSpec(logits=True), 1e-6),
    ],
)
def test_as_a_build_would_have_stored_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: str, width: Any, codec: CodecName, spec: SignalSpec, error: float
) -> None:
    selection = Selection.everything() if words == "all" else Selection.parse(words, width_scheme=width)
    half = built(tmp_path / "half", teacher(), BUILT, spec, selection, codec)
    # Another basis is chosen from other examples; here the first one's is compared with.
    monkeypatch.setattr(building, "make_spaces", lambda *args: read_spaces(tmp_path / "half", selection))
    whole = built(tmp_path / "whole", teacher(), DATA, spec, selection, codec)
    in_memory = missing_of(half)
    batch = canonical(DATA[:9], padded("left", more=2))
    now = half.read_with(batch, spec, in_memory.records(half, batch))
    later = appended(tmp_path / "half", half).read(batch, spec)
    expected = whole.read(batch, spec)
    assert now.named_tensors().keys() == expected.named_tensors().keys()
    for name, tensor in expected.named_tensors().items():
        for found in (now, later):
            difference = (found.named_tensors()[name].float() - tensor.float()).abs().max()
            assert difference <= error * max(1.0, float(tensor.float().abs().max())), name
    for key, state in expected.selected_states.items():
        for found in (now, later):
            assert torch.equal(found.selected_states[key].positions, state.positions)
            assert torch.equal(found.selected_states[key].chosen, state.chosen)
            if width == "magnitude":
                assert torch.equal(found.selected_states[key].space.mask, state.space.mask)  # type: ignore[union-attr]
    assert verify(tmp_path / "half").problems == ()


def test_what_lies_in_the_folder_afterwards(tmp_path: Path) -> None:
    before = built(tmp_path, teacher(), BUILT, ALL)
    names = set(files(tmp_path))
    first = appended(tmp_path, before, LATER[:12])
    second = appended(tmp_path, first, LATER[12:])
    number = len(before.manifest.shards)
    assert set(files(tmp_path)) == (names - {"index.safetensors"}) | {
        shard_name(number), shard_name(number + 1), longer_index_name(number + 2),
    }  # fmt: skip
    manifest = second.manifest
    assert (manifest.appended, manifest.examples, manifest.index_file) == (2, 40, longer_index_name(number + 2))
    assert manifest.tokens == sum(len(example["input_ids"]) for example in DATA)
    assert manifest.bytes == sum(len(content) for name, content in files(tmp_path).items() if name != "manifest.json")
    assert manifest.shards[:number] == before.manifest.shards and manifest.created == before.manifest.created
    report = verify(tmp_path)
    assert report.problems == () and report.examples == 40
    assert second.missing(canonical(DATA).keys()) == 0
    assert not (tmp_path / "building.lock").exists()
    # Whoever had it open before reads on: what was there, and no more.
    spec = SignalSpec(logits=True)
    assert torch.equal(before.read(canonical(BUILT), spec).logits["logits"], second.read(canonical(BUILT), spec).logits["logits"])
    assert before.missing(canonical(DATA).keys()) == 20 and before.refreshed().missing(canonical(DATA).keys()) == 0


def test_an_example_is_asked_for_once(tmp_path: Path) -> None:
    cache = built(tmp_path, teacher(), BUILT, PART)
    counting = Counting(teacher())
    missing = missing_of(cache, counting)
    twice = [*LATER[:5], *BUILT[:3], *LATER[:5]]
    first = missing.records(cache, canonical(twice))
    assert counting.asked == missing.asked == 5 and len(first) == 5
    again = missing.records(cache, canonical(LATER[:5], padded("left", more=3)))  # in another batch, padded otherwise
    assert counting.asked == 5 and all(again[key] is first[key] for key in first)
    assert missing.records(cache, canonical(BUILT)) == {}
    assert missing.write() and not missing.write()
    assert missing.records(cache.refreshed(), canonical(LATER[:5])) == {} and counting.asked == 5


def test_a_shard_is_written_when_there_is_enough_for_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = built(tmp_path, teacher(), BUILT, PART)
    missing = missing_of(cache)
    missing.records(cache, canonical(LATER[:3]))
    assert not missing.is_full
    monkeypatch.setattr(plans, "SHARD_EXAMPLES", 4)
    missing.records(cache, canonical(LATER[3:5]))
    assert missing.is_full
    monkeypatch.setattr(plans, "SHARD_EXAMPLES", 2048)
    monkeypatch.setattr(plans, "SHARD_BYTES", 1000)
    assert missing.is_full


def test_a_view_of_a_cache_that_grew(tmp_path: Path) -> None:
    """The basis that a view learns is that of the examples that were built, and does not change when others are appended."""
    cache = built(tmp_path / "cache", teacher(), BUILT, PART)
    smaller = Selection.parse("3t_0.5h", width_scheme="pca")
    before = TeacherCache(tmp_path / "cache", selection=smaller).read(canonical(BUILT), PART)
    grown = appended(tmp_path / "cache", cache)
    after = TeacherCache(tmp_path / "cache", selection=smaller)
    copy_view(tmp_path / "cache", tmp_path / "view", View(smaller, "test"))
    copied = TeacherCache(tmp_path / "view")
    assert grown.manifest.appended == 1 and copied.manifest.appended == 0 and len(copied) == 40
    assert verify(tmp_path / "view").problems == ()
    for name, tensor in before.named_tensors().items():
        assert torch.equal(after.read(canonical(BUILT), PART).named_tensors()[name], tensor), name
    found, expected = copied.read(canonical(DATA), PART), after.read(canonical(DATA), PART)
    assert torch.equal(found.logits["logits"], expected.logits["logits"])
    for key, state in expected.selected_states.items():
        other = found.selected_states[key]
        assert torch.equal(other.positions, state.positions)
        assert torch.allclose(other.values[other.chosen], state.values[state.chosen], atol=1e-6)


@pytest.mark.parametrize("words", ["all", "3t"])
def test_a_budget_counts_on_the_sample_that_a_view_of_a_cache_that_grew_has(tmp_path: Path, words: str) -> None:
    """A basis cannot have more directions than the sample has tokens, and what was appended is not in it."""
    cache = built(tmp_path, teacher(), BUILT[:5], PART, Selection.everything() if words == "all" else Selection.parse(words))
    grown = appended(tmp_path, cache)
    learnt_on = _learnt_on(grown, *_records(grown, ranked=True))
    for tokens in (1, 2):
        view = TeacherCache(tmp_path, selection=Selection.parse(f"{tokens}t_0.1h", width_scheme="pca"))
        assert {len(states) for states in view._sample().values()} == {learnt_on(tokens)}


def test_several_append_at_once(tmp_path: Path) -> None:
    """Each has asked for examples of its own, and one for what another one appends as well."""
    cache = built(tmp_path, teacher(), BUILT, PART)
    everybody = []
    for number in range(4):
        missing = missing_of(TeacherCache(tmp_path))
        missing.records(cache, canonical(LATER[5 * number : 5 * number + 5] + LATER[:3]))
        everybody.append(missing)
    threads = [threading.Thread(target=missing.write) for missing in everybody]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    manifest = Manifest.load(tmp_path)
    assert manifest.examples == 40 and manifest.appended == 4
    assert sum(shard.examples for shard in manifest.shards) == 40  # nothing is stored twice
    assert verify(tmp_path).problems == ()


def test_somebody_has_appended_all_of_it_already(tmp_path: Path) -> None:
    cache = built(tmp_path, teacher(), BUILT, PART)
    late = missing_of(cache)
    late.records(cache, canonical(LATER))
    appended(tmp_path, cache)
    before = files(tmp_path)
    assert late.write() and late.appended == 0 and files(tmp_path) == before


def test_leftovers_of_a_killed_append(tmp_path: Path) -> None:
    cache = built(tmp_path, teacher(), BUILT, PART)
    number = len(cache.manifest.shards)
    strays = [shard_name(number), shard_name(number + 3), longer_index_name(number + 1), longer_index_name(number + 4)]
    for name in (*strays, "shard-00000.safetensors.0123abcd.tmp"):
        (tmp_path / name).write_bytes(b"half")
    (tmp_path / "notes.txt").write_text("mine")
    assert verify(tmp_path).problems == () and len(TeacherCache(tmp_path)) == 20
    appended(tmp_path, cache)
    assert verify(tmp_path).problems == ()
    named = {shard_name(each) for each in range(number + 1)} | {longer_index_name(number + 1), "manifest.json", "notes.txt"}
    assert set(files(tmp_path)) == named


# --- what cannot be appended: training goes on ---


def refused(missing: MissingExamples, caplog: pytest.LogCaptureFixture) -> str:
    before = files(missing._cache.folder)
    with caplog.at_level(logging.WARNING, "hf_compress"):
        assert not missing.write() and not missing.write()
    assert files(missing._cache.folder) == before and missing.appended == 0
    (said,) = [record.getMessage() for record in caplog.records if "cannot be appended" in record.getMessage()]  # once
    return said


def test_too_little_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    class Usage(NamedTuple):
        free: int

    cache = built(tmp_path, teacher(), BUILT, PART)
    counting = Counting(teacher())
    missing = missing_of(cache, counting)
    missing.records(cache, canonical(LATER[:5]))
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "disk_usage", lambda path: Usage(1000))
        assert "only 1.0 kB are free" in refused(missing, caplog)
        monkeypatch.setattr(plans, "SHARD_EXAMPLES", 8)
        assert not missing.is_full
        missing.records(cache, canonical(LATER[5:10]))
        assert not missing.is_full and counting.asked == 10  # not tried with every batch; 8 are kept
        for _ in range(2):  # memory does not grow: what does not fit is asked for again
            assert len(missing.records(cache, canonical(LATER[10:14]))) == 4
        assert counting.asked == 18
    assert missing.write() and len(TeacherCache(tmp_path)) == 28


def test_a_damaged_index_is_not_copied_into_a_sound_one(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache = built(tmp_path, teacher(), BUILT, PART)
    missing = missing_of(cache)
    missing.records(cache, canonical(LATER))
    path = tmp_path / "index.safetensors"
    content = bytearray(path.read_bytes())
    content[-3] ^= 16
    path.write_bytes(content)
    assert "index.safetensors" in refused(missing, caplog)


def test_another_cache_in_the_folder(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache = built(tmp_path / "cache", teacher(), BUILT, PART)
    missing = missing_of(cache)
    missing.records(cache, canonical(LATER))
    shutil.rmtree(tmp_path / "cache")
    built(tmp_path / "cache", teacher(), DATA[:30], PART)
    assert "another teacher on disk than when this run began" in refused(missing, caplog)
    with pytest.raises(CacheError, match="Start again"):
        cache.refreshed()


def test_somebody_else_holds_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    cache = built(tmp_path, teacher(), BUILT, PART)
    missing = missing_of(cache)
    missing.records(cache, canonical(LATER))
    monkeypatch.setattr(appending, "WAIT", 0.1)
    with builder_lock(tmp_path):
        assert "is being built by process" in refused(missing, caplog)
    assert missing.write()


def test_a_teacher_that_shows_other_signals(tmp_path: Path) -> None:
    cache = built(tmp_path, teacher(), BUILT, PART)
    wider = builder(tmp_path, tiny_model("bert", num_layers=2, seed=1, num_labels=5), DATA, cache.spec, cache.stored.selection).run
    missing = MissingExamples(cache, HowToAsk(lambda: wider, SPECIAL, 0))
    with pytest.raises(CacheError, match=r"other signals than .*logits\.values"):
        missing.records(cache, canonical(LATER))


def test_data_that_changes_is_warned_of_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache = built(tmp_path, teacher(), BUILT, PART)
    missing = missing_of(cache, examples=20)
    caplog.clear()  # building tells its price, where an earlier test let the log be seen
    with caplog.at_level(logging.WARNING, "hf_compress"):
        missing.records(cache, canonical(LATER))
        assert not caplog.records
        for seed in (7, 8):
            missing.records(cache, canonical(pairs(10, seed=seed)))
    (said,) = [record.getMessage() for record in caplog.records]
    assert "30 examples, more than the 20 of the training data" in said and "masking" in said


def test_records_of_any_kind(tmp_path: Path) -> None:
    """Without a teacher: columns of several groups, one of them without rows; what is read back is what was given."""
    cache: SmallCache = small_cache(tmp_path)
    generator = np.random.default_rng(5)
    values, counts = random_shard(generator, 6)
    keys = random_keys(generator, 6)
    given = {(high, low): NewRecord(slices(values, counts, row), row) for row, (high, low) in enumerate(keys.tolist())}
    known = tuple(cache.keys[1].tolist())
    manifest, number = append_records(tmp_path, cache.manifest, {**given, known: NewRecord(slices(values, counts, 0), 5)})
    assert number == 6 and manifest.examples == cache.manifest.examples + 6 and manifest.columns == COLUMNS
    cache.manifest = manifest
    cache.keys = np.concatenate([cache.keys, keys])
    cache.records |= {key: record.columns for key, record in given.items()}
    read_all(cache)
    assert verify(tmp_path).problems == ()
