"""The plan: which example is computed when, settled by the examples alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from hf_compress.cache import plan as plans
from hf_compress.cache.key import Integers, Keys
from hf_compress.cache.plan import Plan, make_plan
from hf_compress.cache.shares import shares


def examples(count: int = 300, duplicates: int = 40, seed: int = 0) -> tuple[Keys, Integers]:
    """Keys and lengths in the order of a data set, some of them twice or three times."""
    generator = np.random.default_rng(seed)
    keys = generator.integers(0, 2**64, (count, 2), dtype=np.uint64)
    keys[: count // 2, 0] = keys[0, 0]  # the low word alone tells half of them apart
    lengths = generator.integers(1, 40, count)
    places = np.concatenate([np.arange(count), generator.integers(0, count, duplicates)])
    generator.shuffle(places)
    return keys[places], lengths[places]


def planned(keys: Keys, lengths: Integers, tokens: int = 100, size: Callable[[int], float] = float) -> Plan:
    return make_plan(keys, lengths, batch_tokens=tokens, example_bytes=size)


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plans, "SHARD_BYTES", 500)
    monkeypatch.setattr(plans, "SHARD_EXAMPLES", 40)


def test_every_unique_example_once_and_duplicates_counted() -> None:
    keys, lengths = examples()
    plan = planned(keys, lengths)
    assert (plan.examples, plan.duplicates) == (300, 40)
    assert {tuple(key) for key in plan.keys.tolist()} == {tuple(key) for key in keys.tolist()}
    assert np.array_equal(keys[plan.order], plan.keys) and np.array_equal(lengths[plan.order], plan.lengths)
    for place, key in zip(plan.order.tolist(), plan.keys.tolist(), strict=True):  # of equal ones the first
        assert place == keys.tolist().index(key)
    assert plan.tokens == sum(lengths[keys.tolist().index(key)] for key in plan.keys.tolist())


def test_longest_first_and_batches_within_the_budget() -> None:
    keys, lengths = examples()
    plan = planned(keys, lengths)
    assert (np.diff(plan.lengths) <= 0).all()
    end = 0
    for number, batch in enumerate(plan.batches):
        assert batch.start == end and batch.stop > batch.start
        end = batch.stop
        padded = int(plan.lengths[batch].max()) * (batch.stop - batch.start)
        assert padded <= 100
        if number + 1 < len(plan.batches):  # and not smaller than need be
            assert padded + int(plan.lengths[batch].max()) > 100
    assert end == plan.examples


def test_a_sample_comes_first_in_batches_of_its_own_and_is_of_the_smallest_keys() -> None:
    keys, lengths = examples()
    plan = make_plan(keys, lengths, batch_tokens=100, example_bytes=float, sample_size=lambda rising: int((rising > 0).sum()) // 10)
    assert plan.sample == 30
    assert {tuple(key) for key in plan.keys[:30].tolist()} == set(sorted({tuple(key) for key in keys.tolist()})[:30])
    assert 30 in {batch.start for batch in plan.batches}
    for part in (slice(0, 30), slice(30, None)):
        assert (np.diff(plan.lengths[part]) <= 0).all()
    assert {tuple(key) for key in plan.keys.tolist()} == {tuple(key) for key in planned(keys, lengths).keys.tolist()}
    assert [place for batch in plan.batches for place in range(batch.start, batch.stop)] == list(range(300))


def test_an_example_longer_than_the_budget_has_a_batch_of_its_own() -> None:
    keys, _ = examples(5, 0)
    plan = planned(keys, np.array([3, 500, 3, 700, 0]))
    assert [batch.stop - batch.start for batch in plan.batches] == [1, 1, 3]


def test_shards_cover_the_batches_in_order_and_are_no_larger_than_need_be() -> None:
    plan = planned(*examples())
    assert len(plan.shards) > 3
    assert [number for shard in plan.shards for number in range(shard.start, shard.stop)] == list(range(len(plan.batches)))
    spans = [plan.span(number) for number in range(len(plan.shards))]
    assert [place for span in spans for place in range(span.start, span.stop)] == list(range(plan.examples))
    for number, shard in enumerate(plan.shards):
        without_last = plan.batches[shard][:-1]
        assert sum(int(plan.lengths[batch].sum()) for batch in without_last) < 500
        assert sum(batch.stop - batch.start for batch in without_last) < 40
        if number + 1 < len(plan.shards):
            assert plan.lengths[spans[number]].sum() >= 500 or spans[number].stop - spans[number].start >= 40


def test_bytes_and_examples_each_close_a_shard() -> None:
    keys, lengths = examples()
    heavy, light = planned(keys, lengths, size=lambda length: 250.0), planned(keys, lengths, size=lambda length: 0.0)
    assert max(heavy.span(number).stop - heavy.span(number).start for number in range(len(heavy.shards) // 2)) <= 4
    assert min(light.span(number).stop - light.span(number).start for number in range(len(light.shards) - 1)) >= 40


def test_few_examples_make_many_shards_that_processes_share_by_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plans, "SHARDS", 20)
    monkeypatch.setattr(plans, "LEAST_EXAMPLES", 2)
    plan = planned(*examples(), size=lambda length: 0.0)
    assert 15 <= len(plan.shards) <= 20
    tokens = [int(plan.lengths[plan.span(number)].sum()) for number in range(len(plan.shards))]
    assert max(tokens) > 2 * min(tokens)
    for count in (1, 2, 3):
        given = shares(plan, (), count)
        assert sorted(number for own in given for number in own) == list(range(len(plan.shards)))
        load = [sum(tokens[number] for number in own) for own in given]
        assert max(load) <= 1.1 * min(load)
    # One of two processes died early: what is missing is shared anew.
    first, second = shares(plan, (), 2)
    again = shares(plan, first, 2)
    assert all(set(own) & set(second) and set(own) & set(first) for own in again)
    assert len(shares(plan, range(len(plan.shards)), 64)) == 64


def fields(plan: Plan) -> dict[str, Any]:
    return {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in vars(plan).items()}


def test_the_same_examples_make_the_same_plan_in_whatever_order_they_come() -> None:
    keys, lengths = examples()
    plan = planned(keys, lengths)
    assert fields(planned(keys, lengths)) == fields(plan)
    shuffled = np.random.default_rng(5).permutation(len(keys))
    other = planned(keys[shuffled], lengths[shuffled])
    assert np.array_equal(other.keys, plan.keys) and (other.batches, other.shards) == (plan.batches, plan.shards)


def test_other_examples_make_another_plan() -> None:
    keys, lengths = examples()
    plan = planned(keys, lengths)
    assert planned(keys[:200], lengths[:200]).examples < plan.examples
    longer = lengths.copy()
    longer[keys.tolist().index(plan.keys[-1].tolist())] = 99
    assert planned(keys, longer).keys[0].tolist() == plan.keys[-1].tolist()
