"""Records copied into a batch's tensors while they are checked: the same signals as from views of the file, and the same refusals."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from hf_compress.cache.codec_name import CodecName
from hf_compress.cache.index import split_places
from hf_compress.cache.reader import TeacherCache
from hf_compress.cache.selection import Selection
from hf_compress.cache.shard import shard_name, write_shard
from hf_compress.cache.shard_reader import Record, Shard
from hf_compress.errors import CacheError
from hf_compress.signals import SignalSpec
from tests.cache.small_cache import COLUMNS, random_keys, random_shard, same, slices
from tests.cache.tiny_caches import Example, built, canonical, padded, pairs, scores, states
from tests.tiny_models import tiny_model

VALUES = "hidden_states.layers.4.values"


def shard_of_six(folder: Path) -> tuple[Path, list[Record]]:
    generator = np.random.default_rng(0)
    values, counts = random_shard(generator, 6)
    path = folder / shard_name(0)
    write_shard(path, random_keys(generator, 6), COLUMNS, values, counts)
    return path, [slices(values, counts, row) for row in range(6)]


def test_rows_are_copied_where_they_are_wanted(tmp_path: Path) -> None:
    path, expected = shard_of_six(tmp_path)
    shard = Shard.open(path, None, COLUMNS)
    targets = [{VALUES: np.zeros_like(expected[row][VALUES])} for row in (4, 1)]
    for row, target, found in zip((4, 1), targets, shard.records([4, 1], into=targets), strict=True):
        same(found, expected[row])
        assert found[VALUES] is target[VALUES] and found["logits.values"].base is not None


@pytest.mark.parametrize("damaged", [VALUES, "logits.values"])
def test_a_copy_is_checked(tmp_path: Path, damaged: str) -> None:
    path, expected = shard_of_six(tmp_path)
    data = path.read_bytes()
    where = data.index(expected[3][damaged].tobytes())
    path.unlink()
    path.write_bytes(data[:where] + bytes([data[where] ^ 1]) + data[where + 1 :])
    target = {VALUES: np.zeros_like(expected[3][VALUES])}
    with pytest.raises(CacheError, match=r"record 3, of the example .*checksum"):
        Shard.open(path, None, COLUMNS).records([3], into=[target])


def test_a_record_of_other_length_than_its_example(tmp_path: Path) -> None:
    path, expected = shard_of_six(tmp_path)
    rows = len(expected[2][VALUES])
    with pytest.raises(CacheError, match=f"it has {rows} rows of '{VALUES}', and its example has {rows + 1}"):
        Shard.open(path, None, COLUMNS).records([2], into=[{VALUES: np.zeros((rows + 1, 2), np.uint16)}])


def both_ways(cache: TeacherCache, batch: list[Example], side: str, spec: SignalSpec) -> tuple[dict[str, torch.Tensor], ...]:
    """Through a room, whose memory was full of other numbers, and without one."""
    known = canonical(batch, padded(side, 3))
    keys = known.keys()
    shards, rows = split_places(cache.index.find(keys))
    room = cache._assembler.room(known, spec)
    for target in room.rows:
        for values in target.values():
            values.view(np.uint8)[...] = 77
    opened = [cache._shard(int(shard)) for shard in shards]
    read = [shard.records([int(row)], keys=keys[[place]]) for place, (shard, row) in enumerate(zip(opened, rows, strict=True))]
    copied = [
        shard.records([int(row)], keys=keys[[place]], into=[room.rows[place]])
        for place, (shard, row) in enumerate(zip(opened, rows, strict=True))
    ]
    plain = cache._assembler.assemble([record for (record,) in read], known, spec)
    roomy = cache._assembler.assemble([record for (record,) in copied], known, spec, room)
    return plain.named_tensors(), roomy.named_tensors()


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("codec", ["float32", "float16", "bfloat16", "int8"])
def test_a_batch_is_the_same(tmp_path: Path, codec: CodecName, side: str) -> None:
    model, data = tiny_model("bert", num_layers=4, seed=1), pairs()
    spec = SignalSpec(logits=True) | states(0, 2, 4) | scores(1)
    cache = built(tmp_path, model, data, spec, None, codec)
    plain, roomy = both_ways(cache, data[2:8], side, spec)
    assert plain.keys() == roomy.keys() and len(plain) == 5
    for name, values in plain.items():
        assert values.dtype == roomy[name].dtype and torch.equal(values, roomy[name]), name


@pytest.mark.parametrize("words", ["4t_0.25h", "2t"])
def test_a_smaller_view_is_the_same(tmp_path: Path, words: str) -> None:
    model, data = tiny_model("bert", num_layers=4, seed=1), pairs()
    built(tmp_path, model, data, states(4), None, "float16")
    plain, roomy = both_ways(TeacherCache(tmp_path, selection=Selection.parse(words)), data[:5], "left", states(4))
    assert all(torch.equal(values, roomy[name]) for name, values in plain.items())


@pytest.mark.parametrize("width_scheme", ["magnitude", "random"])
def test_what_is_stored_in_part_has_no_room(tmp_path: Path, width_scheme: str) -> None:
    model, data = tiny_model("bert", num_layers=4, seed=1), pairs()
    cache = built(tmp_path, model, data, states(4), Selection.parse("4t_0.25h", width_scheme=width_scheme))  # type: ignore[arg-type]
    assert cache._assembler.room(canonical(data), states(4)).columns == {}


class Rooms(torch.utils.data.Dataset[bool]):
    """Whether the room that a worker makes is shared memory."""

    def __init__(self, cache: TeacherCache, data: list[Example]) -> None:
        self.cache, self.data = cache, data

    def __len__(self) -> int:
        return 1

    def __getitem__(self, _: int) -> bool:
        room = self.cache._assembler.room(canonical(self.data), states(2, 4))
        return all(values.is_shared() for values in room.columns.values())


def test_in_a_worker_it_is_shared_memory(tmp_path: Path) -> None:
    rooms = Rooms(built(tmp_path, tiny_model("bert", num_layers=4, seed=1), pairs(), states(2, 4)), pairs())
    (shared,) = torch.utils.data.DataLoader(rooms, num_workers=1, batch_size=None)
    assert shared is True and rooms[0] is False
