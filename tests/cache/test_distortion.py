"""What is lost: cases that can be worked out by hand."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_compress.cache.codec import decode, encode
from hf_compress.cache.distortion import NEVER, Distortion, Sample, SampledBatch, _nearest
from hf_compress.errors import CacheError

WIDTHS = (1, 2, 4)
HIDDEN = 6


def batch(states: dict[int, Tensor], importance: Tensor | None = None, ranks: Tensor | None = None) -> SampledBatch:
    """Every token real; ranked from left to right."""
    count, length, _ = next(iter(states.values())).shape
    order = torch.arange(length).expand(count, -1) if ranks is None else ranks
    return SampledBatch(states, torch.ones(count, length, dtype=torch.bool), dict.fromkeys(states, order), importance)


def random(seed: int, examples: int = 60, tokens: int = 10, hidden: int = HIDDEN) -> Tensor:
    """States whose directions vary by 1, 1/2, 1/4, ... in a random basis, and are not about 0."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(hidden, hidden, generator=generator)).Q
    return torch.randn(examples, tokens, hidden, generator=generator) * 0.5 ** torch.arange(hidden) @ basis + 3.0


def distortion(states: dict[int, Tensor], codecs: Any = ("float32",), widths: Any = WIDTHS, **more: Any) -> Distortion:
    return Distortion(Sample.of([batch(states, **more)]), widths, codecs)


def test_all_that_is_kept_whole_is_not_lost() -> None:
    lost = distortion({1: random(1), 2: random(2)}).lost([1, 2], None)
    assert lost.shape == (1, 4)
    assert lost[0, -1] == 0
    assert (lost[0].diff() < 0).all()  # wider loses less


def test_the_leading_directions_leave_what_the_others_vary() -> None:
    lost = distortion({1: random(1, examples=4000)}).lost([1], None)
    variances = 0.25 ** torch.arange(HIDDEN)
    expected = [float(variances[width:].sum() / variances.sum()) for width in WIDTHS]
    assert lost[0, :-1].tolist() == pytest.approx(expected, rel=0.03)


def test_a_layer_that_its_neighbour_tells_is_free() -> None:
    upper = random(1)
    turned = upper @ torch.randn(HIDDEN, HIDDEN, generator=torch.Generator().manual_seed(3)) - 5.0
    free = distortion({1: turned, 2: upper})
    assert float(free.lost([2], None)[0, -1]) < 0.01
    assert float(free.lost([1], None)[0, -1]) < 0.01  # one below does it as well, where there is none above
    strange = distortion({1: random(7), 2: upper}).lost([2], None)
    assert float(strange[0, -1]) == pytest.approx(0.5, abs=0.01)  # one layer of two, and nothing tells it
    assert float(strange[0, -1]) <= 0.5 + 1e-6  # no direction is used that does not help


def test_the_layers_count_alike_however_large_they_are() -> None:
    lost = distortion({1: random(1), 2: 1000 * random(2)})
    one, two = (float(lost.lost([layer], None)[0, -1]) for layer in (1, 2))
    assert one == pytest.approx(two, abs=0.02) == pytest.approx(0.5, abs=0.02)


def test_tokens_that_are_not_kept_are_lost_by_their_weight() -> None:
    """Equal lengths from the mean: of 10 tokens of which 4 are kept 6 tenths are lost; more where attention goes to the others."""
    signs = torch.randint(0, 2, (400, 10, 1), generator=torch.Generator().manual_seed(0)) * 2.0 - 1.0
    states = {1: signs.expand(-1, -1, 3).clone()}
    assert float(distortion(states, widths=()).lost([1], 4)[0, -1]) == pytest.approx(0.6, abs=0.01)
    on_first = torch.zeros(400, 10)
    on_first[:, 0] = 1
    weighted = distortion(states, widths=(), importance=on_first).lost([1], 4)
    assert float(weighted[0, -1]) == pytest.approx(0.5 * 0.6, abs=0.01)
    on_last = on_first.flip(1)
    assert float(distortion(states, widths=(), importance=on_last).lost([1], 4)[0, -1]) == pytest.approx(0.5 * 0.6 + 0.5, abs=0.01)


