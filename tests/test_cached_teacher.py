"""A teacher on disk that is not the right one, not whole, or not to be had: refused, with what was found, what was expected, what to do."""

from __future__ import annotations

import gc
import os
import pickle
import shutil
import subprocess
import sys
import weakref
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from datasets import Dataset
from torch import nn
from torch.utils.data import IterableDataset
from transformers import DataCollatorForLanguageModeling

import hf_compress.cache.build
import hf_compress.teacher_side
from hf_compress.arguments import CompressionArguments
from hf_compress.cache.reader import TeacherCache
from hf_compress.cache.shard import shard_name
from hf_compress.cached_teacher import ENTRY, CachedTeacher, StoredSignals
from hf_compress.errors import ArgumentError, CacheError, CompressionError, DataError, TeacherError
from hf_compress.layers.layer_map import LayerMap
from hf_compress.losses.hidden_states import HiddenStatesLoss
from hf_compress.losses.logits import LogitsLoss
from hf_compress.losses.loss import Loss
from hf_compress.run import main
from hf_compress.signals import Signals, SignalSpec
from hf_compress.trainer import DistillTrainer
from tests.cache.tiny_caches import built, padded, pairs, states
from tests.test_cached_training import data, tokenizer
from tests.test_distill_trainer import arguments, student, teacher
from tests.tiny_models import tiny_model
from tests.training_scripts import read_report, training_flags, write_script

ROOT = Path(__file__).parents[1]
MAP = LayerMap(((1, 2), (2, 4)))


def run(folder: Path, guide: Any = None, *, model: nn.Module | None = None, train: bool = True, **more: Any) -> DistillTrainer:
    """Train one step from the cache in `folder`, built first if there is a teacher and no cache."""
    flags: dict[str, Any] = {name: more.pop(name) for name in [*more] if name.startswith(("teacher_", "hsk", "hidden", "build", "distill"))}
    chosen: list[Loss] | None = more.pop("losses", [LogitsLoss(), HiddenStatesLoss(MAP)])
    settings = arguments(folder / "out", per_device_train_batch_size=4, **more.pop("settings", {}))
    given: dict[str, Any] = {"train_dataset": data(), "processing_class": tokenizer(), **more}
    trainer = DistillTrainer(
        model or student(),
        settings,
        teacher=guide,
        losses=chosen,
        compression=CompressionArguments(**{"teacher_cache_dir": str(folder / "cache"), **flags}),
        **given,
    )
    if train:
        trainer.train()
    return trainer


def refused(folder: Path, error: type[CompressionError], *words: str, guide: Any = None, **more: Any) -> str:
    with pytest.raises(error) as caught:
        run(folder, guide, **more)
    for word in words:
        assert word in str(caught.value), f"{word!r} is not in: {caught.value}"
    return str(caught.value)


# --- another teacher, another vocabulary, other labels ---


def test_another_teacher(tmp_path: Path) -> None:
    run(tmp_path, teacher())
    ours = TeacherCache(tmp_path / "cache").manifest.teacher.weights
    said = refused(tmp_path, CacheError, "teacher.weights", ours, "--teacher_cache_dir", guide=tiny_model("bert", num_layers=4, seed=9))
    assert said.count(ours[:8]) == 1
    run(tmp_path, teacher())  # the same weights in another object


