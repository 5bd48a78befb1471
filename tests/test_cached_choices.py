"""Multiple choice from a teacher on disk: each choice is a text of its own there, and training is what it is beside a live teacher."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import nn
from transformers import DataCollatorForMultipleChoice

from hf_compress.arguments import CompressionArguments
from hf_compress.cache.examples import Examples
from hf_compress.cache.reader import TeacherCache
from hf_compress.errors import DataError
from hf_compress.losses.hidden_states import HiddenStatesLoss
from hf_compress.losses.loss import Loss
from hf_compress.trainer import DistillTrainer
from tests.cache.tiny_caches import COLUMNS, pairs
from tests.cached_runs import MAP, losses, tokenizer
from tests.tiny_models import tiny_model
from tests.tiny_runs import arguments, largest_difference, weights

CHOICES = 3
EXAMPLES = 8


def questions(*, choices: int = CHOICES, seed: int = 3) -> list[dict[str, Any]]:
    """Each with choices of other lengths."""
    rows = pairs(EXAMPLES * choices, seed=seed)
    grouped = [rows[first : first + choices] for first in range(0, len(rows), choices)]
    columns = ("input_ids", "token_type_ids")
    return [
        {
            **{name: [row[name] for row in group] for name in columns},
            "attention_mask": [[1] * len(row["input_ids"]) for row in group],
            "label": number % choices,
        }
        for number, group in enumerate(grouped)
    ]


def padded(width: int = 24) -> Dataset:
    return Dataset.from_list(
        [
            {name: [row + [0] * (width - len(row)) for row in value] if name != "label" else value for name, value in question.items()}
            for question in questions()
        ]
    )


def model(layers: int, seed: int) -> nn.Module:
    return tiny_model("bert", num_layers=layers, head="multiple_choice", seed=seed)


def run(
    folder: Path, name: str, guide: nn.Module | None, *, data: Dataset | None = None, of: list[Loss] | None = None, **flags: Any
) -> DistillTrainer:
    settings = {"max_steps": 6, "per_device_train_batch_size": 4, "learning_rate": 0.02}
    trainer = DistillTrainer(
        model(2, 2),
        arguments(folder / name, **settings),
        teacher=guide,
        losses=of or losses(),
        compression=CompressionArguments(**flags),
        train_dataset=Dataset.from_list(questions()) if data is None else data,
        processing_class=tokenizer(),
        data_collator=DataCollatorForMultipleChoice(tokenizer()),
    )
    torch.manual_seed(5)
    trainer.train()
    return trainer


@pytest.mark.parametrize("dataset", [None, padded()], ids=["dynamic padding", "padding=max_length"])
def test_stored_equals_live(dataset: Dataset | None, tmp_path: Path) -> None:
    cache = str(tmp_path / "cache")
    live = run(tmp_path, "live", model(4, 1), data=dataset)
    built = run(tmp_path, "built", model(4, 1), data=dataset, teacher_cache_dir=cache, teacher_cache_dtype="float32")
    read = run(tmp_path, "read", None, data=dataset, teacher_cache_dir=cache)
    parts = {name for name in live.state.log_history[0] if name.startswith("loss_")}
    assert {"loss_logits", "loss_hidden_states", "loss_attention_scores", "loss_labels"} == parts
    for before, after in zip(live.state.log_history[:6], read.state.log_history[:6], strict=True):
        assert all(before[part] == pytest.approx(after[part], rel=1e-4, abs=1e-6) and before[part] > 0 for part in parts)
    assert largest_difference(weights(built), weights(live)) < 1e-6
    assert largest_difference(weights(read), weights(built)) == 0.0
    assert largest_difference(weights(read), {name: p.detach() for name, p in model(2, 2).named_parameters()}) > 1e-3
    assert len(TeacherCache(cache)) == EXAMPLES * CHOICES


def test_the_teacher_is_asked_for_choices_that_are_not_there(tmp_path: Path) -> None:
    cache = str(tmp_path / "cache")
    half = Dataset.from_list(questions()[: EXAMPLES // 2])
    run(tmp_path, "built", model(4, 1), data=half, teacher_cache_dir=cache, teacher_cache_dtype="float32")
    more = run(tmp_path, "more", model(4, 1), teacher_cache_dir=cache, teacher_cache_miss="live")
    live = run(tmp_path, "live", model(4, 1))
    assert largest_difference(weights(more), weights(live)) < 1e-6
    assert len(TeacherCache(cache)) == EXAMPLES * CHOICES


def test_layers_may_be_learnt_from_a_teacher_without_a_head(tmp_path: Path) -> None:
    """A model of texts is given each choice as a text: what its layers show is what they show inside the model that chooses."""
    guide = model(4, 1)
    runs = []
    for name, other in (("chooses", guide), ("bare", copy.deepcopy(guide).bert)):
        runs.append(run(tmp_path, name, other, of=[HiddenStatesLoss(MAP)]))
    assert largest_difference(*map(weights, runs)) == 0.0
    assert runs[0].state.log_history[0]["loss"] > 1e-3


def test_examples_have_as_many_choices(monkeypatch: pytest.MonkeyPatch) -> None:
    uneven = [*questions(), *questions(choices=2, seed=5)]
    monkeypatch.setattr("hf_compress.cache.examples.READ_BATCH", EXAMPLES)
    examples = Examples(uneven, DataCollatorForMultipleChoice(tokenizer()), COLUMNS)
    with pytest.raises(DataError, match="first example of the data has 3 choices, and others have 2"):
        list(examples.scan())