def test_special_tokens_are_kept_only_with_all() -> None:
    ranks = torch.arange(10).expand(60, -1).clone()
    ranks[:, 9] = NEVER
    found = distortion({1: random(1)}, ranks=ranks)
    assert float(found.lost([1], 9)[0, -1]) == pytest.approx(0.1, abs=0.02)
    assert float(found.lost([1], None)[0, -1]) == 0


def test_a_token_is_recovered_from_a_layer_above_that_has_it() -> None:
    """Layer 1 keeps the first half of the tokens, layer 2 the other; they are the same states."""
    states = random(1)
    one, two = torch.arange(10).expand(60, -1), torch.arange(10).flip(0).expand(60, -1)
    sample = Sample.of([SampledBatch({1: states, 2: states}, torch.ones(60, 10, dtype=torch.bool), {1: one, 2: two}, None)])
    found = Distortion(sample, (), ("float32",))
    # Layer 1 has its own half and the other one from layer 2; layer 2 has nothing but its own.
    assert float(found.lost([1, 2], 5)[0, -1]) == pytest.approx(0.25, abs=0.02)
    assert float(found.lost([2], 5)[0, -1]) == pytest.approx(0.5, abs=0.02)


def test_more_of_anything_never_loses_more() -> None:
    generator = torch.Generator().manual_seed(5)
    states = {1: random(1)}
    for layer in (2, 3):
        states[layer] = states[layer - 1] + 0.3 * torch.randn(states[1].shape, generator=generator)
    found = distortion(states)
    by_depth = [found.lost(kept, 4) for kept in ([3], [2, 3], [1, 2, 3])]
    for fewer, more in pairwise(by_depth):
        assert (more < fewer).all()
    by_length = torch.stack([found.lost([2, 3], tokens) for tokens in (1, 2, 5, None)])
    assert (by_length.diff(dim=0) < 0).all()


def test_the_codecs_error_is_that_of_writing_and_reading() -> None:
    states = random(1)
    found = distortion({1: states}, codecs=("int8", "float32")).lost([1], None)
    rows = states[1::2].reshape(-1, HIDDEN)  # the half that tells
    error = (decode(encode(rows, "int8"), "int8") - rows).square().sum()
    centre = states[0::2].reshape(-1, HIDDEN).mean(0)
    assert float(found[0, -1]) == pytest.approx(float(error / (rows - centre).square().sum()), rel=1e-3)
    assert (found[0] >= found[1]).all() and found[0, -1] > found[1, -1] == 0


def test_numbers_that_do_not_fit_the_codec_are_no_choice() -> None:
    found = distortion({1: 1e6 * random(1)}, codecs=("float16", "int8")).lost([1], None)
    assert found[0, -1] == float("inf") and found[1].isfinite().all()


def test_directions_of_a_stored_basis_are_taken_as_they_come() -> None:
    states = torch.randn(100, 10, 3, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 2.0, 3.0])
    found = Distortion(Sample.of([batch({1: states})]), (1,), ("float32",), rotate=False).lost([1], None)
    assert float(found[0, 0]) == pytest.approx(13 / 14, abs=0.02)


def test_one_example_is_enough() -> None:
    assert float(distortion({1: random(1, examples=1)}, widths=()).lost([1], 5)[0, -1]) > 0.1


def test_padding_takes_no_part() -> None:
    states = random(1, examples=8)
    real = torch.ones(8, 10, dtype=torch.bool)
    real[::2, 6:] = False
    garbage = states.masked_fill(~real[..., None], float("nan"))
    ranks = {1: torch.arange(10).expand(8, -1)}
    sample = Sample.of([SampledBatch({1: garbage}, real, ranks, torch.rand(8, 10))])
    assert len(sample.weights) == 4 * 6 + 4 * 10
    assert float(sample.weights.sum()) == pytest.approx(8)
    with pytest.raises(CacheError, match="layer 1 is NaN"):
        Sample.of([batch({1: garbage})])
    with pytest.raises(CacheError, match="no example"):
        Sample.of([])


def test_the_nearest_layer_above_comes_first() -> None:
    assert _nearest(2, [1, 2, 4]) == [2, 4]
    assert _nearest(3, [1, 2]) == [2, 1]
