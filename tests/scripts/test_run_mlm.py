"""The packaged run_mlm: text to examples, masked words, and with --mlm_probability 0 a teacher's layers alone."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, DatasetDict
from safetensors.torch import load_file

from hf_compress.projection_file import FILE_NAME
from hf_compress.run import main as run_main
from hf_compress.scripts.run_mlm import DataArguments, added_around, load_text, main, tokenized
from tests.kept_logging import logging_as_it_was as logging_as_it_was
from tests.tiny_text import model_folder, sentences, tokenizer

NARROW = {"hidden_size": 8, "intermediate_size": 12}

# As people have them, in the style of transformers' own run_mlm.py: a head, and a collator that makes labels, whatever the probability.
SCRIPT = """
import sys
from dataclasses import dataclass, field

from datasets import load_dataset
from transformers import (
    AutoModelForMaskedLM, AutoTokenizer, DataCollatorForLanguageModeling, HfArgumentParser, Trainer, TrainingArguments, set_seed,
)


@dataclass
class Arguments:
    model_name_or_path: str
    train_file: str
    cache_dir: str
    max_seq_length: int = 16
    mlm_probability: float = 0.15


def main():
    arguments, training = HfArgumentParser((Arguments, TrainingArguments)).parse_args_into_dataclasses()
    set_seed(training.seed)
    raw = load_dataset("text", data_files={"train": arguments.train_file}, cache_dir=arguments.cache_dir)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model_name_or_path)
    model = AutoModelForMaskedLM.from_pretrained(arguments.model_name_or_path)

    def tokenize(examples):
        return tokenizer(examples["text"], truncation=True, max_length=arguments.max_seq_length, return_special_tokens_mask=True)

    data = raw.map(tokenize, batched=True, remove_columns=["text"])["train"]
    collator = DataCollatorForLanguageModeling(tokenizer=tokenizer, mlm_probability=arguments.mlm_probability)
    trainer = Trainer(model=model, args=training, train_dataset=data, processing_class=tokenizer, data_collator=collator)
    trainer.train()
    trainer.save_model()
    trainer.save_state()


if __name__ == "__main__":
    main()
