"""`--teacher_cache_miss live`: training with part of the teacher on disk is training with all of it there, and the next run has it all."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import nn
from transformers import DataCollatorForLanguageModeling

import hf_compress.teacher_on_miss
import hf_compress.teacher_side
from hf_compress.arguments import CompressionArguments
from hf_compress.cache import plan as plans
from hf_compress.cache.reader import TeacherCache
from hf_compress.cache.verify import verify
from hf_compress.errors import ArgumentError, CacheError
from hf_compress.losses.hidden_states import HiddenStatesLoss
from hf_compress.losses.logits import LogitsLoss
from tests.cached_runs import MAP, RATE, Recording, data, losses, tokenizer, whats_in
from tests.tiny_models import tiny_model
from tests.tiny_runs import NARROW, arguments, largest_difference, student, teacher, weights

ROOT = Path(__file__).parents[1]
STEPS = 12  # three epochs of 16 examples


class Asked:
    """A teacher, and for how many examples its forward was run."""

    def __init__(self) -> None:
        self.model, self.examples = teacher(), 0
        self.model.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, module: nn.Module, args: Any, inputs: dict[str, Any]) -> None:
        self.examples += len(inputs["input_ids"])


def train(folder: Path, guide: nn.Module | str | None, *, live: bool = True, resume: str | None = None, **more: Any) -> Recording:
    """Train from `folder / "cache"`."""
    flags = {name: more.pop(name) for name in [*more] if name.startswith(("teacher_", "hsk", "hidden", "build", "distill"))}
    given = {name: more.pop(name) for name in [*more] if name in ("train_dataset", "data_collator", "processing_class", "model_init")}
    chosen, pupil = more.pop("losses", None) or losses(), more.pop("model", None)
    settings = {"max_steps": STEPS, "per_device_train_batch_size": 4, "learning_rate": RATE, **more}
    torch.manual_seed(5)  # projections are random
    trainer = Recording(
        None if "model_init" in given else pupil or student(),
        arguments(folder / "out", **settings),
        teacher=guide,
        losses=chosen,
        compression=CompressionArguments(
            **{"teacher_cache_dir": str(folder / "cache"), **({"teacher_cache_miss": "live"} if live else {}), **flags}
        ),
        **{"train_dataset": data(), "processing_class": tokenizer(), **given},
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def build(folder: Path, rows: Dataset, **flags: Any) -> None:
    """A teacher on disk of some rows, and no training."""
    with pytest.raises(SystemExit):
        train(
            folder,
            teacher(),
            live=False,
            train_dataset=rows,
            build_teacher_cache_only=True,
            **{"teacher_cache_dtype": "float32", **flags},
        )


HALF = list(range(0, 16, 2))


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("half")
    build(folder, data().select(HALF))
    return folder / "cache"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    build(folder, data())
    return folder / "cache"


def with_cache(folder: Path, cache: Path) -> Path:
    folder.mkdir(exist_ok=True)
    shutil.copytree(cache, folder / "cache")
    return folder


def same_run(one: Recording, other: Recording, start: nn.Module | None = None) -> None:
    """Losses and weights to 1e-6, and the weights moved by more than that."""
    assert sorted(one.values) == sorted(other.values) and one.values
    assert [one.values[step] for step in sorted(one.values)] == pytest.approx(
        [other.values[step] for step in sorted(one.values)], abs=1e-6, rel=1e-6
    )
    assert largest_difference(weights(one), weights(other)) < 1e-6
    before = {name: parameter.detach() for name, parameter in (start or student()).named_parameters()}
    assert largest_difference(weights(one), before) > 1e-3


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
        pytest.param({"dataloader_num_workers": 2}, marks=pytest.mark.slow),
        pytest.param(
            {"dataloader_num_workers": 2, "dataloader_persistent_workers": True, "save_strategy": "steps", "save_steps": 5},
            marks=pytest.mark.slow,
        ),
        pytest.param({"save_strategy": "steps", "save_steps": 3}, marks=pytest.mark.slow),
        {"model": lambda: student(hidden_dropout_prob=0.3)},
    ],
    ids=["shuffled", "accumulation", "two workers", "workers with the old index", "written at checkpoints", "dropout"],
)
def test_as_if_all_had_been_there(tmp_path: Path, half: Path, whole: Path, options: dict[str, Any]) -> None:
    pupil: Callable[[], nn.Module] = options.pop("model", student)
    expected = train(with_cache(tmp_path / "whole", whole), None, live=False, model=pupil(), **options)
    guide = Asked()
    found = train(with_cache(tmp_path / "half", half), guide.model, model=pupil(), **options)
    same_run(found, expected, pupil())
    assert guide.examples == 8  # each of the others once, though they come in three epochs
    assert verify(tmp_path / "half" / "cache").problems == ()
    cache = TeacherCache(tmp_path / "half" / "cache")
    assert len(cache) == 16 and cache.manifest.appended >= 1
    # The next run finds all of it, with nobody to ask.
    same_run(train(tmp_path / "half", None, live=False, model=pupil(), **options), expected, pupil())


def test_a_run_that_is_resumed_in_the_middle(tmp_path: Path, half: Path, whole: Path) -> None:
    """Stopped in its first epoch; what was asked for by then is on disk, and the rest is asked for by the run that goes on."""
    expected = train(with_cache(tmp_path / "whole", whole), None, live=False)
    folder, first, second = with_cache(tmp_path / "half", half), Asked(), Asked()

    class Stopped(Exception):
        pass

    def stop(module: nn.Module, args: Any) -> None:
        if first.examples and (folder / "out" / "checkpoint-2").exists():
            raise Stopped

    pupil = student()
    pupil.register_forward_pre_hook(stop)
    with pytest.raises(Stopped):
        train(folder, first.model, model=pupil, save_strategy="steps", save_steps=2)
    there = len(TeacherCache(folder / "cache"))
    assert 8 < there <= 16 and there == 8 + first.examples
    resumed = train(folder, second.model, resume=str(folder / "out" / "checkpoint-2"), model=tiny_model("bert", num_layers=2, seed=8))
    assert sorted(resumed.values) == list(range(2, STEPS))
    assert first.examples + second.examples == 8
    assert [resumed.values[step] for step in resumed.values] == pytest.approx([expected.values[step] for step in resumed.values], abs=1e-6)
    assert largest_difference(weights(resumed), weights(expected)) < 1e-6


def test_written_as_soon_as_there_is_enough_for_a_shard(tmp_path: Path, half: Path, whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plans, "SHARD_EXAMPLES", 3)
    expected = train(with_cache(tmp_path / "whole", whole), None, live=False)
    guide = Asked()
    same_run(train(with_cache(tmp_path / "half", half), guide.model), expected)
    assert guide.examples == 8
    manifest = TeacherCache(tmp_path / "half" / "cache").manifest
    assert manifest.appended >= 2 and manifest.examples == 16


@pytest.mark.parametrize(("words", "width", "dtype"), [("1l_3t_0.5h", "magnitude", "float16"), ("2l_4t_0.5h", "pca", "int8")])
def test_selections_teach_the_same_now_and_later(tmp_path: Path, words: str, width: str, dtype: str) -> None:
    """What the student learns from is the record, not what the teacher said before it was rounded."""
    chosen = {"losses": [LogitsLoss(), HiddenStatesLoss(MAP, weight=2.0)], "model": None}
    build(tmp_path, data().select(HALF), hidden_states_selection=words, hsk_width=width, teacher_cache_dtype=dtype, losses=chosen["losses"])
    guide = Asked()
    now = train(tmp_path, guide.model, **chosen)
    assert guide.examples == 8
    later = train(tmp_path, None, live=False, **chosen)
    assert now.values == later.values and len(now.values) == STEPS
    assert largest_difference(weights(now), weights(later)) == 0.0
    assert largest_difference(weights(now), dict(student().named_parameters())) > 1e-3


def test_phases(tmp_path: Path, half: Path, whole: Path) -> None:
    """The first phase compares only part of what is stored; what it asks for is stored whole."""
    more = {"distill_phases": "intermediate=1,prediction=1", "max_steps": -1, "save_strategy": "epoch"}
    expected = train(with_cache(tmp_path / "whole", whole), None, live=False, **more)
    guide = Asked()
    found = train(with_cache(tmp_path / "half", half), guide.model, **more)
    assert largest_difference(weights(found), weights(expected)) < 1e-6 and guide.examples == 8


def test_a_model_that_model_init_makes_and_a_projection(tmp_path: Path, half: Path, whole: Path) -> None:
    more = {"model_init": lambda: student(**NARROW)}
    expected = train(with_cache(tmp_path / "whole", whole), None, live=False, **more)
    found = train(with_cache(tmp_path / "half", half), teacher(), **more)
    assert largest_difference(weights(found), weights(expected)) < 1e-6
    assert len(TeacherCache(tmp_path / "half" / "cache")) == 16


def test_built_and_asked_in_one_run(tmp_path: Path) -> None:
    """The data grows between two calls of train(): the same command builds, and later asks."""
    guide = Asked()
    trainer = train(tmp_path, guide.model, train_dataset=data().select(HALF), teacher_cache_dtype="float32")
    trainer.train_dataset = data()
    before = guide.examples
    trainer.train()
    assert guide.examples - before == 8 and len(TeacherCache(tmp_path / "cache")) == 16


# --- the teacher is loaded when it is needed ---


def test_a_teacher_that_is_named_is_loaded_at_the_first_miss(
    tmp_path: Path, half: Path, whole: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    teacher().save_pretrained(tmp_path / "teacher")
    named = {"teacher_model_name_or_path": str(tmp_path / "teacher")}
    loaded: list[str] = []
    load = hf_compress.teacher_on_miss.load_teacher
    monkeypatch.setattr(hf_compress.teacher_on_miss, "load_teacher", lambda *args, **more: [loaded.append(args[0]), load(*args, **more)][1])
    monkeypatch.setattr(hf_compress.teacher_side, "load_teacher", lambda *args, **more: pytest.fail("the teacher was loaded at the start"))
    expected = train(with_cache(tmp_path / "whole", whole), None, **named, model=student(hidden_dropout_prob=0.3))
    assert not loaded
    with caplog.at_level(logging.INFO, "hf_compress"):
        found = train(with_cache(tmp_path / "half", half), None, **named, model=student(hidden_dropout_prob=0.3))
    assert loaded == [str(tmp_path / "teacher")]
    same_run(found, expected)
    said = "\n".join(record.getMessage() for record in caplog.records)
    for words in (
        "8 of 16 training examples that were looked up are not on disk: the teacher will be asked",
        "8 examples appended to",
        "which has 16 now",
        "8 examples were not on disk: the teacher was asked for them, 8 were appended",
    ):
        assert words in said


# --- what is refused, and what is warned of ---


def refused(folder: Path, error: type[Exception], *words: str, guide: Any = None, **more: Any) -> None:
    before = {path.name: path.read_bytes() for path in (folder / "cache").iterdir()}
    with pytest.raises(error) as caught:
        train(folder, guide, **more)
    for word in words:
        assert word in str(caught.value), f"{word!r} is not in: {caught.value}"
    assert before == {path.name: path.read_bytes() for path in (folder / "cache").iterdir()}


def test_nobody_to_be_asked(tmp_path: Path, half: Path) -> None:
    refused(with_cache(tmp_path, half), ArgumentError, "nobody is there to be asked", "--teacher_model_name_or_path")


def test_another_teacher(tmp_path: Path, half: Path) -> None:
    folder = with_cache(tmp_path, half)
    refused(folder, CacheError, "teacher.weights", guide=tiny_model("bert", num_layers=4, seed=9))
    tiny_model("bert", num_layers=4, seed=9).save_pretrained(tmp_path / "wrong")
    refused(folder, CacheError, "teacher.weights", teacher_model_name_or_path=str(tmp_path / "wrong"))


def test_another_precision(tmp_path: Path, half: Path) -> None:
    folder = with_cache(tmp_path, half)
    refused(folder, ArgumentError, "built without --bf16 and --fp16", "this run is with --bf16", guide=teacher(), bf16=True)
    teacher().save_pretrained(tmp_path / "teacher")
    refused(
        folder,
        ArgumentError,
        "--teacher_dtype bfloat16",
        "computed in float32",
        teacher_model_name_or_path=str(tmp_path / "teacher"),
        teacher_dtype="bfloat16",
    )


def test_a_folder_that_cannot_be_written_to(tmp_path: Path, half: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = with_cache(tmp_path, half)
    able = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: False if Path(path) == folder / "cache" else able(path, mode))
    refused(folder, CacheError, "cannot be written to", "Copy it to a folder of your own", guide=teacher())


def test_without_the_flag_the_error_names_it(tmp_path: Path, half: Path) -> None:
    folder = with_cache(tmp_path, half)
    refused(folder, CacheError, "8 of 16", "--teacher_cache_miss live", guide=teacher(), live=False)
    refused(folder, CacheError, "8 of 16", "--teacher_cache_miss live", guide=teacher(), teacher_cache_miss="error", live=False)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"teacher_cache_miss": "live"}, ("--teacher_cache_miss", "--teacher_cache_dir")),
        ({"teacher_cache_miss": "life", "teacher_cache_dir": "x"}, ("life", "Did you mean 'live'")),
    ],
)
def test_flags_without_effect(flags: dict[str, Any], words: tuple[str, ...]) -> None:
    with pytest.raises(ArgumentError) as caught:
        CompressionArguments(**flags)
    assert all(word in str(caught.value) for word in words), caught.value


def test_data_that_changes_in_every_epoch(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Words masked anew each time: other examples each time, all of them asked for, and a warning that the cache grows."""
    known = tokenizer(mask_token="w4")
    rows = data().remove_columns(["label", "token_type_ids"])
    guide = tiny_model("bert", num_layers=4, head="masked_lm", seed=1)
    more: dict[str, Any] = {"losses": [HiddenStatesLoss(MAP)], "train_dataset": rows, "processing_class": known}

    def pupil() -> nn.Module:
        return tiny_model("bert", num_layers=2, head="masked_lm", seed=2)

    train(tmp_path, guide, model=pupil(), max_steps=1, **more)
    assert len(TeacherCache(tmp_path / "cache")) == 16
    with caplog.at_level(logging.WARNING, "hf_compress"):
        found = train(tmp_path, guide, model=pupil(), data_collator=DataCollatorForLanguageModeling(known, mlm_probability=0.4), **more)
    seen = {example for batches in found.steps.values() for example in whats_in(batches)}
    unmasked = {tuple(row["input_ids"]) for row in rows}
    assert len(seen) > 30
    cache = TeacherCache(tmp_path / "cache")
    assert len(cache) == 16 + len(seen - unmasked)
    assert [record for record in caplog.records if "the data changes in every epoch" in record.getMessage()]
    assert verify(tmp_path / "cache").problems == ()


