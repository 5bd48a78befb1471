"""Building: what a finished folder holds, builds that stop and go on, several processes, and what is refused before the first forward."""

from __future__ import annotations

import logging
import shutil
import threading
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hf_compress.cache import build, spaces
from hf_compress.cache import plan as plans
from hf_compress.cache.build import Processes
from hf_compress.cache.codec_name import CodecName
from hf_compress.cache.lock import builder_lock
from hf_compress.cache.manifest import Manifest
from hf_compress.cache.reader import TeacherCache
from hf_compress.cache.selection import Selection
from hf_compress.cache.shard import shard_name
from hf_compress.cache.spaces import needs_sample
from hf_compress.cache.verify import verify
from hf_compress.errors import CacheError, DataError, TeacherError
from hf_compress.signals import Signals, SignalSpec
from tests.cache.tiny_caches import Counting, Stopped, Stopping, builder, built, canonical, padded, pairs, scores, states
from tests.tiny_models import tiny_model

EVERYTHING = SignalSpec(logits=True) | states(0, 2) | scores(2)
DATA = pairs(40)


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plans, "SHARD_EXAMPLES", 6)
    monkeypatch.setattr(spaces, "SAMPLE_EXAMPLES", 5)


@pytest.fixture(autouse=True)
def quiet_log(caplog: pytest.LogCaptureFixture) -> None:
    """Where nobody reads how long it takes, no teacher is asked to find out."""
    caplog.set_level(logging.WARNING, "hf_compress")


def teacher(**config: Any) -> nn.Module:
    return tiny_model("bert", num_layers=2, seed=1, **config)


def files(folder: Path) -> dict[str, bytes]:
    """What is in a folder; of the manifest all but when it was made, and its checksum."""
    found = {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.name != "manifest.json"}
    lines = (folder / "manifest.json").read_text().splitlines()
    found["manifest.json"] = "\n".join(line for line in lines if '"created"' not in line and '"checksum"' not in line).encode()
    return found


def test_what_a_finished_folder_holds(tmp_path: Path) -> None:
    cache = built(tmp_path, teacher(), [*DATA, *DATA[:7]], EVERYTHING)
    manifest = cache.manifest
    shards = [shard_name(number) for number in range(len(manifest.shards))]
    assert len(shards) > 4
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["index.safetensors", "manifest.json", *shards])
    assert (manifest.examples, len(cache)) == (40, 40)
    assert manifest.tokens == sum(len(example["input_ids"]) for example in DATA)
    assert manifest.bytes == sum(path.stat().st_size for path in tmp_path.iterdir() if path.name != "manifest.json")
    report = verify(tmp_path)
    assert report.problems == () and report.examples == 40
    assert cache.missing(canonical(DATA).keys()) == 0
    assert cache.missing(canonical(pairs(5, seed=9)).keys()) == 5


def test_names_and_scores_are_in_the_manifest_but_do_not_stop_a_build_from_going_on(tmp_path: Path) -> None:
    stop_after(2, tmp_path)
    moved = builder(tmp_path, teacher(), DATA, EVERYTHING)
    known = moved.contents
    moved.contents = type(known)(
        **{**vars(known), "teacher": type(known.teacher)(**{**vars(known.teacher), "name": "b", "scores": {"a": 1.0}})}
    )
    assert moved.build().teacher.name == "b"
    assert Manifest.load(tmp_path).teacher.scores == {"a": 1.0}


# --- stopping and going on ---


def stop_after(shards: int, folder: Path, spec: SignalSpec = EVERYTHING, selection: Selection | None = None) -> None:
    """A build that is stopped on its way to the next shard."""
    model = teacher()
    source = Stopping(model, folder, shards, basis=selection is not None and needs_sample(selection))
    with pytest.raises(Stopped):
        builder(folder, model, DATA, spec, selection, source=source).build()
    source.close()
    assert len(list(folder.glob("shard-*.safetensors"))) == shards


@pytest.mark.parametrize("shards", [0, 1, 3])
@pytest.mark.parametrize("words", ["all", "3t_0.5h"])
def test_a_build_goes_on_where_it_stopped(tmp_path: Path, shards: int, words: str) -> None:
    selection = Selection.parse(words)
    whole = builder(tmp_path / "whole", teacher(), DATA, states(2), selection)
    whole.build()
    stop_after(shards, tmp_path / "parts", states(2), selection)
    with pytest.raises(CacheError, match="building was stopped"):
        TeacherCache(tmp_path / "parts")
    source = Counting(teacher())
    rest = builder(tmp_path / "parts", teacher(), DATA, states(2), selection, source=source)
    plan = rest._plan()
    rest.build()
    assert source.asked == sum(plan.span(number).stop - plan.span(number).start for number in range(shards, len(plan.shards)))
    assert files(tmp_path / "parts") == files(tmp_path / "whole")


