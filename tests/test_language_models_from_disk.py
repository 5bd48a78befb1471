"""Scripts that train language models, run from a teacher's largest logits on disk, and what is refused on the way there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import hf_compress.teacher_side
from hf_compress.arguments import CompressionArguments
from hf_compress.cache.reader import TeacherCache
from hf_compress.cli.app import main as cli
from hf_compress.errors import ArgumentError, CompressionError, LossError
from hf_compress.losses.hidden_states import HiddenStatesLoss
from hf_compress.losses.labels import LabelsLoss
from hf_compress.losses.logits import LogitsLoss
from hf_compress.losses.loss import Loss
from hf_compress.run import main as run_main
from hf_compress.trainer import DistillTrainer
from tests.kept_logging import logging_as_it_was as logging_as_it_was
from tests.tiny_models import tiny_model
from tests.tiny_runs import arguments, rows, teacher
from tests.tiny_text import WORDS, model_folder, sentences, tokenizer

# As people have them, in the style of transformers' own run_clm.py; with masks that are drawn once, where the model is a masked one.
SCRIPT = """
import random
from dataclasses import dataclass

from datasets import load_dataset
from transformers import (
    AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer, DataCollatorForLanguageModeling, DataCollatorForTokenClassification,
    HfArgumentParser, Trainer, TrainingArguments, set_seed,
)


@dataclass
class Arguments:
    model_name_or_path: str
    train_file: str
    masked: bool = False
    cache_dir: str | None = None


def main():
    arguments, training = HfArgumentParser((Arguments, TrainingArguments)).parse_args_into_dataclasses()
    set_seed(training.seed)
    raw = load_dataset("text", data_files={"train": arguments.train_file}, cache_dir=arguments.cache_dir)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model_name_or_path)
    model = (AutoModelForMaskedLM if arguments.masked else AutoModelForCausalLM).from_pretrained(arguments.model_name_or_path)
    chance = random.Random(0)

    def tokenize(examples):
        rows = tokenizer(examples["text"], return_token_type_ids=False)
        if arguments.masked:
            drawn = [[chance.random() < 0.3 for _ in ids] for ids in rows["input_ids"]]
            rows["labels"] = [[i if d else -100 for i, d in zip(ids, ds)] for ids, ds in zip(rows["input_ids"], drawn)]
            mask = tokenizer.mask_token_id
            rows["input_ids"] = [[mask if d else i for i, d in zip(ids, ds)] for ids, ds in zip(rows["input_ids"], drawn)]
        return rows

    data = raw.map(tokenize, batched=True, remove_columns=["text"])["train"]
    collator = DataCollatorForTokenClassification(tokenizer) if arguments.masked else DataCollatorForLanguageModeling(tokenizer, mlm=False)
    trainer = Trainer(model=model, args=training, train_dataset=data, processing_class=tokenizer, data_collator=collator)
    trainer.train()
    trainer.save_model()
    trainer.save_state()


if __name__ == "__main__":
    main()
