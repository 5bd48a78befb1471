"""A teacher on disk that is not the right one, or cannot be had: refused, with what was found, what was expected, what to do."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from datasets import Dataset
from torch.utils.data import IterableDataset
from transformers import DataCollatorForLanguageModeling

from hf_compress.arguments import CompressionArguments
from hf_compress.cache.reader import TeacherCache
from hf_compress.errors import ArgumentError, CacheError, DataError, TeacherError
from hf_compress.layers.layer_map import LayerMap
from hf_compress.losses.hidden_states import HiddenStatesLoss
from hf_compress.losses.logits import LogitsLoss
from tests.cached_runs import (
    MAP,
    data,
    other_rows,
    refused,
    run,
    tokenizer,
)
from tests.tiny_models import tiny_model
from tests.tiny_runs import student, teacher

# --- another teacher, another vocabulary, other labels ---


def test_another_teacher(tmp_path: Path) -> None:
    run(tmp_path, teacher())
    ours = TeacherCache(tmp_path / "cache").manifest.teacher.weights
    said = refused(tmp_path, CacheError, "teacher.weights", ours, "--teacher_cache_dir", guide=tiny_model("bert", num_layers=4, seed=9))
    assert said.count(ours[:8]) == 1
    run(tmp_path, teacher())  # the same weights in another object


def test_a_teacher_that_is_named_is_hashed_and_not_loaded(tmp_path: Path) -> None:
    teacher().save_pretrained(tmp_path / "right")
    tiny_model("bert", num_layers=4, seed=9).save_pretrained(tmp_path / "wrong")
    run(tmp_path, str(tmp_path / "right"), teacher_model_name_or_path=str(tmp_path / "right"))
    refused(tmp_path, CacheError, "teacher.weights", teacher_model_name_or_path=str(tmp_path / "wrong"))

    (tmp_path / "right" / "config.json").unlink()  # it cannot be loaded any more
    run(tmp_path, teacher_model_name_or_path=str(tmp_path / "right"))


def test_another_tokenizer(tmp_path: Path) -> None:
    run(tmp_path, teacher())
    other = tokenizer()
    other.add_tokens(["more"])
    refused(tmp_path, CacheError, "tokenizer", TeacherCache(tmp_path / "cache").manifest.tokenizer, processing_class=other)


def test_a_student_of_another_vocabulary(tmp_path: Path) -> None:
    run(tmp_path, teacher())
    refused(tmp_path, TeacherError, "60 and 50 tokens", model=tiny_model("bert", num_layers=2, vocab_size=60))


def named(*names: str) -> dict[str, Any]:
    return {"id2label": dict(enumerate(names)), "label2id": {name: index for index, name in enumerate(names)}}


def test_other_labels(tmp_path: Path) -> None:
    run(tmp_path, tiny_model("bert", seed=4, **named("cat", "dog")), losses=[LogitsLoss()])
    refused(tmp_path, TeacherError, "yes, no", "cat, dog", losses=[LogitsLoss()], model=student(**named("yes", "no")))


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_labels_in_another_order_are_put_right_by_name(tmp_path: Path, workers: int) -> None:
    guide = tiny_model("bert", seed=4, **named("C", "A", "B"))
    rows = data().map(lambda row: {"label": 0})
    losses = []
    for folder, live in (("live", True), ("built", False), ("built", False)):
        flags: dict[str, Any] = {"teacher_cache_dir": None} if live else {"teacher_cache_dtype": "float32"}
        is_there = (tmp_path / folder / "cache").exists()
        trainer = run(
            tmp_path / folder,
            None if is_there else guide,
            model=student(**named("a", "b", "c")),
            losses=[LogitsLoss()],
            train_dataset=rows,
            settings={"max_steps": 3, "dataloader_num_workers": workers},
            **flags,
        )
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[1] == pytest.approx(losses[0], abs=1e-6) and losses[2] == losses[1]
    ordered = run(tmp_path / "built", model=student(**named("C", "A", "B")), losses=[LogitsLoss()], train_dataset=rows)
    assert ordered.state.log_history[0]["loss"] != pytest.approx(losses[0][0], rel=1e-3)


# --- what the cache does not hold ---


def test_layers_that_are_not_stored(tmp_path: Path) -> None:
    run(tmp_path, teacher())
    wanted = [LogitsLoss(), HiddenStatesLoss(LayerMap(((1, 1), (2, 4))))]
    refused(tmp_path, CacheError, "hidden_states.layers.1", "hidden_states.layers.2, hidden_states.layers.4, logits", losses=wanted)


def test_logits_that_are_not_stored(tmp_path: Path) -> None:
    run(tmp_path, teacher(), losses=[HiddenStatesLoss(MAP)])
    refused(tmp_path, CacheError, "ask for logits")


def test_no_finished_cache_and_no_teacher(tmp_path: Path) -> None:
    refused(tmp_path, TeacherError, "no finished teacher on disk", "manifest.json", losses=None)
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "building.json").write_text("{}")
    refused(tmp_path, TeacherError, "no finished teacher on disk", losses=None)


def test_data_that_the_cache_does_not_know(tmp_path: Path) -> None:
    run(tmp_path, teacher())
    refused(tmp_path, CacheError, "16 of 16", "none of it", "--max_seq_length", train_dataset=other_rows(range(16)))
    mixed = Dataset.from_list([*data(), *other_rows(range(3))])
    refused(tmp_path, CacheError, "3 of 19", "only part of it", "augmentation", train_dataset=mixed)


def test_data_that_changes_while_training(tmp_path: Path) -> None:
    """Nothing is amiss when training begins, and is in its first batch."""
    run(tmp_path, teacher())

    class Changing(torch.utils.data.Dataset[Any]):
        looks = 0

        def __len__(self) -> int:
            return 16

        def __getitem__(self, place: int) -> dict[str, Any]:
            self.looks += 1
            row = dict(data()[place])
            # 16 looks to see whether the collator draws, 16 to see whether the cache holds it.
            return row if self.looks <= 32 else {**row, "input_ids": [7] * len(row["input_ids"])}

    refused(tmp_path, CacheError, "4 of 4 examples of a batch", "masking, augmentation", train_dataset=Changing())


# --- what cannot be stored ---


def test_a_collator_that_masks_at_random(tmp_path: Path) -> None:
    known = tokenizer(mask_token="w4")
    rows = data().remove_columns(["label", "token_type_ids"])
    model, guide = (tiny_model("bert", num_layers=layers, head="masked_lm") for layers in (2, 4))
    refused(
        tmp_path,
        DataError,
        "DataCollatorForLanguageModeling",
        "each time",
        "--teacher_cache_dir",
        guide=guide,
        model=model,
        train_dataset=rows,
        processing_class=known,
        data_collator=DataCollatorForLanguageModeling(known, mlm_probability=0.4),
        losses=[HiddenStatesLoss(MAP)],
    )
    assert not (tmp_path / "cache" / "manifest.json").exists()


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        yield from data()


def test_data_without_a_length(tmp_path: Path) -> None:
    refused(tmp_path, DataError, "no length", "map-style", guide=teacher(), train_dataset=Stream())


def test_an_encoder_decoder(tmp_path: Path) -> None:
    rows = Dataset.from_list([{"input_ids": [5, 6, 1], "attention_mask": [1, 1, 1], "labels": [4, 5, 1]}] * 8)
    models = [tiny_model("t5", num_layers=2, seed=seed) for seed in (1, 2)]
    words = ("several stacks", "encoder, decoder")
    refused(
        tmp_path, TeacherError, *words, guide=models[0], model=models[1], train_dataset=rows, losses=[LogitsLoss()], processing_class=None
    )


def test_images_are_no_texts(tmp_path: Path) -> None:
    rows = Dataset.from_list([{"pixel_values": [[[0.5] * 8] * 8], "label": number % 2} for number in range(8)])
    models = [tiny_model("vit", num_layers=layers) for layers in (4, 2)]
    words = ("(batch, choices, tokens), but the batch has", "pixel_values (8, 1, 8, 8)")
    refused(tmp_path, DataError, *words, guide=models[0], model=models[1], train_dataset=rows, losses=[LogitsLoss()], processing_class=None)


def test_too_little_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Usage(NamedTuple):
        free: int

    asked = []
    guide = teacher()
    guide.register_forward_hook(lambda *args: asked.append(1))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(1000))
    refused(tmp_path, CacheError, "only 1.0 kB are free", "16 examples", "--teacher_cache_dtype int8", guide=guide)
    assert not asked  # said before the first forward
    assert sorted(path.name for path in (tmp_path / "cache").iterdir()) == ["building.lock"]


@pytest.mark.parametrize("where", ["logits", "state"])
def test_a_teacher_of_nan(tmp_path: Path, where: str) -> None:
    guide: Any = teacher()
    part = guide.classifier if where == "logits" else guide.bert.encoder.layer[3].output.dense
    part.bias.data[0] = float("nan")
    losses = [LogitsLoss()] if where == "logits" else [HiddenStatesLoss(MAP)]
    words = ("logits is NaN" if where == "logits" else "hidden_states.layers.4 is NaN", "--teacher_dtype float32")
    refused(tmp_path, TeacherError, *words, guide=guide, losses=losses)
    assert not (tmp_path / "cache" / "manifest.json").exists()
    assert not list((tmp_path / "cache").glob("shard*"))


# --- flags that would do nothing ---


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"teacher_cache_dtype": "int8"}, ("--teacher_cache_dtype", "--teacher_cache_dir")),
        ({"hidden_states_selection": "3t"}, ("--hidden_states_selection", "--teacher_cache_dir")),
        ({"build_teacher_cache_only": True}, ("--build_teacher_cache_only", "--teacher_cache_dir")),
        ({"hsk_width": "random", "teacher_cache_dir": "x"}, ("--hsk_width", "--hidden_states_selection")),
        ({"hidden_states_selection": "3t", "hsk_width": "random", "teacher_cache_dir": "x"}, ("random", "0.1h")),
        ({"hidden_states_selection": "0.1h", "hsk_length": "attention", "teacher_cache_dir": "x"}, ("attention", "10t")),
        ({"teacher_cache_dtype": "int4", "teacher_cache_dir": "x"}, ("int4", "Did you mean 'int8'")),
    ],
)
def test_flags_without_effect(flags: dict[str, Any], words: tuple[str, ...]) -> None:
    with pytest.raises(ArgumentError) as caught:
        CompressionArguments(**flags)
    assert all(word in str(caught.value) for word in words), caught.value


def test_a_number_format_that_the_finished_cache_does_not_have(tmp_path: Path) -> None:
    run(tmp_path, teacher())
    refused(tmp_path, CacheError, "int8", "float16", teacher_cache_dtype="float16")
    run(tmp_path, teacher_cache_dtype="int8")
