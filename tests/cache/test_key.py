"""An example's key is of what the teacher reads, and of nothing else."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import xxhash
from torch import Tensor

from hf_compress.cache.key import Canonical, canonical_examples
from hf_compress.errors import DataError
from tests.cache.tiny_caches import COLUMNS, Example, padded, pairs

EXAMPLE: Example = {"input_ids": [1, 7, 300, 2, 9, 2], "token_type_ids": [0, 0, 0, 0, 1, 1]}


def read(batch: dict[str, Any], columns: frozenset[str] = COLUMNS, **more: Any) -> Canonical:
    return canonical_examples(batch, columns, **more)


def key_of(example: Example, collator: Any = None) -> tuple[int, int]:
    high, low = read((collator or padded())([example])).keys()[0].tolist()
    return high, low


def by_hand(example: Example) -> tuple[int, int]:
    """The documented bytes, one after another."""
    content = b""
    for name in sorted(example):
        if name == "input_ids" or any(example[name]):
            content += name.encode("utf-8") + b"\x00" + len(example[name]).to_bytes(8, "little")
            for value in example[name]:
                content += value.to_bytes(8, "little", signed=True)
    number = int(xxhash.xxh3_128_hexdigest(content), 16)
    return number >> 64, number & (2**64 - 1)


def test_keys_are_of_the_documented_bytes() -> None:
    for example in pairs():
        assert key_of(example) == by_hand(example)
    assert by_hand(EXAMPLE) == (0x8A74DEE6CCDDC04A, 0x2719E37AD4B60A32)  # written down: a key outlives versions of this package


def test_neither_padding_nor_company_changes_a_key() -> None:
    data = pairs()
    alone = np.concatenate([read(padded()([example])).keys() for example in data])
    assert len(np.unique(alone, axis=0)) == len(data)
    for side in ("right", "left"):
        for more in (0, 1, 30):
            assert np.array_equal(read(padded(side, more)(data)).keys(), alone)
    assert np.array_equal(read(padded()(data[::-1])).keys(), alone[::-1])


def test_neither_type_of_number_nor_order_of_columns_changes_a_key() -> None:
    batch = padded()(pairs())
    keys = read(batch).keys()
    for dtype in (torch.int32, torch.int16, torch.uint8):
        assert np.array_equal(read({name: value.to(dtype) for name, value in batch.items()}).keys(), keys)
    assert np.array_equal(read({**batch, "attention_mask": batch["attention_mask"].bool()}).keys(), keys)
    assert np.array_equal(read(dict(reversed(batch.items()))).keys(), keys)
    apart = {name: torch.stack([value, value], 2)[:, :, 0] for name, value in batch.items()}  # not contiguous
    assert np.array_equal(read(apart).keys(), keys)


def test_what_is_not_read_is_not_content() -> None:
    batch = padded()(pairs())
    keys = read(batch).keys()
    count = len(batch["input_ids"])
    more = {
        "labels": torch.arange(count),
        "start_positions": torch.arange(count),
        "idx": torch.arange(count),
        "special_tokens_mask": torch.ones_like(batch["input_ids"]),
        "texts": ["one"] * count,
    }
    columns = COLUMNS | {"labels", "start_positions"}
    assert np.array_equal(read({**batch, **more}, columns).keys(), keys)
    reads_no_types = {**batch, "token_type_ids": torch.zeros_like(batch["token_type_ids"])}
    assert np.array_equal(read(batch, COLUMNS - {"token_type_ids"}).keys(), read(reads_no_types).keys())


def test_token_types_of_zero_are_no_token_types() -> None:
    ids = {"input_ids": torch.tensor([[1, 5, 2], [1, 6, 2]]), "attention_mask": torch.ones(2, 3)}
    mixed = torch.tensor([[0, 0, 0], [0, 1, 1]])
    without, zeros, some = (
        read(batch).keys() for batch in (ids, {**ids, "token_type_ids": torch.zeros_like(mixed)}, {**ids, "token_type_ids": mixed})
    )
    assert np.array_equal(without, zeros)
    assert np.array_equal(some[0], without[0])  # in a batch with others that have some
    assert not np.array_equal(some[1], without[1])


def test_token_types_at_padding_do_not_count() -> None:
    batch = {"input_ids": torch.tensor([[1, 5, 0]]), "attention_mask": torch.tensor([[1, 1, 0]])}
    assert np.array_equal(read(batch).keys(), read({**batch, "token_type_ids": torch.tensor([[0, 0, 1]])}).keys())


@pytest.mark.parametrize("name", ["input_ids", "token_type_ids"])
@pytest.mark.parametrize("place", range(6))
def test_any_change_gives_another_key(name: str, place: int) -> None:
    changed = {column: list(values) for column, values in EXAMPLE.items()}
    changed[name][place] ^= 1
    assert key_of(changed) != key_of(EXAMPLE)
    assert key_of(changed)[0] != key_of(EXAMPLE)[0] and key_of(changed)[1] != key_of(EXAMPLE)[1]


def test_order_and_length_count() -> None:
    ids = EXAMPLE["input_ids"]
    others = [ids[::-1], ids[:-1], [*ids, 0], [0, *ids], [ids[0], ids[2], ids[1], *ids[3:]], [ids[0] + 65536, *ids[1:]]]
    keys = {key_of({"input_ids": values, "token_type_ids": [0] * len(values)}) for values in [ids, *others]}
    assert len(keys) == len(others) + 1


def test_values_do_not_pass_for_those_of_another_column() -> None:
    ids = torch.tensor([[4, 5]])
    one = {"input_ids": ids, "attention_mask": torch.ones(1, 2), "token_type_ids": torch.tensor([[1, 1]])}
    other = {"input_ids": ids, "attention_mask": torch.ones(1, 2), "position_ids": torch.tensor([[1, 1]])}
    assert not np.array_equal(read(one).keys(), read(other, COLUMNS | {"position_ids"}).keys())


# --- where the tokens stand ---


def test_where_examples_begin_and_how_long_they_are() -> None:
    data = pairs(4)  # 12, 4, 9, 5 tokens
    right, left = read(padded(more=2)(data)), read(padded("left", 2)(data))
    assert (right.width, len(right)) == (14, 4)
    assert right.starts.tolist() == [0, 0, 0, 0] and right.lengths.tolist() == [12, 4, 9, 5]
    assert left.starts.tolist() == [2, 10, 5, 9] and left.lengths.tolist() == [12, 4, 9, 5]
    for found in (right, left):
        for row, example in enumerate(data):
            assert {name: found.rows(name, row).tolist() for name in example} == example


def test_a_padding_token_tells_padding_where_there_is_no_mask() -> None:
    batch = {name: value for name, value in padded()(pairs()).items() if name != "attention_mask"}
    length = torch.tensor([len(example["input_ids"]) for example in pairs()])
    batch["input_ids"] = batch["input_ids"].masked_fill(torch.arange(20) >= length[:, None], 49_999)
    assert np.array_equal(read(batch, pad_token_id=49_999).keys(), read(padded()(pairs())).keys())


def test_each_choice_is_a_text_of_its_own() -> None:
    texts = padded()(pairs(6))
    chosen = read({name: value.view(3, 2, -1) for name, value in texts.items()})
    assert (len(chosen), chosen.choices, read(texts).choices) == (6, 2, None)
    assert np.array_equal(chosen.keys(), read(texts).keys())
    assert chosen.take([4, 1]).choices == 2 and np.array_equal(chosen.take([4, 1]).keys(), read(texts).keys()[[4, 1]])


# --- refused ---


def refused(batch: dict[str, Any], *words: str, **more: Any) -> None:
    with pytest.raises(DataError) as caught:
        read(batch, COLUMNS | {"bbox", "inputs_embeds"}, **more)
    assert all(word in str(caught.value) for word in words), caught.value


def ids(*shape: int) -> Tensor:
    return torch.full(shape, 7)


def test_padding_in_the_middle() -> None:
    mask = torch.tensor([[1, 1, 1, 0], [1, 0, 1, 0], [0, 1, 0, 1]])
    refused({"input_ids": ids(3, 4), "attention_mask": mask}, "2 of 3 examples", "row 1", "one side only")


def test_columns_that_are_not_a_number_a_token() -> None:
    batch = {"input_ids": ids(2, 4), "attention_mask": torch.ones(2, 4)}
    refused({**batch, "bbox": ids(2, 4, 4)}, "bbox, (2, 4, 4)", "(2, 4)")
    refused({**batch, "token_type_ids": torch.zeros(2, 4)}, "token_type_ids", "float32")
    refused({**batch, "inputs_embeds": torch.zeros(2, 4, 8)}, "inputs_embeds")


def test_batches_without_token_ids() -> None:
    refused({"pixel_values": torch.zeros(2, 1, 8, 8)}, "pixel_values (2, 1, 8, 8)", "--teacher_cache_dir")
    refused({"input_ids": ids(2, 3, 4, 5), "attention_mask": torch.ones(2, 3, 4, 5)}, "input_ids (2, 3, 4, 5)")
    refused({"input_ids": [[1, 2]]}, "no tensors")


def test_padding_that_cannot_be_told_from_text() -> None:
    refused({"input_ids": ids(2, 4)}, "cannot be told from text", "attention_mask")
    refused({"input_ids": ids(2, 4), "attention_mask": torch.ones(2, 1, 4, 4)}, "attention_mask (2, 1, 4, 4)", pad_token_id=0)
