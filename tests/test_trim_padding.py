"""Trimming: what is cut, what stays, and that the model cannot tell."""

from __future__ import annotations

import pytest
import torch

from hf_compress.trim_padding import TrimPaddingCollator, trim_padding
from tests.tiny_models import tiny_model

MASK = torch.tensor([[1, 1, 1, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 0, 0, 0]])
IDS = torch.arange(16).reshape(2, 8)


def test_columns_that_no_example_needs_are_cut() -> None:
    batch = {"input_ids": IDS, "attention_mask": MASK, "token_type_ids": torch.zeros_like(IDS), "bbox": torch.zeros(2, 8, 4)}
    trimmed = trim_padding({**batch, "labels": torch.tensor([0, 1]), "idx": torch.zeros(2, 8)})
    assert {name: tuple(value.shape) for name, value in trimmed.items()} == {
        "input_ids": (2, 5),
        "attention_mask": (2, 5),
        "token_type_ids": (2, 5),
        "bbox": (2, 5, 4),
        "labels": (2,),
        "idx": (2, 8),  # a name that is not known to be a sequence
    }
    assert torch.equal(trimmed["input_ids"], IDS[:, :5])
    assert batch["input_ids"].shape == (2, 8)


@pytest.mark.parametrize(("multiple", "length"), [(None, 5), (4, 8), (3, 6), (16, 8)])
def test_a_multiple_is_kept_to(multiple: int | None, length: int) -> None:
    assert trim_padding({"input_ids": IDS, "attention_mask": MASK}, pad_to_multiple_of=multiple)["input_ids"].shape[1] == length


def test_labels_are_cut_only_where_they_are_sequences() -> None:
    batch = {"input_ids": IDS, "attention_mask": MASK, "labels": torch.zeros(2, 8)}  # eight labels, or eight tokens
    assert trim_padding(batch)["labels"].shape == (2, 8)
    assert trim_padding(batch, labels_are_sequences=True)["labels"].shape == (2, 5)


def test_left_padding_and_missing_masks_are_left_alone() -> None:
    assert trim_padding({"input_ids": IDS, "attention_mask": MASK.flip(1)})["input_ids"].shape == (2, 8)
    assert trim_padding({"input_ids": IDS})["input_ids"].shape == (2, 8)


def test_choices_share_the_longest_of_the_batch() -> None:
    choices = {"input_ids": IDS.reshape(1, 2, 8), "attention_mask": MASK.reshape(1, 2, 8)}
    assert trim_padding(choices)["input_ids"].shape == (1, 2, 5)


def test_question_positions_stay_right() -> None:
    model = tiny_model("bert", head="question_answering")
    batch = {"input_ids": IDS + 3, "attention_mask": MASK}
    with torch.no_grad():
        full, trimmed = model(**batch), model(**trim_padding(batch))
    assert torch.allclose(full.start_logits[:, :5], trimmed.start_logits, atol=1e-6)


def test_the_collator_keeps_to_the_inner_ones_multiple() -> None:
    class Inner:
        pad_to_multiple_of = 4

        def __call__(self, examples: list[int]) -> dict[str, torch.Tensor]:
            return {"input_ids": IDS.repeat(1, 2), "attention_mask": torch.cat([MASK, torch.zeros_like(MASK)], 1)}

    assert TrimPaddingCollator(Inner())([1, 2])["input_ids"].shape == (2, 8)