def test_a_teacher_that_is_named_is_hashed_and_not_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher().save_pretrained(tmp_path / "right")
    tiny_model("bert", num_layers=4, seed=9).save_pretrained(tmp_path / "wrong")
    run(tmp_path, str(tmp_path / "right"), teacher_model_name_or_path=str(tmp_path / "right"))
    refused(tmp_path, CacheError, "teacher.weights", teacher_model_name_or_path=str(tmp_path / "wrong"))

    def loaded(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the teacher was loaded")

    monkeypatch.setattr(hf_compress.teacher_side, "load_teacher", loaded)
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


def other_rows(places: range) -> Dataset:
    rows = [{**row, "attention_mask": [1] * len(row["input_ids"]), "label": 0} for row in pairs(30, seed=77)]
    return Dataset.from_list([rows[place] for place in places])


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


def test_choices_are_no_texts(tmp_path: Path) -> None:
    rows = Dataset.from_list([{"input_ids": [[5, 6], [7, 8]], "attention_mask": [[1, 1]] * 2, "label": 0}] * 8)
    models = [tiny_model("bert", num_layers=layers, head="multiple_choice") for layers in (4, 2)]
    refused(
        tmp_path, DataError, "input_ids (8, 2, 2)", guide=models[0], model=models[1], train_dataset=rows, losses=[HiddenStatesLoss(MAP)],
        processing_class=None,
    )  # fmt: skip


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


# --- half a cache ---


def stopped(folder: Path, monkeypatch: pytest.MonkeyPatch, shards: int, **more: Any) -> None:
    """A build that ends after some shards; a shard holds 4 examples or so."""
    written = []
    write = hf_compress.cache.build.write_shard

    def counted(*args: Any) -> Any:
        if len(written) == shards:
            raise KeyboardInterrupt
        written.append(args)
        return write(*args)

    monkeypatch.setattr("hf_compress.cache.plan.SHARD_EXAMPLES", 4)
    monkeypatch.setattr(hf_compress.cache.build, "CPU_BATCH_TOKENS", 40)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(hf_compress.cache.build, "write_shard", counted)
        run(folder, teacher(), **more)
    assert len(list((folder / "cache").glob("shard-*.safetensors"))) == shards


@pytest.mark.parametrize(
    ("others", "words"),
    [
        ({"teacher_cache_dtype": "int8"}, ("codec", "float16", "int8")),
        ({"guide": tiny_model("bert", num_layers=4, seed=9)}, ("teacher.weights",)),
        ({"losses": [LogitsLoss(), HiddenStatesLoss(LayerMap(((1, 1), (2, 4))))]}, ("signals.hidden_states",)),
        ({"train_dataset": other_rows(range(16))}, ("examples",)),
        ({"hidden_states_selection": "3t"}, ("selection",)),
    ],
    ids=["codec", "teacher", "layers", "data", "selection"],
)
def test_a_cache_that_was_begun_with_other_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, others: dict[str, Any], words: tuple[str, ...]
) -> None:
    stopped(tmp_path, monkeypatch, 2)
    before = {path.name: path.read_bytes() for path in (tmp_path / "cache").glob("shard*")}
    refused(tmp_path, CacheError, "other settings", "not finished", *words, **{"guide": teacher(), **others})
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "cache").glob("shard*")}
    assert not (tmp_path / "cache" / "manifest.json").exists()
    run(tmp_path, teacher())
    assert len(TeacherCache(tmp_path / "cache")) == 16


def test_what_was_left_of_another_cache_is_not_taken_for_this_one(tmp_path: Path) -> None:
    """Somebody deletes the manifest to have the cache built anew, from another teacher: the old shards are of the same examples."""
    run(tmp_path, teacher())
    (tmp_path / "cache" / "manifest.json").unlink()
    other = tiny_model("bert", num_layers=4, seed=9)
    refused(tmp_path, CacheError, "2 files", "index.safetensors", "of which teacher is not known", "Delete the folder", guide=other)


def test_a_finished_cache_is_not_built_over(tmp_path: Path) -> None:
    """Two runs begin at once; the second has its turn when the first has finished."""
    late = run(tmp_path, tiny_model("bert", num_layers=4, seed=9), train=False)
    run(tmp_path, teacher())
    before = {path.name: path.read_bytes() for path in sorted((tmp_path / "cache").iterdir()) if path.suffix != ".lock"}
    with pytest.raises(CacheError, match="was finished by another process"):
        late.train()
    assert before == {path.name: path.read_bytes() for path in sorted((tmp_path / "cache").iterdir()) if path.suffix != ".lock"}