"""


@pytest.fixture
def text(tmp_path: Path) -> str:
    path = tmp_path / "text.txt"
    path.write_text("\n".join([*sentences(40), "", "  "]) + "\n")
    return str(path)


def flags(tmp_path: Path, text: str, model: str, *more: str, out: str = "out") -> list[str]:
    return [
        *("--model_name_or_path", model, "--train_file", text, "--cache_dir", str(tmp_path / "cache"), "--max_seq_length", "16"),
        *("--output_dir", str(tmp_path / out), "--do_train", "True", "--use_cpu", "True", "--report_to", "none", "--save_strategy", "no"),
        *("--disable_tqdm", "True", "--logging_steps", "1", "--max_steps", "4", "--per_device_train_batch_size", "8", *more),
    ]


def history(tmp_path: Path, out: str = "out") -> list[dict[str, Any]]:
    state = json.loads((tmp_path / out / "trainer_state.json").read_text())
    return [entry for entry in state["log_history"] if "loss" in entry]


GENERAL = ("--trainer_class", "DistillTrainer", "--distill_recipe", "tinybert_general", "--mlm_probability", "0")
PARTS = {"loss_embeddings", "loss_hidden_states", "loss_attention_scores"}


def finite(entries: list[dict[str, Any]]) -> bool:
    return all(math.isfinite(value) for entry in entries for value in entry.values())


def test_masked_words(tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_folder(tmp_path / "model", num_layers=2, head="masked_lm")
    monkeypatch.setattr(sys, "argv", ["run_mlm.py", *flags(tmp_path, text, model, "--do_eval", "True", "--max_eval_samples", "1")])
    main()
    results = json.loads((tmp_path / "out" / "eval_results.json").read_text())
    assert results["perplexity"] == pytest.approx(math.exp(results["eval_loss"]))
    assert results["eval_samples"] == 1
    before, after = (load_file(folder / "model.safetensors") for folder in (tmp_path / "model", tmp_path / "out"))
    assert any(not torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("teacher_head", ["base", "masked_lm"])
def test_general_distillation(tmp_path: Path, text: str, teacher_head: str) -> None:
    teacher = model_folder(tmp_path / "teacher", head=teacher_head)
    student = model_folder(tmp_path / "student", num_layers=2, head="masked_lm", seed=2, **NARROW)
    more = ("--teacher_model_name_or_path", teacher, "--lr_scheduler_type", "linear", "--warmup_steps", "2")
    assert run_main(["mlm", *flags(tmp_path, text, student, *GENERAL, *more, "--learning_rate", "0.02")]) == 0
    logged = history(tmp_path)
    assert finite(logged)
    assert {name for name in logged[0] if name.startswith("loss_")} == PARTS
    assert logged[0]["loss"] == pytest.approx(sum(logged[0][name] for name in PARTS), rel=1e-4)
    rates = [entry["learning_rate"] for entry in logged]
    assert rates[0] < rates[1] < rates[2] > rates[3]  # it warms up, and falls: no phase makes it constant
    assert logged[-1]["loss_hidden_states"] < logged[0]["loss_hidden_states"]
    assert json.loads((tmp_path / "out" / "config.json").read_text())["architectures"] == ["BertModel"]
    assert (tmp_path / "out" / FILE_NAME).is_file()


@pytest.mark.parametrize("script", ["ours", "people's"])
def test_from_disk_as_from_the_teacher(tmp_path: Path, text: str, script: str) -> None:
    teacher = model_folder(tmp_path / "teacher", head="masked_lm")
    student = model_folder(tmp_path / "student", num_layers=2, head="masked_lm", seed=2, **NARROW)
    path = tmp_path / "run_mlm.py"
    path.write_text(SCRIPT)
    name = "mlm" if script == "ours" else str(path)
    live = ("--teacher_model_name_or_path", teacher)
    disk = ("--teacher_cache_dir", str(tmp_path / "disk"))
    for out, more in (("live", live), ("built", (*live, *disk, "--teacher_cache_dtype", "float32")), ("read", disk)):
        assert run_main([name, *flags(tmp_path, text, student, *GENERAL, *more, out=out)]) == 0
    losses = [[entry["loss"] for entry in history(tmp_path, out)] for out in ("live", "built", "read")]
    assert finite(history(tmp_path, "live"))
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert losses[1] == losses[2]
    fields = json.loads((tmp_path / "disk" / "manifest.json").read_text())["columns"]
    assert not any("logits" in str(field) for field in fields)


def test_a_trainer_without_a_loss_of_its_own(tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_folder(tmp_path / "model", num_layers=2)
    monkeypatch.setattr(sys, "argv", ["run_mlm.py", *flags(tmp_path, text, model, "--mlm_probability", "0")])
    with pytest.raises(ValueError, match="masks no word, so there is nothing to learn from"):
        main()


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--mlm_probability", "0", "--do_eval", "True"], "no perplexity to evaluate. Leave --do_eval out"),
        (["--mlm_probability", "0", "--eval_strategy", "epoch"], "Leave --do_eval and --eval_strategy, which turns it on, out"),
        (["--mlm_probability", "1.5"], "--mlm_probability is 1.5; expected a share"),
        (["--train_file", "nowhere.txt"], "There is no such file: --train_file nowhere.txt"),
        (["--validation_file", "text.csv"], "There is no such file: --validation_file text.csv"),
        (["--max_seq_length", "2"], "has no room for text beside 2 special tokens"),
    ],
)
def test_what_would_end_in_nothing(tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch, more: list[str], words: str) -> None:
    model = model_folder(tmp_path / "model", num_layers=2, head="masked_lm")
    monkeypatch.setattr(sys, "argv", ["run_mlm.py", *flags(tmp_path, text, model, *more)])
    with pytest.raises(ValueError, match=words):
        main()
    assert not (tmp_path / "out" / "model.safetensors").exists()


def examples(texts: list[str], **settings: Any) -> list[dict[str, list[int]]]:
    arguments = DataArguments(train_file="unread.txt", **settings)
    splits = DatasetDict({"train": Dataset.from_dict({"text": texts})})
    return list(tokenized(splits, tokenizer(), arguments, 10)["train"])


def test_blocks_hold_all_of_the_text(tmp_path: Path) -> None:
    texts, known = sentences(30), tokenizer()
    rows = examples([*texts, ""])
    assert {len(row["input_ids"]) for row in rows[:-1]} == {10}
    assert all((row["input_ids"][0], row["input_ids"][-1]) == (known.cls_token_id, known.sep_token_id) for row in rows)
    assert all(row["attention_mask"] == [1] * len(row["input_ids"]) for row in rows)
    inside = [token for row in rows for token in row["input_ids"][1:-1]]
    assert inside == [token for line in texts for token in known(line, add_special_tokens=False)["input_ids"]]


def test_lines_and_padding() -> None:
    texts, known = sentences(5), tokenizer()
    assert [row["input_ids"] for row in examples([*texts, " "], line_by_line=True)] == [
        known(line, truncation=True, max_length=10)["input_ids"] for line in texts
    ]
    for line_by_line in (True, False):
        assert {len(row["input_ids"]) for row in examples(texts, line_by_line=line_by_line, pad_to_max_length=True)} == {10}


def test_special_tokens_of_a_tokenizer_that_knows_no_letter() -> None:
    assert added_around(tokenizer()) == ([2], [3])  # "a" is unknown to it


def test_files_with_columns(tmp_path: Path) -> None:
    for name, content in (("one.csv", "id,text\n1,the room\n2,null\n"), ("two.jsonl", '{"said": "the room"}\n{"said": "null"}\n')):
        (tmp_path / name).write_text(content)
        splits = load_text(DataArguments(train_file=str(tmp_path / name)), str(tmp_path / "cache"), with_validation=True)
        column = "text" if name == "one.csv" else "said"
        assert (splits["validation"][column][:], splits["train"][column][:]) == (["the room"], ["null"])  # a word as others are
    (tmp_path / "empty.txt").write_text("\n \n")
    with pytest.raises(ValueError, match="The train split holds no text in its column 'text'"):
        load_text(DataArguments(train_file=str(tmp_path / "empty.txt")), str(tmp_path / "cache"), with_validation=False)