"""


def folder_of(path: Path, masked: bool, **more: Any) -> str:
    if masked:
        return model_folder(path, head="masked_lm", **more)
    tiny_model("gpt2", head="causal_lm", vocab_size=len(WORDS), **{"seed": 1, **more}).save_pretrained(path)
    tokenizer().save_pretrained(path)
    return str(path)


@pytest.mark.parametrize("masked", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_script_trains_from_the_largest_logits(
    tmp_path: Path, masked: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    guide, student = folder_of(tmp_path / "teacher", masked), folder_of(tmp_path / "student", masked, num_layers=2, seed=2)
    script, text = tmp_path / "run_lm.py", tmp_path / "text.txt"
    script.write_text(SCRIPT)
    text.write_text("\n".join(sentences(24)))

    def run(out: str, *more: str) -> list[dict[str, Any]]:
        flags = [
            *("--model_name_or_path", student, "--train_file", str(text), "--cache_dir", str(tmp_path / "hf"), "--masked", str(masked)),
            *("--output_dir", str(tmp_path / out), "--use_cpu", "True", "--report_to", "none", "--save_strategy", "no", "--max_steps", "4"),
            *("--disable_tqdm", "True", "--logging_steps", "1", "--per_device_train_batch_size", "8", "--learning_rate", "0.01"),
            *("--trainer_class", "DistillTrainer", "--teacher_cache_dir", str(tmp_path / "cache"), *more),
        ]
        assert run_main([str(script), *flags]) == 0
        state = json.loads((tmp_path / out / "trainer_state.json").read_text())
        return [entry for entry in state["log_history"] if "loss" in entry]

    wanted = ("--teacher_model_name_or_path", guide, "--distill_recipe", "logits", "--teacher_cache_logits_top_k", "8")
    built = run("built", *wanted)
    assert built[-1]["loss_logits"] < built[0]["loss_logits"] and built[0]["loss_labels"] > 0
    # From here on there is no teacher.
    monkeypatch.setattr(hf_compress.teacher_side, "load_teacher", None)
    read, chunked = run("read"), run("chunked", "--distill_logits_chunk_size", "7")
    fewer = run("fewer", "--teacher_cache_logits_top_k", "2")
    assert [entry["loss"] for entry in read] == [entry["loss"] for entry in built]
    for name in ("loss_logits", "loss_labels"):
        assert [entry[name] for entry in chunked] == pytest.approx([entry[name] for entry in built], rel=1e-4)
    assert 0 < fewer[0]["loss_logits"] < 0.9 * read[0]["loss_logits"]
    before, after = (load_file(Path(folder) / "model.safetensors") for folder in (student, tmp_path / "chunked"))
    assert before.keys() == after.keys() and any(not torch.equal(before[name], after[name]) for name in before)
    capsys.readouterr()
    assert cli(["cache", "info", str(tmp_path / "cache")]) == 0
    # int8: 8 values, a scale, 8 ids of 2 bytes, two others of 4
    assert "the 8 largest logits (all others as one, at T = 1 and 2), 36 bytes a token" in capsys.readouterr().out
    command = ["estimate", "--teacher_model_name_or_path", guide, "--num_examples", "9", "--tokens_per_example", "9"]
    assert cli(["cache", *command, "--distill_recipe", "logits", "--teacher_cache_logits_top_k", "8"]) == 0
    assert "the logits are 36 bytes a token: the 8 largest logits" in capsys.readouterr().out
    assert cli(["cache", "view", str(tmp_path / "cache"), "-o", str(tmp_path / "small"), "--teacher_cache_logits_top_k", "3"]) == 0
    small = TeacherCache(tmp_path / "small")
    assert small.top is not None and (small.top.k, small.top.temperatures) == (3, (1.0, 2.0))


DATA = [{"input_ids": row["input_ids"], "attention_mask": row["attention_mask"], "labels": row["input_ids"]} for row in rows()]


def run(folder: Path, losses: list[Loss], *, guide: Any = None, chunk_size: int | None = None, **flags: Any) -> DistillTrainer:
    trainer = DistillTrainer(
        tiny_model("gpt2", num_layers=2, head="causal_lm", seed=2),
        arguments(folder / "out", max_steps=3, per_device_train_batch_size=4),
        teacher=guide,
        losses=losses,
        compression=CompressionArguments(teacher_cache_dir=str(folder / "cache"), distill_logits_chunk_size=chunk_size, **flags),
        train_dataset=DATA,
    )
    trainer.train()
    return trainer


@pytest.mark.parametrize(
    ("losses", "flags", "error", "words"),
    [
        (
            [LogitsLoss(kind="mse")],
            {},
            LossError,
            "has the 8 largest logits of each token, and LogitsLoss(kind='mse') compares all of them",
        ),
        ([HiddenStatesLoss()], {}, ArgumentError, "is about the logits of a causal or masked language model, and no loss compares logits"),
        (
            [LogitsLoss()],
            {"teacher_cache_logits_top_k": 50},
            ArgumentError,
            "the teacher's vocabulary has 50 words, so that is all of them",
        ),
    ],
)
def test_refusals_before_anything_is_built(
    tmp_path: Path, losses: list[Loss], flags: dict[str, Any], error: type[CompressionError], words: str
) -> None:
    with pytest.raises(error) as caught:
        run(tmp_path, losses, guide=tiny_model("gpt2", head="causal_lm", seed=1), **{"teacher_cache_logits_top_k": 8, **flags})
    assert words in str(caught.value)
    assert not list(tmp_path.glob("cache/shard-*"))


def test_a_classifier_has_no_words(tmp_path: Path) -> None:
    flags = CompressionArguments(teacher_cache_dir=str(tmp_path / "cache"), teacher_cache_logits_top_k=8)
    with pytest.raises(ArgumentError, match="and the teacher is a BertForSequenceClassification: leave it out"):
        DistillTrainer(
            tiny_model("bert", num_layers=2),
            arguments(tmp_path),
            teacher=teacher(),
            losses=[LogitsLoss()],
            compression=flags,
            train_dataset=rows(),
        )


@pytest.mark.parametrize("flags", [{"teacher_cache_logits_top_k": 8}, {"teacher_cache_logits_top_k": 0, "teacher_cache_dir": "cache"}])
def test_flags_that_mean_nothing(flags: dict[str, Any]) -> None:
    with pytest.raises(ArgumentError, match="--teacher_cache_logits_top_k"):
        CompressionArguments(**flags)


def test_whole_logits_on_disk_are_compared_in_chunks_too(tmp_path: Path) -> None:
    losses: list[Loss] = [LogitsLoss(), LabelsLoss(weight=0.5)]
    run(tmp_path, losses, guide=tiny_model("gpt2", head="causal_lm", seed=1))
    logs = [run(tmp_path, losses, chunk_size=size).state.log_history for size in (0, 9)]
    for whole, chunked in zip(*(log[:3] for log in logs), strict=True):
        assert chunked["loss_logits"] == pytest.approx(whole["loss_logits"], rel=1e-5)
        assert chunked["loss_labels"] == pytest.approx(whole["loss_labels"], rel=1e-5)