@pytest.mark.parametrize("words", ["all", "3t_0.5h"])
def test_nothing_is_asked_twice_while_there_is_room_to_keep_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, words: str
) -> None:
    caplog.set_level(logging.INFO, "hf_compress")  # the pace is told, so the teacher is timed
    asked = {}
    for name, room in (("kept", build.AHEAD_BYTES), ("not kept", 0)):
        monkeypatch.setattr(build, "AHEAD_BYTES", room)
        source = Counting(teacher())
        builder(tmp_path / name, teacher(), DATA, EVERYTHING, Selection.parse(words), source=source).build()
        asked[name] = source.asked
    assert asked["kept"] == 40 < asked["not kept"]
    assert "tokens a second" in caplog.text
    assert files(tmp_path / "kept") == files(tmp_path / "not kept")


@pytest.mark.parametrize("share", [0.2, 0.5, 0.8, 0.99])
def test_a_damaged_shard_of_a_stopped_build_is_built_anew(tmp_path: Path, caplog: pytest.LogCaptureFixture, share: float) -> None:
    builder(tmp_path / "whole", teacher(), DATA, EVERYTHING).build()
    stop_after(4, tmp_path / "parts")
    bad = tmp_path / "parts" / shard_name(1)
    content = bytearray(bad.read_bytes())
    content[int(share * len(content))] ^= 1
    bad.write_bytes(content)
    cut = tmp_path / "parts" / shard_name(2)
    cut.write_bytes(cut.read_bytes()[:-7])
    (tmp_path / "parts" / shard_name(3)).write_bytes((tmp_path / "parts" / shard_name(0)).read_bytes())
    (tmp_path / "parts" / f"{shard_name(5)}.0123abcd.tmp").write_bytes(b"half")
    builder(tmp_path / "parts", teacher(), DATA, EVERYTHING).build()
    assert files(tmp_path / "parts") == files(tmp_path / "whole")
    assert "built anew" in caplog.text


def test_a_bar_is_shown_while_building_and_going_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stop_after(2, tmp_path)
    builder(tmp_path, teacher(), DATA, EVERYTHING, progress=True).build()
    shown = capsys.readouterr().err
    assert "reading the examples: 100%" in shown and "asking the teacher: 100%" in shown and "40/40" in shown and "written" in shown


def test_the_pace_is_told_where_it_is_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for level in (logging.WARNING, logging.INFO):
        assert "building takes about" not in caplog.text
        caplog.set_level(level, "hf_compress")
        builder(tmp_path / str(level), teacher(), DATA, EVERYTHING).build()
    assert "building takes about 0:00:" in caplog.text and "epochs of a live teacher" in caplog.text


# --- several processes ---


@pytest.mark.parametrize("words", ["all", "3t_0.5h"])
@pytest.mark.parametrize("count", [2, 3])
def test_several_processes_write_what_one_writes(tmp_path: Path, count: int, words: str) -> None:
    """The processes are threads here; two real ones train in tests/test_cached_training.py."""
    selection = Selection.parse(words)
    builder(tmp_path / "one", teacher(), DATA, states(2), selection).build()
    barrier, shared, failures = threading.Barrier(count), [[] for _ in range(count)], []
    asked: list[int] = []
    models = [teacher() for _ in range(count)]

    def work(rank: int) -> None:
        def gather(own: list[Any]) -> list[Any]:
            shared[rank] = own
            barrier.wait(60)
            found = [item for part in shared for item in part]
            barrier.wait(60)
            return found

        source = Counting(models[rank])
        part = builder(tmp_path / "many", models[rank], DATA, states(2), selection, source=source)
        part.processes = Processes(rank, count, gather)
        try:
            assert part.build().examples == 40
        except BaseException as error:
            barrier.abort()
            failures.append(error)
        asked.append(source.asked)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert files(tmp_path / "many") == files(tmp_path / "one")
    assert min(asked) > 0 and sum(asked) == 40


# --- the price ---


@pytest.mark.parametrize(
    ("words", "width", "spec", "codec"),
    [
        ("all", None, EVERYTHING, "float32"),
        ("all", None, EVERYTHING, "int8"),
        ("3t_0.5h", "pca", states(1, 2), "float16"),
        ("3t_0.5h", "magnitude", SignalSpec(logits=True) | states(1, 2), "int8"),
        ("4t", None, states(2), "float32"),
    ],
)
def test_the_price_is_what_is_paid(
    tmp_path: Path, words: str, width: Any, spec: SignalSpec, codec: CodecName, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plans, "SHARD_EXAMPLES", 2048)
    data = pairs(400, vocabulary=5000)
    model = teacher(vocab_size=5000)
    work = builder(tmp_path, model, data, spec, Selection.parse(words, width_scheme=width), codec)
    (tmp_path / "x").mkdir()
    price = work._price(work._plan())
    (tmp_path / "x").rmdir()
    paid = work.build().bytes
    # An example with fewer tokens to choose from than are to be chosen takes less.
    assert 0.9 * price.bytes < paid < 1.03 * price.bytes + 20_000
    assert price.examples == 400 and "400 examples" in str(price)


