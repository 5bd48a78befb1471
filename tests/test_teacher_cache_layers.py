"""`--teacher_cache_layers`: a teacher on disk with more layers than its own run compares, for later runs that choose others."""

from __future__ import annotations

from pathlib import Path

import pytest

from hf_compress.arguments import CompressionArguments
from hf_compress.cache.copy_view import View, copy_view
from hf_compress.cache.reader import TeacherCache
from hf_compress.cache.selection import Depth, Selection
from hf_compress.errors import ArgumentError, CacheError
from hf_compress.signals import HiddenState
from hf_compress.trainer import DistillTrainer
from tests.cached_runs import data, tokenizer
from tests.tiny_runs import arguments, student, teacher


def train(folder: Path, *, built: bool, **flags: str) -> None:
    trainer = DistillTrainer(
        student(),
        arguments(folder / "out", max_steps=1),
        teacher=None if built else teacher(),
        compression=CompressionArguments(teacher_cache_dir=str(folder / "cache"), distill_recipe="mud", **flags),
        train_dataset=data(),
        processing_class=tokenizer(),
    )
    trainer.train()


def held(folder: Path) -> set[int]:
    return {key.layer for key in TeacherCache(folder).spec.hidden_states if isinstance(key, HiddenState)}


def test_a_later_run_chooses_layers_that_the_first_did_not_compare(tmp_path: Path) -> None:
    train(tmp_path, built=False, teacher_cache_layers="0,3")
    assert held(tmp_path / "cache") == {0, 2, 3, 4}  # 2 and 4 are the run's own
    train(tmp_path, built=True, hidden_states_selection="1l", hsk_layers="t_top8")  # layer 3 of 4
    # A smaller cache counts in the run's own pairs, not in all that are there.
    copy_view(tmp_path / "cache", tmp_path / "own", View(Selection(Depth(2)), "test"))
    assert held(tmp_path / "own") == {2, 4}


def test_layers_that_a_finished_cache_does_not_hold(tmp_path: Path) -> None:
    train(tmp_path, built=False)
    assert held(tmp_path / "cache") == {2, 4}
    train(tmp_path, built=True, teacher_cache_layers="2,4")
    with pytest.raises(CacheError, match="does not hold the layers 0, 1, 3 of --teacher_cache_layers"):
        train(tmp_path, built=True, teacher_cache_layers="all")


@pytest.mark.parametrize(
    ("value", "words"),
    [("first", "'first' is no layer"), ("2-1", "runs backwards"), ("0,9", "names layer 9, but the teacher has 4 layers")],
)
def test_layers_that_are_none(value: str, words: str) -> None:
    with pytest.raises(ArgumentError, match=words):
        CompressionArguments(teacher_cache_dir="cache", teacher_cache_layers=value).stored_layers(4)
