"""A batch's signals in one piece of memory: nothing is lost on the way, and int8 travels as int8."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from hf_compress.cache.codec_name import CodecName
from hf_compress.cache.selection import Selection
from hf_compress.cached_teacher import ENTRY, CachedTeacher, ReadingCollator, StoredSignals
from hf_compress.packed_signals import PackedSignals
from hf_compress.signals import AttentionScores, Signals, SignalSpec
from tests.cache.tiny_caches import built, padded, pairs, states
from tests.tiny_runs import teacher

SPEC = SignalSpec(logits=True, attention_scores=frozenset({AttentionScores("layers", 2)})) | states(1, 2)


def tensors_of(signals: Signals) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    signals.moved(lambda tensor: (found.append(tensor), tensor)[1])
    return found


def collator_of(tmp_path: Path, codec: CodecName, selection: str, spec: SignalSpec, *, packs: bool) -> ReadingCollator:
    folder = tmp_path / f"{codec}-{selection}"
    cache = built(folder, teacher(), pairs(), spec, codec=codec, selection=Selection.parse(selection))
    source = CachedTeacher(cache, pad_token_id=0, device=torch.device("cpu"))
    reading = source.reading(padded(), spec)
    reading.packs = packs
    return reading


@pytest.mark.parametrize("codec", ["int8", "float16", "bfloat16", "float32"])
@pytest.mark.parametrize("selection", ["all", "2l_3t_0.5h"])
def test_packed_is_what_is_read_plainly(tmp_path: Path, codec: CodecName, selection: str) -> None:
    plain = collator_of(tmp_path / "plain", codec, selection, SPEC, packs=False)(pairs()[:5])[ENTRY].get()
    stored = collator_of(tmp_path / "packed", codec, selection, SPEC, packs=True)(pairs()[:5])[ENTRY]
    packed = stored.get()
    assert packed.hidden_states.keys() == plain.hidden_states.keys() and packed.selected_states.keys() == plain.selected_states.keys()
    expected, found = tensors_of(plain), tensors_of(packed)
    assert len(found) == len(expected) > 3
    for one, other in zip(expected, found, strict=True):
        assert one.dtype == other.dtype and torch.equal(one, other)


def test_whole_states_in_int8_travel_as_they_are_stored(tmp_path: Path) -> None:
    packed = collator_of(tmp_path, "int8", "all", states(1, 2), packs=True)
    signals = packed._read(packed.cache, canonical(packed))
    assert isinstance(signals, PackedSignals)
    values = sum(tensor.numel() for tensor in signals.outline.hidden_states.values())
    scales = sum(4 * tensor.numel() for tensor in signals.outline.scales.values())
    assert values + scales <= signals.memory.numel() < 1.1 * (values + scales) + 64 * 4
    assert {tensor.dtype for tensor in signals.outline.hidden_states.values()} == {torch.int8}


def canonical(collator: ReadingCollator) -> Any:
    from hf_compress.cache.key import canonical_examples

    return canonical_examples(padded()(pairs()[:4]), collator.columns, pad_token_id=0)


def test_a_worker_hands_over_one_piece_of_shared_memory(tmp_path: Path) -> None:
    reading = collator_of(tmp_path, "int8", "all", SPEC, packs=True)
    here = reading(pairs()[:4])[ENTRY].get()
    for batch in DataLoader(pairs()[:4], batch_size=4, collate_fn=reading, num_workers=1):  # type: ignore[arg-type]
        stored = batch[ENTRY]
        assert isinstance(stored, StoredSignals) and isinstance(stored._signals, PackedSignals)
        assert stored._signals.memory.is_shared()
        for one, other in zip(tensors_of(here), tensors_of(stored.get()), strict=True):
            assert torch.equal(one, other)


def test_moving_moves_the_memory_alone() -> None:
    packed = PackedSignals.pack(Signals(logits={"logits": torch.randn(2, 3)}))
    moves: list[torch.Size] = []
    moved = packed.moved(lambda tensor: (moves.append(tensor.shape), tensor.clone())[1])
    assert moves == [torch.Size([64])]
    assert moved.unpack().logits["logits"].tolist() == packed.unpack().logits["logits"].tolist()