def test_too_little_disk_is_said_before_the_first_forward(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = Counting(teacher())
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=3000))
    with pytest.raises(CacheError, match=r"only 3\.0 kB are free"):
        builder(tmp_path, teacher(), DATA, EVERYTHING, source=source).build()
    assert source.asked == 0 and not list(tmp_path.glob("*.safetensors"))


# --- refused ---


def test_another_builder_in_the_folder(tmp_path: Path) -> None:
    with builder_lock(tmp_path), pytest.raises(CacheError, match=r"is being built by process \d+"):
        builder(tmp_path, teacher(), DATA, EVERYTHING).build()
    builder(tmp_path, teacher(), DATA, EVERYTHING).build()


def test_other_batches_round_otherwise(tmp_path: Path) -> None:
    stop_after(1, tmp_path)
    with pytest.raises(CacheError, match=r"tokens_a_forward.*40.*80|tokens_a_forward.*80.*40"):
        builder(tmp_path, teacher(), DATA, EVERYTHING, batch_tokens=80).build()


class Moving:
    """A data set that is another one when it is read a second time, without a random number: a counter."""

    def __init__(self) -> None:
        self.looks = 0

    def __len__(self) -> int:
        return len(DATA)

    def __getitem__(self, place: int) -> dict[str, list[int]]:
        self.looks += 1
        ids = DATA[place]["input_ids"]
        return DATA[place] if self.looks <= 16 + len(DATA) else {**DATA[place], "input_ids": [4, *ids[1:]]}


def test_data_that_changes_between_planning_and_writing(tmp_path: Path) -> None:
    with pytest.raises(CacheError, match="a second time"):
        builder(tmp_path, teacher(), Moving(), EVERYTHING).build()  # type: ignore[arg-type]
    assert not list(tmp_path.glob("shard*"))


def test_no_data(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="empty"):
        builder(tmp_path, teacher(), [], EVERYTHING).build()


def test_a_collator_that_draws(tmp_path: Path) -> None:
    def masking(examples: list[Any]) -> dict[str, Tensor]:
        batch = padded()(examples)
        drawn = torch.rand(batch["input_ids"].shape) < 0.2
        return {**batch, "input_ids": batch["input_ids"].masked_fill(drawn, 3)}

    with pytest.raises(DataError, match="other inputs of the same examples each time"):
        builder(tmp_path, teacher(), DATA, EVERYTHING, collator=masking)


def test_attention_that_cannot_be_seen_ranks_nothing(tmp_path: Path) -> None:
    with pytest.raises(TeacherError, match="left_first"):
        builder(tmp_path, tiny_model("xlnet", num_layers=2), DATA, states(2), Selection.parse("3t"))
    cache = built(tmp_path, tiny_model("xlnet", num_layers=2), DATA, states(2), Selection.parse("3t", length="left_first"))
    assert len(cache) == 40


class Spoilt(Counting):
    """Not finite in its second batch, at a real token, or at padding alone."""

    def __init__(self, model: nn.Module, where: str, value: float) -> None:
        super().__init__(model)
        self.where, self.value, self.calls = where, value, 0

    def signals(self, inputs: Mapping[str, Tensor], spec: SignalSpec) -> Signals:
        found = super().signals(inputs, spec)
        self.calls += 1
        if self.calls == 4:
            real = inputs["attention_mask"].bool()
            if self.where == "logits":
                found.logits["logits"][-1, 0] = self.value
            for state in found.hidden_states.values():
                if self.where in ("token", "padding"):
                    state[real if self.where == "token" else ~real] = self.value
        return found


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["token", "logits", "padding"])
def test_a_teacher_that_is_not_finite(tmp_path: Path, where: str, value: float) -> None:
    work = builder(tmp_path, teacher(), DATA, SignalSpec(logits=True) | states(2), source=Spoilt(teacher(), where, value), batch_tokens=60)
    if where == "padding":
        assert work.build().examples == 40  # what stands at padding is nobody's
        return
    with pytest.raises(TeacherError, match=r"hidden_states\.layers\.2 is NaN" if where == "token" else "logits is NaN"):
        work.build()
    assert not (tmp_path / "manifest.json").exists()


def test_numbers_too_large_for_the_codec(tmp_path: Path) -> None:
    model: Any = teacher()
    model.bert.encoder.layer[1].output.LayerNorm.bias.data[3] = 1e5
    with pytest.raises(CacheError, match="too large for float16"):
        builder(tmp_path / "a", model, DATA, states(2), None, "float16").build()
    assert built(tmp_path / "b", model, DATA, states(2), None, "bfloat16").manifest.examples == 40


def test_building_draws_no_random_number(tmp_path: Path) -> None:
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    builder(tmp_path, teacher(), DATA, EVERYTHING, Selection.parse("3t_0.5h")).build()
    assert torch.equal(torch.rand(3), expected)
    assert np.random.rand() == np.random.RandomState(0).rand()