# --- two processes ---

SCRIPT = """
import os, sys
from pathlib import Path
import torch
from tests.test_cache_miss import train
from tests.tiny_runs import teacher, weights

folder, rank = Path(sys.argv[1]), int(os.environ["RANK"])
torch.set_num_threads(1)
settings = {"live": sys.argv[2] == "live", "max_steps": 8, "save_strategy": "steps", "save_steps": 2}
trainer = train(folder, teacher() if sys.argv[2] == "live" else None, **settings)
trainer.accelerator.wait_for_everyone()
torch.save((trainer.values, weights(trainer)), folder / f"{sys.argv[2]}-{rank}.pt")
sys.stdout.flush()
os._exit(0)  # without Python's shutdown, in which a gloo thread may abort the process
"""


@pytest.mark.slow
def test_two_processes_ask_each_for_their_own(tmp_path: Path, half: Path, whole: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    for name, cache, what in (("half", half, "live"), ("whole", whole, "read")):
        with_cache(tmp_path / name, cache)
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        done = subprocess.run(
            [sys.executable, *launcher, str(script), str(tmp_path / name), what],
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr[-3000:]
    cache_ = TeacherCache(tmp_path / "half" / "cache")
    assert verify(tmp_path / "half" / "cache").problems == ()
    assert len(cache_) == 16 and sum(shard.examples for shard in cache_.manifest.shards) == 16
    assert cache_.manifest.appended >= 2  # by both
    for rank in range(2):
        values, ends = torch.load(tmp_path / "whole" / f"read-{rank}.pt")
        found_values, found_ends = torch.load(tmp_path / "half" / f"live-{rank}.pt")
        assert [*found_values.values()] == pytest.approx([*values.values()], abs=1e-6, rel=1e-6)
        assert largest_difference(found_ends, ends) < 1e-6
        assert largest_difference(found_ends, dict(student().named_parameters())) > 1e-3
