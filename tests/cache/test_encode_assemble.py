"""encode -> write -> read -> assemble, against a plain loop over unpadded examples that selects by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hf_compress.cache.codec_name import CodecName
from hf_compress.cache.index import split_places
from hf_compress.cache.reader import TeacherCache
from hf_compress.cache.selection import Selection
from hf_compress.losses.reduction import squared_error
from hf_compress.selected_state import SelectedState
from hf_compress.signals import AttentionScores, HiddenState, SignalSpec
from tests.cache.tiny_caches import (
    Collator,
    Example,
    Told,
    basis_by_hand,
    bert_scores,
    built,
    canonical,
    padded,
    pairs,
    scores,
    states,
    tokens_by_hand,
)
from tests.tiny_models import tiny_model

CODECS: tuple[CodecName, ...] = ("float32", "float16", "bfloat16", "int8")
NOISE = 2e-5  # of a forward in a padded batch against one alone
COLLATORS: dict[str, Collator] = {"right": padded(), "left": padded("left"), "more": padded(more=9), "left, more": padded("left", 5)}


def teacher(**config: Any) -> Any:
    return tiny_model("bert", num_layers=4, seed=1, **config)


def close(found: Tensor, expected: Tensor, codec: CodecName) -> None:
    """Within the codec's own bound: half a step of its numbers, for int8 half of 1/127 of the row's largest."""
    assert found.shape == expected.shape
    steps = {"float32": 0.0, "float16": 2**-11, "bfloat16": 2**-8}
    bound = expected.abs().amax(-1, keepdim=True) / 254 if codec == "int8" else expected.abs() * steps[codec]
    assert bool(((found.float() - expected).abs() <= bound * 1.001 + NOISE).all()), (found.float() - expected).abs().max()


# --- everything ---


@pytest.mark.parametrize("codec", CODECS)
def test_everything_comes_back_in_batches_of_any_padding(tmp_path: Path, codec: CodecName) -> None:
    model, data = teacher(), pairs()
    spec = SignalSpec(logits=True) | states(0, 2, 4) | scores(1, 3)
    cache = built(tmp_path, model, data, spec, None, codec)
    told = [Told(model, example) for example in data]
    for batch, collator in ((data, "right"), (data[2:7], "left"), (data[::-1], "more"), (data[3:4], "right"), (data[1:3], "left, more")):
        known = canonical(batch, COLLATORS[collator])
        found = cache.read(known, spec)
        assert not found.selected_states
        for row, example in enumerate(batch):
            place, start, length = data.index(example), int(known.starts[row]), len(example["input_ids"])
            close(found.logits["logits"][row], told[place].outputs.logits[0], "float32")
            for layer in (0, 2, 4):
                whole = found.hidden_states[HiddenState("layers", layer)][row]
                close(whole[start : start + length], told[place].states[layer], codec)
                assert whole[:start].abs().sum() == 0 and whole[start + length :].abs().sum() == 0
            for layer in (1, 3):
                square = found.attention_scores[AttentionScores("layers", layer)][row]
                close(square[:, start : start + length, start : start + length], bert_scores(model, example, layer), codec)
                assert square[:, :start].abs().sum() == 0 and square[:, :, start + length :].abs().sum() == 0


def test_codecs_lose_what_they_say(tmp_path: Path) -> None:
    """A codec that quietly stored float32 would pass every bound above."""
    model, data = teacher(), pairs()
    key, errors, sizes = HiddenState("layers", 4), {}, {}
    for codec in CODECS:
        cache = built(tmp_path / codec, model, data, states(4), None, codec)
        found = cache.read(canonical(data), states(4)).hidden_states[key]
        exact = torch.cat([Told(model, example).states[4] for example in data])
        rows = torch.cat([found[row, : len(example["input_ids"])].float() for row, example in enumerate(data)])
        errors[codec] = float((rows - exact).norm() / exact.norm())
        sizes[codec] = sum(
            column.item[0] * {"float32": 4, "int8": 1}.get(column.dtype, 2) for column in cache.manifest.columns if column.item
        )
    assert errors["float32"] < 1e-6 < errors["float16"] < errors["bfloat16"]
    assert errors["float16"] < 1e-3 and 1e-3 < errors["int8"] < 1e-2
    assert sizes == {"float32": 64, "float16": 32, "bfloat16": 32, "int8": 16}


@pytest.mark.parametrize("head", ["token_classification", "masked_lm", "question_answering"])
def test_predictions_a_token(tmp_path: Path, head: str) -> None:
    model, data = teacher(head=head), pairs()
    cache = built(tmp_path, model, data, SignalSpec(logits=True))
    for collator in COLLATORS.values():
        known = canonical(data[2:6], collator)
        found = cache.read(known, SignalSpec(logits=True)).logits
        assert set(found) == ({"start_logits", "end_logits"} if head == "question_answering" else {"logits"})
        for row, example in enumerate(data[2:6]):
            start, length = int(known.starts[row]), len(example["input_ids"])
            for name, logits in found.items():
                close(logits[row, start : start + length], Told(model, example).outputs[name][0], "float32")


# --- selections ---


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize(
    ("length", "rank_by", "count"),
    [
        ("left_first", None, 5),
        ("attention", "probabilities", 5),
        ("attention", "scores", 3),
        ("attention_no_sep", "probabilities", 4),
        ("attention_no_sep", "scores", 30),
    ],
)
def test_selected_tokens_are_those_of_a_plain_loop(tmp_path: Path, length: Any, rank_by: Any, count: int, codec: CodecName) -> None:
    model, data = teacher(), pairs()
    selection = Selection.parse(f"{count}t", length=length, rank_by=rank_by)
    cache = built(tmp_path, model, data, states(0, 3), selection, codec)
    batch = [data[place] for place in (7, 0, 3, 4, 1)]
    for collator in COLLATORS.values():
        known = canonical(batch, collator)
        found = cache.read(known, states(0, 3))
        assert not found.hidden_states
        for layer in (0, 3):
            state = found.selected_states[HiddenState("layers", layer)]
            assert state.positions.shape == state.chosen.shape
            for row, example in enumerate(batch):
                told = Told(model, example)
                expected = tokens_by_hand(told, selection, bert_scores(model, example, max(1, layer)), layer)
                kept = state.chosen[row]
                assert (state.positions[row][kept] - int(known.starts[row])).tolist() == expected, (layer, row)
                close(state.values[row][kept], told.states[layer][expected], codec)


def test_special_tokens_are_taken_by_one_scheme_and_not_by_the_other(tmp_path: Path) -> None:
    """The two attention schemes would be one if no special token were ever among the most important."""
    model, data = teacher(), pairs()
    taken = {}
    for length in ("attention", "attention_no_sep"):
        cache = built(tmp_path / length, model, data, states(3), Selection.parse("30t", length=length))  # type: ignore[arg-type]
        state = cache.read(canonical(data), states(3)).selected_states[HiddenState("layers", 3)]
        taken[length] = state.chosen.sum(1).tolist()
    lengths = [len(example["input_ids"]) for example in data]
    assert taken == {"attention": lengths, "attention_no_sep": [length - 2 for length in lengths]}


@pytest.mark.parametrize("length", ["attention", "attention_no_sep"])
def test_a_decoders_tokens_are_ranked_by_its_last_one(tmp_path: Path, length: Any) -> None:
    model, data = tiny_model("gpt2", num_layers=4, seed=1), pairs()
    selection = Selection.parse("3t", length=length)
    cache = built(tmp_path, model, data, states(2), selection)
    state = cache.read(canonical(data), states(2)).selected_states[HiddenState("layers", 2)]
    for row, example in enumerate(data):
        told = Told(model, example)
        expected = tokens_by_hand(told, selection, torch.zeros(0), 2, summary=len(told.ids) - 1)
        assert state.positions[row][state.chosen[row]].tolist() == expected, row
        close(state.values[row][state.chosen[row]], told.states[2][expected], "float32")


@pytest.mark.parametrize("mask", ["ignore", "zero_target"])
@pytest.mark.parametrize("width", ["random", "uniform", "magnitude", "pca"])
@pytest.mark.parametrize(
    ("words", "codec", "hidden"), [("4t_0.4h", "float32", 16), ("0.4h", "float32", 16), ("4t_0.4h", "int8", 20), ("0.3h", "float16", 12)]
)
def test_selected_dimensions_and_the_error_they_give(
    tmp_path: Path, words: str, codec: CodecName, hidden: int, width: Any, mask: Any
) -> None:
    if width == "pca" and mask == "zero_target":
        mask = "ignore"  # a subspace leaves nothing to be zero; the reading makes no difference
    model, data = teacher(hidden_size=hidden), pairs()
    selection = Selection.parse(words, width_scheme=width, mask=mask)
    cache = built(tmp_path, model, data, states(1, 4), selection, codec)
    batch = [data[place] for place in (4, 7, 3)]
    count = int(selection.width * hidden)
    for layer in (1, 4):
        mean, directions = basis_by_hand(model, data, selection, layer, count) if width == "pca" else (torch.zeros(0), torch.zeros(0))
        for collator in COLLATORS.values():
            known = canonical(batch, collator)
            state = cache.read(known, states(1, 4)).selected_states[HiddenState("layers", layer)]
            student = torch.randn(len(batch), known.width, hidden, generator=torch.Generator().manual_seed(4))
            total = 0.0
            for row, example in enumerate(batch):
                told, kept, start = Told(model, example), state.chosen[row], int(known.starts[row])
                tokens = tokens_by_hand(told, selection, bert_scores(model, example, layer), layer)
                assert (state.positions[row][kept] - start).tolist() == tokens
                theirs, ours = told.states[layer][tokens], student[row, [start + token for token in tokens]]
                if width == "pca":
                    stored = (theirs - mean) @ directions
                    difference, numbers = (ours - mean) @ directions - stored, float(hidden)
                elif width == "magnitude":
                    sizes = theirs.abs().flatten().sort(descending=True).values
                    smallest = sizes[int(selection.width * len(sizes)) - 1]
                    large = theirs.abs() >= smallest
                    stored = theirs * large
                    difference = (ours if mask == "zero_target" else ours * large) - stored
                    numbers = hidden if mask == "zero_target" else selection.width * hidden
                else:
                    drawn = np.random.RandomState(0).permutation(hidden)[:count].tolist()
                    dimensions = sorted(drawn) if width == "random" else [round(i / selection.width) for i in range(count)]
                    stored = theirs[:, dimensions]
                    aim = torch.zeros_like(theirs)
                    aim[:, dimensions] = stored
                    difference = ours - aim if mask == "zero_target" else ours[:, dimensions] - stored
                    numbers = float(hidden if mask == "zero_target" else count)
                close(state.values[row][kept], stored, codec)
                total += float(difference.square().sum()) / numbers
            assert error_of(state, student) == pytest.approx(total, rel=1e-3 if codec == "float32" else 2e-2)


def error_of(state: SelectedState, student: Tensor) -> float:
    """As `HiddenStatesLoss` has it."""
    taken = student.gather(1, state.positions[..., None].expand(-1, -1, student.shape[-1]))
    ours, theirs, numbers = state.space.compared(taken, state.values.float())
    return float(squared_error(ours, theirs, state.chosen)) / numbers


def test_magnitude_stores_no_more_numbers_than_it_keeps(tmp_path: Path) -> None:
    model, data = teacher(), pairs()
    cache = built(tmp_path, model, data, states(4), Selection.parse("4t_0.25h", width_scheme="magnitude"))
    record = record_of(cache, data[7])
    assert len(record["hidden_states.layers.4.values"]) == 4 * 16 // 4
    assert record["hidden_states.layers.4.mask"].shape == (4, 2)


# --- a record is of its example alone ---


def record_of(cache: TeacherCache, example: Example) -> dict[str, Any]:
    key = canonical([example]).keys()
    (shard,), (row,) = split_places(cache.index.find(key))
    (record,) = cache._shard(int(shard)).records([int(row)], keys=key)
    return dict(record)


@pytest.mark.parametrize("words", ["all", "4t_0.4h"])
def test_a_record_does_not_hang_on_the_batch_it_was_made_in(tmp_path: Path, words: str) -> None:
    model, data = teacher(), pairs()
    spec = SignalSpec(logits=True) | states(0, 4) | (scores(2) if words == "all" else SignalSpec())
    selection = Selection.parse(words, width_scheme=None if words == "all" else "magnitude")
    alone = built(tmp_path / "alone", model, data, spec, selection, batch_tokens=1)
    together = built(tmp_path / "together", model, data[::-1], spec, selection, batch_tokens=10_000)
    left = built(tmp_path / "left", model, data, spec, selection, collator=padded("left", 4))
    for example in data:
        one, *others = (record_of(cache, example) for cache in (alone, together, left))
        for other in others:
            assert one.keys() == other.keys()
            for name, values in one.items():
                assert values.shape == other[name].shape
                if values.dtype == np.float32:
                    assert np.abs(values - other[name]).max() < NOISE, name
                else:
                    assert np.array_equal(values, other[name]), name