HOLDER = """
import sys
from pathlib import Path
from hf_compress.cache.lock import builder_lock
with builder_lock(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.mark.slow
def test_a_second_builder_is_told_who_the_first_is(tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path / "cache")], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        refused(tmp_path, CacheError, f"process {holder.pid}", "Wait until it has finished", guide=teacher())
        holder.kill()
        holder.wait()
    run(tmp_path, teacher())  # a lock dies with its process
    assert len(TeacherCache(tmp_path / "cache")) == 16


def test_a_damaged_record_stops_the_run(tmp_path: Path) -> None:
    run(tmp_path, teacher())
    path = tmp_path / "cache" / shard_name(0)
    content = bytearray(path.read_bytes())
    content[-3] ^= 16
    path.write_bytes(content)
    refused(tmp_path, CacheError, shard_name(0), settings={"max_steps": 4})
    refused(tmp_path, CacheError, shard_name(0), settings={"max_steps": 4, "dataloader_num_workers": 1})


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
    refused(tmp_path, CacheError, "float16", "int8", teacher_cache_dtype="int8")
    run(tmp_path, teacher_cache_dtype="float16")


# --- how signals travel ---


def reading(tmp_path: Path) -> tuple[CachedTeacher, SignalSpec]:
    spec = SignalSpec(logits=True) | states(2)
    cache = built(tmp_path, teacher(), pairs(), spec)
    return CachedTeacher(cache, pad_token_id=0, device=torch.device("cpu")), spec


def test_a_collator_reads_ahead_in_a_thread_and_travels_to_workers(tmp_path: Path) -> None:
    source, spec = reading(tmp_path)
    source.cache.put_labels_in_order((1, 0))
    collator = source.reading(NamedCollator(), spec)
    batch = collator(pairs()[:4])
    found = source.signals(batch, spec)
    bare = {name: value for name, value in batch.items() if name != ENTRY}
    again = source.signals(bare, spec)  # made by a collator that is not ours
    copied = pickle.loads(pickle.dumps(collator))  # its thread stays here
    others = copied(pairs()[:4])[ENTRY].get()
    for other in (again, others):
        for name, tensor in found.named_tensors().items():
            assert torch.equal(tensor, other.named_tensors()[name])
    with torch.no_grad():
        live = teacher()(**bare).logits
    assert torch.allclose(found.logits["logits"], live.flip(-1), atol=1e-5)
    source.close()
    assert torch.equal(source.signals(bare, spec).logits["logits"], found.logits["logits"])


class NamedCollator:
    def __call__(self, examples: list[Any]) -> dict[str, torch.Tensor]:
        return padded()(examples)


def test_moving_does_not_wait_for_the_disk_and_casts_nothing() -> None:
    future: Future[Signals] = Future()
    stored = StoredSignals(future)
    assert stored.to("meta", non_blocking=True) is stored and stored.pin_memory() is stored  # not done yet
    future.set_result(Signals(logits={"logits": torch.ones(2, 2, dtype=torch.float16)}))
    assert stored.get().logits["logits"].device.type == "meta"
    assert stored.get().logits["logits"].dtype == torch.float16


# --- the teacher is let go ---


def test_the_teacher_is_gone_while_the_student_trains(tmp_path: Path) -> None:
    guide = teacher()
    gone = weakref.ref(guide)
    alive: list[bool] = []

    class Watching(DistillTrainer):
        def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            gc.collect()
            alive.append(gone() is not None)
            return super().training_step(*args, **kwargs)

    flags = CompressionArguments(teacher_cache_dir=str(tmp_path / "cache"))
    settings = arguments(tmp_path / "out", per_device_train_batch_size=4, max_steps=2)
    trainer = Watching(
        student(), settings, teacher=guide, compression=flags, train_dataset=data(), losses=[LogitsLoss()], processing_class=tokenizer()
    )
    del guide
    assert gone() is not None
    trainer.train()
    assert alive == [False, False]
    assert trainer.state.log_history[0]["loss_logits"] > 0


def test_a_teacher_from_a_path_is_gone_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher().save_pretrained(tmp_path / "teacher")
    loaded: list[Any] = []
    load = hf_compress.trainer.load_teacher

    def noted(*args: Any, **kwargs: Any) -> Any:
        model = load(*args, **kwargs)
        loaded.append(weakref.ref(model))
        return model

    monkeypatch.setattr("hf_compress.trainer.load_teacher", noted)
    trainer = run(tmp_path, teacher_model_name_or_path=str(tmp_path / "teacher"))
    gc.collect()
    assert len(loaded) == 1 and loaded[0]() is None
    assert trainer.distillation is not None and isinstance(trainer.distillation.teacher, CachedTeacher)


# --- scripts ---


def flags_of(folder: Path, *more: str) -> list[str]:
    script = write_script(folder)
    return [str(script), *training_flags(folder), "--trainer_class", "DistillTrainer", "--teacher_cache_dir", str(folder / "cache"), *more]


@pytest.fixture
def saved_teacher(tmp_path: Path) -> str:
    tiny_model("bert", num_layers=4, seed=3).save_pretrained(tmp_path / "teacher")
    return str(tmp_path / "teacher")


def test_a_script_builds_only_and_later_trains_without_the_teacher(tmp_path: Path, saved_teacher: str) -> None:
    hsk = ("--hsk", "1l_3t_0.5h", "--distill_recipe", "layerwise")
    building = flags_of(tmp_path, "--build_teacher_cache_only", "--teacher_model_name_or_path", saved_teacher, *hsk)
    assert main(building) == 0
    assert len(TeacherCache(tmp_path / "cache")) == 8
    assert not (tmp_path / "report.json").exists() and not (tmp_path / "out" / "model.safetensors").exists()
    before = (tmp_path / "cache" / "manifest.json").read_bytes()
    assert main(building) == 0  # it is there: nothing to do
    assert not (tmp_path / "report.json").exists()
    assert (tmp_path / "cache" / "manifest.json").read_bytes() == before
    shutil.rmtree(saved_teacher)
    assert main(flags_of(tmp_path)) == 0
    logged = read_report(tmp_path)["logged"]
    assert {"loss_logits", "loss_hidden_states"} <= set(logged) and "loss_attention_scores" not in logged
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_a_script_that_has_neither_cache_nor_teacher(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(flags_of(tmp_path)) == 2
    assert "no finished teacher on disk" in capsys.readouterr().err
    assert not (tmp_path / "cache").exists()


@pytest.mark.slow
def test_the_same_in_processes_of_their_own(tmp_path: Path, saved_teacher: str) -> None:
    def start(*more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "hf_compress.run", *flags_of(tmp_path, *more)],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=300,
        )

    built_only = start("--build_teacher_cache_only", "--teacher_model_name_or_path", saved_teacher)
    assert built_only.returncode == 0, built_only.stderr
    assert "ending without training" in built_only.stderr and not (tmp_path / "report.json").exists()
    shutil.rmtree(saved_teacher)
    later = start()
    assert later.returncode == 0, later.stderr
    assert "loss_logits" in read_report(tmp_path)["logged"]
